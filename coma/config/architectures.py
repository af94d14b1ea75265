"""Encoders as plain data: DyViT, ViT and vision transformers of timm, with their presets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, cast

import tyro

from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.ranges import CHANNELS, DECAY, DEPTH, HEADS, SIDE, WIDTH, Range, Ranged
from coma.registry import ARCHITECTURES, presets, resolve

Windows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DyViTConfig(Ranged):
    """Hierarchical ViT with dynamic multi-window self-attention."""

    flags = "--model."

    channels: Annotated[int, CHANNELS] = 3
    """Input channels."""
    patch: Annotated[int, Range(1, 1024)] = 4
    """Side of a stem patch in pixels; the mask unit is 8 patches wide (32 px at patch 4)."""
    dim: Annotated[int, WIDTH] = 96
    """Channels of the first stage; they double at every following stage."""
    depths: Annotated[tuple[int, int, int, int], DEPTH] = (1, 1, 10, 2)
    """Blocks per stage."""
    heads: Annotated[tuple[int, int, int, int], HEADS] = (2, 4, 6, 12)
    """Attention heads per stage, shared out equally over the stage's windows."""
    windows: Annotated[Windows, Range(0, 16384)] = ((4, 8), (2, 4), (2, 14), (7,))
    """Window sides in tokens per stage, one group of heads each; 0 attends to the whole map."""
    global_blocks: Annotated[int, Range(0, 256)] = 0
    """Blocks of stage 3, evenly spaced, whose heads all attend to the whole map, whatever the windows; with
    any, stage 4 does as well. For dense prediction at high resolution (ViTDet, Li et al. 2022, sec. 3)."""
    mlp_ratio: Annotated[float, Range(0, 64, above=True)] = 4.0
    """Hidden width of the MLP over its input width."""
    drop_path: Annotated[float, DECAY] = 0.0
    """Largest stochastic-depth rate, reached linearly at the last block."""

    @property
    def unit(self) -> int:
        """Side of a mask unit in pixels: the total stride, so that merging never mixes two units."""
        return self.patch * 8

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.dim * 8

    @property
    def as_wide_as_base(self) -> bool:
        """Returns whether the encoder has the width of the preset base."""
        return self.dim == 96

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token of every map of the pyramid, finest first."""
        return tuple(self.patch * 2**i for i in range(4))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every map of the pyramid, finest first."""
        return tuple(self.dim * 2**i for i in range(4))

    @staticmethod
    def suited_to(size: ImageSize) -> dict[str, Any]:
        """Returns patch and windows for images of a size.

        The shorter side decides about the patch. Windows lie inside a mask unit, or are as large as such an
        image, that is as its longer side: neither is cut from a map.
        """
        shorter, longer = sorted(size)
        patch = 4 if shorter >= 112 else 2 if shorter >= 64 else 1
        units = -(-longer // (patch * 8))
        return {"patch": patch, "windows": ((4, 8), (2, 4), (2, 2 * units), (units,))}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (len(self.depths) == len(self.heads) == len(self.windows) == 4):
            raise BadInput("DyViT has 4 stages: give 4 depths, 4 heads and 4 sets of windows")
        if not 0 <= self.global_blocks <= self.depths[2]:
            raise BadInput(f"global blocks {self.global_blocks}: stage 3 has {self.depths[2]} blocks")
        for stage, (heads, windows) in enumerate(zip(self.heads, self.windows, strict=True)):
            width = self.dim * 2**stage
            if not windows:
                raise BadInput(f"stage {stage + 1}: give the side of at least one window")
            if heads % len(windows):
                raise BadInput(f"stage {stage + 1}: {heads} heads cannot be shared by {len(windows)} windows")
            if width % heads or (width // heads) % 4:
                raise BadInput(
                    f"stage {stage + 1}: {width} channels over {heads} heads must give a multiple of 4 "
                    "(2-D rotary positions rotate pairs along both axes)"
                )


class _PlainConfig(Ranged):
    """Facts that plain vision transformers share: one map, and patches that are the mask units."""

    flags = "--model."
    patch: int
    dim: int

    @property
    def unit(self) -> int:
        """Side of a mask unit in pixels."""
        return self.patch

    @property
    def num_features(self) -> int:
        """Channels of the output."""
        return self.dim

    @property
    def as_wide_as_base(self) -> bool:
        """Returns whether the encoder has the width of the preset vit-base."""
        return self.dim == 768

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token of its one map."""
        return (self.patch,)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of its one map."""
        return (self.dim,)


@dataclass(frozen=True)
class ViTConfig(_PlainConfig):
    """Plain ViT, the backbone of MAE (He et al. 2021)."""

    channels: Annotated[int, CHANNELS] = 3
    """Input channels."""
    patch: Annotated[int, Range(1, 1024)] = 16
    """Side of a patch in pixels; it is also the mask unit."""
    dim: Annotated[int, WIDTH] = 768
    depth: Annotated[int, DEPTH] = 12
    heads: Annotated[int, HEADS] = 12
    mlp_ratio: Annotated[float, Range(0, 64, above=True)] = 4.0
    """Hidden width of the MLP over its input width."""
    drop_path: Annotated[float, DECAY] = 0.0
    """Largest stochastic-depth rate, reached linearly at the last block."""

    @staticmethod
    def suited_to(size: ImageSize) -> dict[str, Any]:
        """Returns the patch for images of a size; the shorter side decides."""
        return {"patch": 16 if min(size) >= 112 else 8 if min(size) >= 64 else 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.heads or self.dim % 4:
            raise BadInput(f"ViT dim {self.dim} must be a multiple of 4 and of its {self.heads} heads")


@dataclass(frozen=True)
class TimmConfig(_PlainConfig):
    """Vision transformer of timm; `--model timm:NAME` fills in the values of the network with this name.

    Whatever is not a setting (heads, registers, rotary positions, layer scale, the kind of MLP, ...) follows
    from the name.
    """

    name: str
    """Name of the architecture in timm, without the tag of its weights."""
    patch: Annotated[int, Range(1, 1024)]
    """Side of a patch in pixels; it is also the mask unit."""
    dim: Annotated[int, WIDTH]
    """Channels of every block, a multiple of the network's heads."""
    depth: Annotated[int, DEPTH]
    """Blocks."""
    position_grid: Annotated[tuple[int, int], SIDE, tyro.conf.arg(metavar="ROWS COLS")]
    """Size in patches of the table of learned positions; for images of another size it is resampled. Networks
    with rotary positions alone have no table."""
    channels: Annotated[int, CHANNELS] = 3
    """Input channels."""
    drop_path: Annotated[float, DECAY] = 0.0
    """Largest stochastic-depth rate, reached linearly at the last block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):  # timm takes addresses and folders as names, too
            raise BadInput(f"{self.name!r} is not the name of an architecture of timm")


EncoderConfig = DyViTConfig | ViTConfig | TimmConfig


ENCODER_PRESETS = tuple(presets(ARCHITECTURES))
ENCODER_NAMES = (*ENCODER_PRESETS, *(f"{key}:NAME" for key, each in ARCHITECTURES.items() if each.by_name))
"""What `--model` and `--preset` take."""
ENCODER_METAVAR = "{" + ",".join(ENCODER_NAMES) + "}"


def encoder_preset(name: str, image_size: int | tuple[int, int] = 224, channels: int = 3) -> EncoderConfig:
    """Returns the encoder called `name`: a preset, or `timm:NAME`.

    Patch and windows of a preset suit images of `image_size` pixels (the side of squares, or height and
    width); networks of timm keep their patch.

    Raises:
        BadInput: no encoder has that name.
    """
    for key, architecture in ARCHITECTURES.items():
        if preset := architecture.presets.get(name):
            config: type[DyViTConfig | ViTConfig] = resolve(architecture.config)
            return config(channels=channels, **config.suited_to(ImageSize.of(image_size)), **preset.settings)
        if architecture.by_name and name.startswith(f"{key}:"):
            return resolve(architecture.by_name)(name.removeprefix(f"{key}:"), channels)
    raise BadInput(f"no model preset {name!r}; there are: {', '.join(ENCODER_NAMES)}")


def decoder_dim(model: EncoderConfig) -> int:
    """Returns the width of the decoder that suits an encoder; 512 is MAE's (He et al. 2021, sec. 4.1)."""
    return 192 if model.num_features <= 256 else 512


def dyvit_preset(name: str, image_size: int | tuple[int, int] = 224, channels: int = 3) -> DyViTConfig:
    """Returns DyViT `tiny`, `small`, `base` or `large`, as `encoder_preset` does."""
    return cast(DyViTConfig, encoder_preset(name, image_size, channels))
