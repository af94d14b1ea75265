"""Asks a configuration's own backbone which maps it hands to neck and heads.

The backbone is built without weights and run on the meta device, which computes shapes alone, so neither its
type nor the neck or the heads behind it have to be known here.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coma.errors import BadInput
from downstream.configs.load import REGISTER_MODULE
from downstream.configs.outputs import Outputs

log = logging.getLogger(__name__)
SIDE = 512
"""Side of the image that is shown to a backbone without an `img_size` of its own, in pixels."""
STRIDES = (4, 8, 16, 32)
"""Strides of a usual backbone, of which the last ones are assumed where none can be asked."""


def backbone_outputs(model: dict[str, Any], library: str) -> Outputs:
    """Returns what the backbone of a model outputs, and what of it neck and heads use.

    A backbone that cannot be built here (of a package that is missing) is assumed to have the channels that
    the neck or the head names, at the last of `STRIDES`; a line says so.

    Args:
        model: Settings of a detector or segmentor.
        library: mmdet or mmseg, whose registry holds the classes.

    Raises:
        BadInput: outputs that no other backbone has, or a backbone that can neither be built nor guessed.
    """
    kind = model["backbone"].get("type")
    with _shapes_only(library):
        try:
            outputs = _describe(*_run(model["backbone"]))
        except BadInput as error:
            raise BadInput(f"model.backbone: {kind} {error}") from None
        except Exception as error:  # whatever a backbone of others raises
            outputs = _named_by_neck_or_head(model)
            said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            if outputs is None:
                raise BadInput(
                    f"model.backbone: {kind} cannot be built to see its outputs ({said}), and neither neck "
                    "nor head names several in_channels"
                ) from error
            log.info(
                "%s cannot be built here (%s): assumed to have channels %s at strides %s",
                kind, said, outputs.channels, outputs.strides,
            )  # fmt: skip
        unused = _unused(model, outputs)
    return Outputs(**{**vars(outputs), "unused": unused})


@contextmanager
def _shapes_only(library: str) -> Iterator[None]:
    """Runs what is inside in the scope of a library, quietly, without changing the random numbers."""
    for module in (REGISTER_MODULE, f"{library}.models"):
        import_module(module)
    scope = DefaultScope.overwrite_default_scope(library)
    with scope, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties about each other
        yield


class _WithoutWeights(TorchFunctionMode):
    """Allocates no memory for parameters: layers make them with `torch.empty`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _build(settings: Any) -> nn.Module:
    """Builds a part of a model on the meta device."""
    with _WithoutWeights():
        return MODELS.build(_plain(settings)).to("meta")


def _plain(settings: Any) -> Any:
    """Returns settings without checkpoints, and with BN for SyncBN, which runs on GPUs alone."""
    if isinstance(settings, dict):
        kept = {name: child for name, child in settings.items() if name not in ("init_cfg", "pretrained")}
        plain = {name: _plain(child) for name, child in kept.items()}
        return plain | {"type": "BN"} if plain.get("type") in ("SyncBN", "MMSyncBN") else plain
    if isinstance(settings, list | tuple):
        return type(settings)(_plain(child) for child in settings)
    return settings


def _run(settings: dict[str, Any]) -> tuple[Tensor, Any, Any]:
    """Returns an image `[2, c, side, side]`, and what the backbone makes of it in training and afterwards."""
    side = settings.get("img_size", SIDE)
    side = max(side) if isinstance(side, list | tuple) else side
    backbone = _build(settings)
    image = torch.zeros(2, settings.get("in_channels", 3), side, side, device="meta")
    with torch.device("meta"), torch.no_grad():
        outputs = []
        for training in (True, False):
            backbone.train(training)
            outputs.append(backbone(image))
    return image, *outputs


def _describe(image: Tensor, training: Any, testing: Any) -> Outputs:
    """Returns the outputs in training; in testing they may be one of those.

    Raises:
        BadInput: outputs of another form.
    """
    maps = [training] if isinstance(training, Tensor) else list(training)
    with_image = maps[0] is image
    maps = maps[with_image:]
    tokens = all(isinstance(each, list | tuple) and len(each) == 2 for each in maps)
    maps = [each[0] for each in maps] if tokens else maps
    if not maps or not all(isinstance(each, Tensor) and each.ndim == 4 for each in maps):
        raise BadInput("does not output feature maps; only another backbone of its kind can take its place")
    if len(maps[0]) != len(image):
        raise BadInput(
            f"outputs {len(maps[0]) // len(image)} maps of every image and level, for its branches; use a "
            "configuration with one branch, such as those of faster_rcnn"
        )
    ports = [(each.shape[1], _stride(image, each)) for each in maps]
    single = None
    if isinstance(testing, Tensor) and not isinstance(training, Tensor):
        port = testing.shape[1], _stride(image, testing)
        single = max(i for i, each in enumerate(ports) if each == port)
    channels, strides = zip(*ports, strict=True)
    return Outputs(channels, strides, class_token=tokens, image=with_image, single=single)


def _stride(image: Tensor, map: Tensor) -> int:
    """Returns the power of two that is nearest to the ratio of their heights."""
    return 2 ** round(math.log2(image.shape[-2] / map.shape[-2]))


def _named_by_neck_or_head(model: dict[str, Any]) -> Outputs | None:
    for part in ("neck", "decode_head", "bbox_head"):
        found = model.get(part) or {}
        named = (found[0] if isinstance(found, list | tuple) else found).get("in_channels")
        if isinstance(named, list | tuple) and len(named) <= len(STRIDES):
            return Outputs(tuple(named), STRIDES[-len(named) :])
    return None


def _unused(model: dict[str, Any], outputs: Outputs) -> tuple[int, ...]:
    """Returns the numbers of the maps that have no influence on what neck or heads output.

    A neck or head that does not run on shapes alone is taken to use all maps.
    """
    maps = [
        torch.zeros(2, channels, SIDE // stride, SIDE // stride, device="meta", requires_grad=True)
        for channels, stride in zip(outputs.channels, outputs.strides, strict=True)
    ]
    if outputs.class_token or outputs.image:
        return ()
    try:
        with torch.device("meta"):
            results = _tensors(
                [_build(model["neck"])(tuple(maps))] if model.get("neck") else _heads(model, maps)
            )
            gradients = torch.autograd.grad([each.sum() for each in results], maps, allow_unused=True)
    except Exception:  # whatever a neck or a head of others raises
        return ()
    return tuple(i for i, gradient in enumerate(gradients) if gradient is None)


def _heads(model: dict[str, Any], maps: Sequence[Tensor]) -> list[Any]:
    """Returns the outputs of mmseg's heads; later ones of a cascade get what the one before predicts.

    Raises:
        LookupError: the model has none of these heads.
    """
    results = []
    for part in ("decode_head", "auxiliary_head"):
        heads = model.get(part) or []
        before: tuple[Any, ...] = ()
        for settings in heads if isinstance(heads, list | tuple) else [heads]:
            results.append(_build(settings)(tuple(maps), *before))
            before = (results[-1],) if part == "decode_head" else ()
    if not results:
        raise LookupError("decode_head")
    return results


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.requires_grad else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for each in value for tensor in _tensors(each)]
