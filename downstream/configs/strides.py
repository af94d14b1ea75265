"""Adapts the strides in the settings of heads to an encoder, and checks them on the built model.

Heads of OpenMMLab hold the strides of their feature maps, and ranges of object sizes, under many names.
Configurations are written for backbones whose finest stride is 4.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from coma.errors import BadInput

IN_PIXELS = (
    "strides",
    "featmap_strides",
    "feature_strides",
    "point_strides",
    "mask_stride",
    "mask_out_stride",
    "mask_loss_stride",
    "finest_scale",
    "regress_ranges",
    "scale_ranges",
    "base_edge_list",
)
"""Settings of heads in pixels, which scale with the strides; some are ranges of object sizes."""
UNBOUNDED = 1e8
"""Infinity in mmdet's ranges of object sizes."""
GENERATORS = (
    "prior_generator",
    "anchor_generator",
    "approx_anchor_generator",
    "square_anchor_generator",
    "point_generator",
)
"""Attributes of heads that hold their anchor or point generators."""


def scale_strides(head: Any, ratio: float, library: str) -> None:
    """Scales all settings in pixels of a head, including defaults that are not written out.

    Args:
        head: Settings of a head with its `type`, or a list of several.
        ratio: Finest stride of the encoder divided by the one that the settings expect.
        library: mmdet or mmseg, whose registry holds the classes.
    """
    if isinstance(head, list | tuple):
        for each in head:
            scale_strides(each, ratio, library)
    if not isinstance(head, dict):
        return
    for name, value in _defaults(head.get("type"), library).items():
        if name in IN_PIXELS or (isinstance(value, dict) and any(key in IN_PIXELS for key in value)):
            head.setdefault(name, value)
    for name, value in head.items():
        if name in IN_PIXELS:
            head[name] = _scaled(value, ratio)
        else:
            scale_strides(value, ratio, library)


def check_strides(model: nn.Module) -> None:
    """Checks the strides of heads against the feature maps of backbone and neck.

    An encoder that outputs the maps of the backbone that it replaces has nothing to check.

    Raises:
        BadInput: naming the head, its strides and those of the feature maps.
    """
    backbone: Any = model.backbone
    if backbone.adapter is not None:
        return
    encoder = backbone.encoder.config
    side = 32 * encoder.patch  # 4 x 4 tokens in the coarsest stage
    training, device = model.training, next(model.parameters()).device
    with torch.no_grad():
        image = torch.zeros(1, encoder.channels, side, side, device=device)
        maps: Sequence[Tensor] = model.eval().extract_feat(image)  # pyright: ignore[reportCallIssue]
    model.train(training)
    for name, head in model.named_modules():
        if name.partition(".")[0] in ("backbone", "neck") or "semantic" in name:
            continue  # semantic heads get other maps
        seen = head.resize_feats(maps) if hasattr(head, "resize_feats") else maps  # pyright: ignore[reportCallIssue]
        for attribute, strides in _strides(head):
            sizes = [each.shape[-1] for each in seen]
            enough = len(sizes) == len(strides) or (
                len(sizes) > len(strides) and "generator" not in attribute
            )
            pairs = zip(sizes, strides, strict=False)
            if not enough or not all(_fits(size, stride, side) for size, stride in pairs):
                raise BadInput(
                    f"model.{name} ({type(head).__name__}): its {attribute} are {_listed(strides)}, but the "
                    f"maps of encoder and neck have {_listed([side / size for size in sizes])} pixels; "
                    "change the head or the neck in the configuration, or use --cfg-options"
                )


def _fits(size: int, stride: float, side: int) -> bool:
    """Returns whether a map of `size` positions fits this stride on an image of `side` pixels."""
    return side <= 2 * stride if size == 1 else 0.7 < size * stride / side < 1.5


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _strides(head: Any) -> Iterator[tuple[str, list[float]]]:
    """Yields the strides of a head by name, from its generators or else its own attributes."""
    found = {f"{name}.strides": getattr(getattr(head, name, None), "strides", None) for name in GENERATORS}
    if not any(found.values()):
        found = {name: getattr(head, name, None) for name in ("strides", "featmap_strides")}
    for name, value in found.items():
        if isinstance(value, list | tuple):
            yield name, [float(each[0] if isinstance(each, list | tuple) else each) for each in value]


def _scaled(value: Any, ratio: float) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_scaled(each, ratio) for each in value)
    if not 0 < value < UNBOUNDED:
        return value
    scaled = value * ratio
    return int(scaled) if scaled == int(scaled) else scaled


def _defaults(kind: Any, library: str) -> dict[str, Any]:
    """Returns the defaults of a registered class by name, with those that it passes to its bases."""
    found: dict[str, Any] = {}
    for each in _class(kind, library).__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = inspect.signature(each.__init__).parameters.values()
        found = {p.name: p.default for p in parameters if p.default is not p.empty} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _class(kind: Any, library: str) -> type:
    if isinstance(kind, type):
        return kind
    registry: Any = import_module(f"{library}.registry")
    import_module(f"{library}.models")
    for each in (registry.MODELS, registry.TASK_UTILS):
        found = each.get(str(kind)) if kind else None
        if isinstance(found, type):
            return found
    return object
