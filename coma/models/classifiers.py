"""Encoders under a linear head; DyViT also as a timm model, `timm.create_model("dyvit_base")`.

Importing this module registers DyViT with timm. `DyViTClassifier` follows timm's conventions
(forward_features / forward_head, forward_intermediates, feature_info, group_matcher, reset_classifier), so
what builds on timm builds on DyViT: feature pyramids, layer-decayed optimizers, fine-tuning scripts. The
encoder's parameters keep their names; a head is added as `head.*`. It loads the tensors of an artifact as
they are, those of a decoder aside, and takes over their patch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, overload

import torch.nn.functional as F
from einops import rearrange
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from coma.config import DyViTConfig, EncoderConfig, dyvit_preset
from coma.errors import BadInput
from coma.masking.patchify import cover
from coma.models.dyvit import DyViT, Stem
from coma.models.plain import PlainEncoder
from coma.models.timm_vit import TimmViT
from coma.models.vit import ViT
from coma.registry import ARCHITECTURES, entry_of, resolve

OutFormat = Literal["NCHW", "NHWC"]
log = logging.getLogger(__name__)


class DyViTClassifier(DyViT):
    """DyViT with a linear head on mean-pooled features.

    Args:
        config: The backbone.
        num_classes: Outputs; 0 returns pooled features.
        drop_rate: Dropout before the head.
        global_pool: "avg", or "" for unpooled maps `[b, h, w, c]`.
    """

    def __init__(
        self, config: DyViTConfig, num_classes: int = 1000, drop_rate: float = 0.0, global_pool: str = "avg"
    ) -> None:
        super().__init__(config)
        self.drop_rate = drop_rate
        self.reset_classifier(num_classes, global_pool)

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Images `[b, c, H, W]` to logits `[b, num_classes]`."""
        return self.forward_head(self.forward_features(images))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features `[b, h, w, c]` to logits, or to pooled features with `pre_logits`."""
        if self.global_pool:
            x = x.mean(dim=(1, 2))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head.

        Raises:
            ValueError: a pooling other than "avg" or "".
        """
        self.global_pool = self.global_pool if global_pool is None else global_pool
        if self.global_pool not in ("avg", ""):
            raise ValueError(f"global_pool {self.global_pool!r}: DyViT pools with 'avg' or not at all ('')")
        self.num_classes = num_classes
        like = {"device": self.stem.conv.weight.device, "dtype": self.stem.conv.weight.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @overload
    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False,
        stop_early: bool = False, output_fmt: OutFormat = "NCHW", *, intermediates_only: Literal[True],
    ) -> list[Tensor]: ...  # fmt: skip
    @overload
    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False,
        stop_early: bool = False, output_fmt: OutFormat = "NCHW", intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: OutFormat = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of chosen stages.

        Args:
            x: Images `[b, c, H, W]`.
            indices: Stages to return; an int for the last n, None for all.
            norm: Normalise the last stage's output.
            stop_early: Do not run stages beyond the last one asked for.
            output_fmt: Axes of the maps.
            intermediates_only: Leave out the final features.

        Returns:
            Maps, or (final features, maps).

        Raises:
            ValueError: an unknown `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r} must be NCHW or NHWC")
        take, last = feature_take_indices(len(self.stages), None if indices is None else indices)  # pyright: ignore[reportArgumentType]
        height, width = x.shape[-2:]
        maps = self.stage_maps(x, stages=last + 1 if stop_early else len(self.stages))
        final = self.norm(maps[-1]) if len(maps) == 4 else maps[-1]
        chosen = []
        for i in take:
            stride = self.strides[i]
            full = final if norm and i == 3 else maps[i]
            cropped = full[:, : cover(height, stride), : cover(width, stride)]
            chosen.append(rearrange(cropped, "b h w c -> b c h w") if output_fmt == "NCHW" else cropped)
        return chosen if intermediates_only else (final, chosen)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads the tensors of a classifier, an encoder or a pre-trained model, and takes over their patch.

        Tensors of the decoder, and of layers that this model was built without, are left out. A head that the
        tensors do not hold stays as it is.

        Raises:
            BadInput: not one tensor belongs to this model.
            RuntimeError: tensors are missing, unexpected or of another shape; `strict` as in torch.
        """
        own, tensors = self.state_dict(), _without_decoder(state_dict)
        tensors = {name: each for name, each in tensors.items() if not self._is_without(name)}
        if not own.keys() & tensors.keys():
            raise BadInput(
                f"none of {len(state_dict)} tensors belongs to this DyViT; give those of an encoder"
            )
        new = [name for name in own if name.startswith("head.") and name not in tensors]
        if new:
            log.warning("%s: not among the tensors; the head keeps its initial weights", " and ".join(new))
        stem = tensors.get("stem.conv.weight")
        if stem is not None and stem.ndim == 4 and stem.shape[-1] != self.config.patch:
            self._set_patch(int(stem.shape[-1]))
        return super().load_state_dict(
            tensors | {name: own[name] for name in new}, strict=strict, assign=assign
        )

    def _is_without(self, name: str) -> bool:
        """Returns whether a tensor belongs to a layer that other models of this class have."""
        part, _, rest = name.partition(".")
        if part in ("norm", "head"):
            return isinstance(getattr(self, part), nn.Identity)
        stage = rest.partition(".")[0]
        return part == "stages" and stage in ("1", "2", "3") and int(stage) >= len(self.stages)

    def _set_patch(self, patch: int) -> None:
        log.warning(
            "the tensors have patches of %d px, not %d: strides are now %s; windows, which no tensor tells, "
            "stay %s, which suits maps of up to 7 x 7 mask units; coma.create_timm(ARTIFACT) knows them",
            *(patch, self.config.patch, [patch * 2**i for i in range(4)], self.config.windows),
        )
        weight = self.stem.conv.weight
        self.config = replace(self.config, patch=patch)
        self.stem = Stem(self.config.channels, self.config.dim, patch).to(weight.device, weight.dtype)
        self.unit, self.strides = self.config.unit, self.config.strides
        for info, stride in zip(self.feature_info, self.strides, strict=True):
            info["reduction"] = stride

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages, norm and head that the chosen stages do not need."""
        take, last = feature_take_indices(len(self.stages), indices)  # pyright: ignore[reportArgumentType]
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take


class DyViTFeatures(FeatureGetterNet):
    """A DyViT under `features_only`, which loads the tensors that a DyViT loads."""

    model: DyViTClassifier

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """See `DyViTClassifier.load_state_dict`; names may begin with "model.", as this module's own do."""
        tensors = {name.removeprefix("model."): each for name, each in state_dict.items()}
        report = self.model.load_state_dict(tensors, strict=strict, assign=assign)
        for info, known in zip(self.feature_info.info, self.model.feature_info, strict=True):
            info["reduction"] = known["reduction"]
        return report


def _without_decoder(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of the encoder under its own names, for a pre-trained model as for an encoder."""
    if not any(name.startswith("encoder.") for name in tensors):
        return dict(tensors)
    return {n.removeprefix("encoder."): each for n, each in tensors.items() if not n.startswith("decoder.")}


def _create(preset: str, pretrained: bool = False, **kwargs: Any) -> DyViTClassifier:
    def build(
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        **overrides: Any,
    ) -> DyViTClassifier:
        config = dyvit_preset(preset, min(img_size) if isinstance(img_size, tuple) else img_size, in_chans)
        unknown = overrides.keys() - {field.name for field in fields(DyViTConfig)}
        if unknown:
            raise TypeError(f"dyvit_{preset}: unknown arguments {sorted(unknown)}")
        config = replace(config, drop_path=drop_path_rate, **overrides)
        return DyViTClassifier(config, num_classes, drop_rate, global_pool)

    return build_model_with_cfg(
        build,
        f"dyvit_{preset}",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": DyViTFeatures, "output_fmt": "NCHW"},
        **kwargs,
    )


_CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.conv",
    "classifier": "head",
    "license": "apache-2.0",
}
default_cfgs = generate_default_cfgs({f"dyvit_{preset}": _CFG for preset in ARCHITECTURES["dyvit"].presets})


def _register(preset: str, help: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> DyViTClassifier:
        return _create(preset, pretrained, **kwargs)

    create.__name__ = f"dyvit_{preset}"
    create.__doc__ = f"DyViT {preset}: {help} parameters."
    register_model(create)


for _name, _preset in ARCHITECTURES["dyvit"].presets.items():
    _register(_name, _preset.help)


class _LinearHead(PlainEncoder):
    """A linear head on mean-pooled patch tokens (MAE, He et al. 2021, app. A.2: without class token)."""

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Images `[b, c, H, W]` to logits `[b, num_classes]`."""
        return self.head(self.pool(images))


class ViTClassifier(_LinearHead, ViT):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Plain ViT with a linear head.

    Args:
        config: The backbone.
        num_classes: Outputs.
    """


class TimmViTClassifier(_LinearHead, TimmViT):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Vision transformer of timm with a linear head of this project.

    Args:
        config: The backbone.
        num_classes: Outputs.
    """


Classifier = DyViTClassifier | ViTClassifier | TimmViTClassifier


def build_classifier(config: EncoderConfig, num_classes: int) -> Classifier:
    """Returns the encoder that `config` describes under a linear head, freshly initialised."""
    return resolve(entry_of(config).classifier)(config, num_classes)
