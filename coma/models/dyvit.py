"""DyViT: a hierarchical ViT whose every block looks through several window sizes at once.

Four stages; each halves the map and doubles the channels, so that the last token of a place covers one
mask unit (32 px at patch 4). Tokens are kept unit by unit, nested inside a unit (see `windows`), from the
stem to the last stage: merging is a reshape, and so are most windows. With `group`, each view of an image
is a sequence of its own (see `view_sequences`): no information crosses from one view to another, at any
layer, and units that no view sees are not computed.
Base: 35 M parameters and 5.2 GMACs at 224 px, against 86 M and 17.6 of ViT-B.

What the paper's abstract states (Li et al. 2025, arXiv 2511.05929): hierarchical, dynamic multi-window
self-attention, fewer parameters and FLOPs than ViT. Everything else here is this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch.fx
import torch.nn.functional as F
from einops import rearrange
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from coma.config import DyViTConfig
from coma.config.artifact import ArtifactConfig
from coma.errors import BadInput
from coma.masking.patchify import cover, pad_to_units, unit_grid
from coma.models.attention import DynamicMultiWindowAttention, Layout, WindowGate, stage_layout
from coma.models.blocks import drop_path_rates, run_block
from coma.models.checkpoints import Checkpoint, Tensors
from coma.models.view_sequences import ViewSequences, image_sequences, listed_units
from coma.models.windows import crop, nest, unnest

for _name in (
    *("check_images", "image_sequences", "unit_grid", "pad_to_units", "rearrange"),
    *("nest", "unnest", "crop", "stage_layout"),
):
    torch.fx.wrap(_name)  # one node each in graphs of torch.fx, which reads sizes at every call

FIRST_SIDE = 8
"""Tokens along the edge of a mask unit at the first stage: four stages make it 8, 4, 2, 1."""


class DyViT(nn.Module):
    """Backbone: images to a feature pyramid.

    Any height and width from one mask unit on; what is missing to whole units is padded with zeros (the
    mean colour) at the right and bottom, and cropped from the pyramid.

    Args:
        config: Channels, patch, widths, depths, heads and windows.
    """

    output_fmt = "NHWC"
    artifact: ArtifactConfig
    """Description of the artifact that the model was loaded from; absent on other models."""

    def __init__(self, config: DyViTConfig) -> None:
        super().__init__()
        self.config = config
        self.unit = config.unit
        self.num_features = self.head_hidden_size = config.num_features
        self.strides = config.strides
        self.grad_checkpointing = False

        ends = list(accumulate(config.depths))
        rates = drop_path_rates(config.drop_path, ends[-1])
        self.stem = Stem(config.channels, config.dim, config.patch)
        self.stages = nn.ModuleList(
            Stage(
                dim=config.dim * 2**i,
                heads=config.heads[i],
                windows=config.windows[i],
                whole=_whole_map_blocks(config, i),
                side=FIRST_SIDE >> i,
                mlp_ratio=config.mlp_ratio,
                drop_path=rates[end - depth : end],
                merge=i > 0,
            )
            for i, (depth, end) in enumerate(zip(config.depths, ends, strict=True))
        )
        self.norm = nn.LayerNorm(config.num_features)
        self.feature_info = [
            {"num_chs": config.dim * 2**i, "reduction": stride, "module": f"stages.{i}"}
            for i, stride in enumerate(self.strides)
        ]
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, DynamicMultiWindowAttention) and module.gate is not None:
                nn.init.zeros_(module.gate.out.weight)  # equal weights to begin with

    def forward(self, images: Tensor, group: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns the feature pyramid.

        Args:
            images: `[b, c, H, W]`, normalised.
            group: View of every mask unit, int64 `[b, h, w]` with h, w = H, W over the unit, rounded up;
                -1 for units that no view sees. None is ordinary inference.

        Returns:
            Four maps `[b, c_i, ceil(H/s_i), ceil(W/s_i)]`, finest first; the last one is normalised. Zeros
            where the group is -1.

        Raises:
            BadInput: wrong number of channels, image smaller than a mask unit, or a group map that does
                not fit the image.
        """
        height, width = images.shape[-2:]
        sequences, tokens = self._run(images, group)
        tokens[-1] = self.norm(tokens[-1])
        maps = _maps(sequences, tokens)
        return tuple(
            rearrange(crop(x, cover(height, stride), cover(width, stride)), "b h w c -> b c h w")
            for x, stride in zip(maps, self.strides, strict=True)
        )

    pyramid = forward
    """The pyramid, also of a classifier, whose own `forward` returns logits."""

    def parts(self) -> list[nn.Module]:
        """Returns the stem and the stages, which can be frozen in this order."""
        return [self.stem, *self.stages]

    def window_gates(self) -> list[tuple[int, WindowGate]]:
        """Returns the gates of DM-MSA, each with the number of its stage, 1 to 4."""
        return [
            (number, module)
            for number, stage in enumerate(self.stages, start=1)
            for module in stage.modules()
            if isinstance(module, WindowGate)
        ]

    def forward_features(
        self, images: Tensor, group: Tensor | None = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """Returns the last map, normalised: one feature vector per mask unit.

        Args:
            images: `[b, c, H, W]`, normalised.
            group: View of every unit, int64 `[b, h, w]`; -1 for units that no view sees.
            sizes: Units in each view, the same in every sample; see `image_sequences`.

        Returns:
            `[b, h, w, c]`, zeros where the group is -1.
        """
        sequences, tokens = self._run(images, group, sizes)
        units = sequences.scatter(self.norm(tokens[-1]))
        return unnest(units, 1, sequences.rows, sequences.cols)

    def forward_listed(self, images: Tensor, listed: Tensor) -> Tensor:
        """Returns the features of some units, from these alone: nothing else is computed.

        Args:
            images: `[b, c, H, W]`, normalised.
            listed: Numbers of the units, row by row, each at most once: int64 `[b, s]`.

        Returns:
            `[b, s, c]`, in the order of the list.
        """
        check_images(images, None, self.config.channels, self.unit)
        sequences = listed_units(*unit_grid(images.shape[-2], images.shape[-1], self.unit), listed)
        return self.norm(self._tokens(images, sequences)[-1]).flatten(1, 2)

    def pool(self, images: Tensor) -> Tensor:
        """Mean of the last map, `[b, c]`: what linear and nearest-neighbour classifiers work on."""
        return self.forward_features(images).mean(dim=(1, 2))

    def stage_maps(self, images: Tensor, group: Tensor | None = None, stages: int = 4) -> list[Tensor]:
        """Outputs of the first `stages` stages, `[b, h_i, w_i, c_i]`, on the padded grid."""
        return _maps(*self._run(images, group, stages=stages))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed beyond vectors and biases: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise decay: stem, every block (coarse: every stage), norm."""
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.merge", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def from_checkpoint(self, tensors: Tensors) -> Checkpoint:
        """Returns the tensors by the names of this encoder's: nobody else has published any."""
        return Checkpoint(tensors)

    def _run(
        self, images: Tensor, group: Tensor | None, sizes: Sequence[int] | None = None, stages: int = 4
    ) -> tuple[ViewSequences, list[Tensor]]:
        check_images(images, group, self.config.channels, self.unit)
        rows, cols = unit_grid(images.shape[-2], images.shape[-1], self.unit)
        sequences = image_sequences(rows, cols, group, sizes)
        return sequences, self._tokens(images, sequences, stages)

    def _tokens(self, images: Tensor, sequences: ViewSequences, stages: int = 4) -> list[Tensor]:
        # n s t c after each stage
        x = self.stem(pad_to_units(images, self.unit), sequences)
        tokens = []
        for stage in self.stages[:stages]:
            x = stage(x, sequences, self.grad_checkpointing and self.training)
            tokens.append(x)
        return tokens


def _whole_map_blocks(config: DyViTConfig, stage: int) -> frozenset[int]:
    """Blocks of a stage that `config.global_blocks` lets attend to the whole map."""
    depth, count = config.depths[stage], config.global_blocks
    if stage == 3 and count:
        return frozenset(range(depth))
    return frozenset((i + 1) * depth // count - 1 for i in range(count)) if stage == 2 else frozenset()


class Stem(nn.Module):
    """Images to tokens: a non-overlapping convolution and a norm, `[b, c, H, W]` -> `[n, s, t, dim]`.

    Only what some view sees is embedded, straight into nested order: patches are dealt out as pixels, and
    the convolution becomes one product.
    """

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor, sequences: ViewSequences) -> Tensor:
        """Embed the patches of every sequence."""
        p, q = self.conv.kernel_size
        patches = rearrange(images, "b c (h p) (w q) -> b h w c p q", p=p, q=q)
        patches = sequences.gather(nest(patches, FIRST_SIDE).flatten(3))
        return self.norm(F.linear(patches, self.conv.weight.flatten(1), self.conv.bias))


class Merge(nn.Module):
    """Halve the map: 2x2 tokens side by side, norm, linear; `[n, s, t, c]` -> `[n, s, t/4, 2c]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * dim)
        self.linear = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge."""
        return self.linear(self.norm(x.unflatten(2, (-1, 4)).flatten(3)))


class Stage(nn.Module):
    """Blocks at one resolution, after a merge except in the first stage."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        windows: tuple[int, ...],
        whole: frozenset[int],
        side: int,
        mlp_ratio: float,
        drop_path: list[float],
        merge: bool,
    ) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.windows = windows
        self.whole = whole  # blocks that attend to the whole map, whatever the windows
        self.side = side  # tokens along the edge of a mask unit
        self.merge = Merge(dim) if merge else nn.Identity()
        self.blocks = nn.ModuleList(Block(dim, heads, len(windows), mlp_ratio, rate) for rate in drop_path)

    def forward(self, x: Tensor, sequences: ViewSequences, recompute: bool) -> Tensor:
        """`[n, s, t, c]` -> `[n, s, t/4, 2c]` (first stage: same size)."""
        x = self.merge(x)
        windowed, whole = (
            stage_layout(sequences, windows, self.head_dim, self.side, x) if needed else None
            for windows, needed in (
                (self.windows, len(self.whole) < len(self.blocks)),
                ((0,) * len(self.windows), self.whole),
            )
        )
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, whole if i in self.whole else windowed, recompute=recompute)
        return x


class Block(nn.Module):
    """Pre-norm transformer block with DM-MSA, `[n, s, t, c]` -> `[n, s, t, c]`."""

    def __init__(self, dim: int, heads: int, windows: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = DynamicMultiWindowAttention(dim, heads, windows)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Attend, then transform every token."""
        x = x + self.drop_path(self.attn(self.norm1(x), layout))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _maps(sequences: ViewSequences, tokens: list[Tensor]) -> list[Tensor]:
    # tokens after each stage to maps, b h w c
    return [
        unnest(sequences.scatter(x), FIRST_SIDE >> i, sequences.rows, sequences.cols)
        for i, x in enumerate(tokens)
    ]


def check_images(images: Tensor, group: Tensor | None, channels: int, unit: int) -> None:
    """Refuse images and group maps that the encoder cannot take.

    Raises:
        BadInput: wrong rank or number of channels, image smaller than a unit, group map of another grid.
    """
    if images.ndim != 4 or images.shape[1] != channels:
        raise BadInput(f"images {tuple(images.shape)}: the encoder takes [batch, {channels}, height, width]")
    height, width = images.shape[-2:]
    if height < unit or width < unit:
        raise BadInput(f"image of {height} x {width} px is smaller than a mask unit of {unit} x {unit} px")
    if group is not None:
        expected = (images.shape[0], *unit_grid(height, width, unit))
        if tuple(group.shape) != expected:
            raise BadInput(f"group map {tuple(group.shape)} does not fit images of {expected} units")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
