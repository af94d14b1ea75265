"""Encoders of this project as backbones of MMDetection and MMSegmentation.

    backbone=dict(type='DyViT', artifact='runs/first/artifact')                 # pre-trained
    backbone=dict(type='DyViT', preset='small')                                 # random, to compare with
    backbone=dict(type='PlainViT', artifact='runs/mae/artifact'), neck=dict(type='SimpleFeaturePyramid', ...)

They are registered with mmengine when `downstream.openmmlab` is imported (name it in `custom_imports`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from coma.artifact import load_encoder
from coma.config import EncoderConfig, encoder_preset
from coma.config.serialization import from_plain
from coma.errors import BadArtifact, BadInput
from coma.models import Encoder, build_encoder
from coma.models.blocks import freeze_stages
from downstream.configs.outputs import Outputs
from downstream.openmmlab.adapter import OutputAdapter
from downstream.private import paste_masks_beyond_edges

log = logging.getLogger(__name__)


class _Backbone(BaseModule):
    """An encoder with frozen stages, gradient checkpointing and a source of weights."""

    hierarchical: bool
    """Whether encoders of this type output several maps."""

    def __init__(
        self,
        artifact: str | Path | None,
        encoder: dict[str, Any] | None,
        preset: str | None,
        channels: int,
        frozen_stages: int,
        with_cp: bool,
        outputs: dict[str, Any] | None,
        init_cfg: Any,
        **changes: Any,
    ) -> None:
        super().__init__(init_cfg)
        paste_masks_beyond_edges()  # whoever builds a detector has imported mmdet by now
        if sum(source is not None for source in (artifact, encoder, preset)) != 1:
            raise BadInput(f"{type(self).__name__}: give one of artifact, encoder (settings) and preset")
        self.encoder = _encoder(type(self), artifact, encoder, preset, channels, changes)
        self.encoder.set_grad_checkpointing(with_cp)
        self._frozen = freeze_stages(self.encoder, frozen_stages)
        self.adapter: OutputAdapter | None = None
        if outputs is not None:
            settings, wanted = self.encoder.config, from_plain(outputs, Outputs, source="outputs")
            self.adapter = OutputAdapter(settings.widths, settings.strides, wanted)

    def train(self, mode: bool = True) -> nn.Module:
        """Sets the mode; frozen parts stay in evaluation mode, without drop path."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self


@MODELS.register_module()
class DyViT(_Backbone):
    """DyViT backbone: images `[b, c, H, W]` to maps `[b, dim * 2^i, ceil(H/s_i), ceil(W/s_i)]`.

    Args:
        artifact: Directory of a pre-trained model, whose encoder is loaded strictly.
        encoder: Settings of `DyViTConfig` instead of an artifact; the weights are random.
        preset: Name of a preset instead of an artifact; the weights are random.
        channels: Image channels (presets only).
        out_indices: Stages to return, counted from 0; with `outputs`, those that it needs.
        out_norms: Normalise the returned stages with new layers (the last stage has its own).
        drop_path: Largest stochastic-depth rate.
        frozen_stages: Freeze the stem and this many stages; 0 freezes the stem, -1 nothing.
        with_cp: Recompute activations in the backward pass (gradient checkpointing).
        global_blocks: Number of stage-3 blocks with global attention; see `DyViTConfig.global_blocks`.
        outputs: Settings of `Outputs`, the maps that another backbone would output; stages are chosen,
            resized and projected to these.
        init_cfg: As in mmengine.

    Raises:
        BadInput: settings that do not fit.
        BadArtifact: not an artifact of this encoder, or tensors that do not fit.
    """

    hierarchical = True

    def __init__(
        self,
        artifact: str | Path | None = None,
        encoder: dict[str, Any] | None = None,
        preset: str | None = None,
        channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norms: bool = True,
        drop_path: float | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        global_blocks: int | None = None,
        outputs: dict[str, Any] | None = None,
        init_cfg: Any = None,
    ) -> None:
        if not out_indices or not set(out_indices) <= set(range(4)):
            raise BadInput(f"DyViT: out_indices {tuple(out_indices)} must be some of 0, 1, 2, 3")
        changes = {"drop_path": drop_path, "global_blocks": global_blocks}
        super().__init__(
            artifact, encoder, preset, channels, frozen_stages, with_cp, outputs, init_cfg, **changes
        )
        if self.adapter is not None:
            return
        self.out_indices = tuple(out_indices)
        width = self.encoder.config.dim
        self.norms = nn.ModuleList(
            LayerNorm2d(width * 2**i) if out_norms and i < 3 else nn.Identity() for i in self.out_indices
        )

    def forward(self, images: Tensor) -> Any:
        """Returns the maps of the chosen stages, finest first, or what `outputs` says."""
        pyramid = self.encoder(images)
        if self.adapter is not None:
            return self.adapter(images, pyramid)
        return tuple(norm(pyramid[i]) for i, norm in zip(self.out_indices, self.norms, strict=True))


@MODELS.register_module()
class PlainViT(_Backbone):
    """Plain ViT backbone, ours or timm's.

    It maps images `[b, c, H, W]` to one map `[b, dim, ceil(H/patch), ceil(W/patch)]`.

    Args:
        artifact: Directory of a pre-trained model, whose encoder is loaded strictly.
        encoder: Settings of `ViTConfig` or `TimmConfig` instead of an artifact; the weights are random.
        preset: Name of a preset, or timm:NAME, instead of an artifact; the weights are random.
        channels: Image channels (presets only).
        drop_path: Largest stochastic-depth rate.
        frozen_stages: Freeze the stem and this many blocks; 0 freezes the stem, -1 nothing.
        with_cp: Recompute activations in the backward pass (gradient checkpointing).
        outputs: Settings of `Outputs`, the maps that another backbone would output; stages are chosen,
            resized and projected to these.
        init_cfg: As in mmengine.

    Raises:
        BadInput: settings that do not fit.
        BadArtifact: not an artifact of this encoder, or tensors that do not fit.
    """

    hierarchical = False

    def __init__(
        self,
        artifact: str | Path | None = None,
        encoder: dict[str, Any] | None = None,
        preset: str | None = None,
        channels: int = 3,
        drop_path: float | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        outputs: dict[str, Any] | None = None,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(
            artifact,
            encoder,
            preset,
            channels,
            frozen_stages,
            with_cp,
            outputs,
            init_cfg,
            drop_path=drop_path,
        )

    def forward(self, images: Tensor) -> Any:
        """Returns a tuple of one map, or what `outputs` says."""
        pyramid = self.encoder(images)
        return pyramid if self.adapter is None else self.adapter(images, pyramid)


def _encoder(
    kind: type[_Backbone],
    artifact: str | Path | None,
    settings: dict[str, Any] | None,
    preset: str | None,
    channels: int,
    changes: dict[str, Any],
) -> Encoder:
    """Builds the encoder with the `changes` that are not None, and loads the artifact's weights."""
    changes = {name: value for name, value in changes.items() if value is not None}
    if artifact is None:
        if settings is not None:
            config = from_plain(settings, EncoderConfig, source="encoder")
        else:
            config = encoder_preset(str(preset), channels=channels)
        _check_kind(config, kind, str(preset or "encoder"), BadInput)
        return build_encoder(replace(config, **changes))
    pretrained = load_encoder(Path(artifact))
    about = pretrained.artifact
    _check_kind(about.model, kind, str(artifact), BadArtifact)
    encoder = build_encoder(replace(about.model, **changes))
    tensors = pretrained.state_dict()
    encoder.load_state_dict(tensors, strict=True)
    log.info("%s: all %d tensors of its encoder loaded, 0 missing, 0 unexpected", artifact, len(tensors))
    return encoder


def _check_kind(config: EncoderConfig, kind: type[_Backbone], source: str, error: type[BadInput]) -> None:
    hierarchical = len(config.strides) > 1
    if hierarchical != kind.hierarchical:
        wanted = "DyViT" if hierarchical else "PlainViT"
        raise error(f"{source}: is another encoder; use backbone=dict(type='{wanted}', ...)")
