"""DM-MSA: dynamic multi-window self-attention.

The heads of a layer are split over several window sizes; each set of heads attends inside windows of its
own size; the results are weighted per channel, by weights that depend on the image, before the output
projection. That CoMA's encoder uses "dynamic multi-window self-attention" is stated in the paper's
abstract (Li et al. 2025, arXiv 2511.05929); how it is built here is this project's own, near to DW-ViT
(Ren et al. 2022, arXiv 2203.12856). No shift, no bias table: positions are rotary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.masking.units import spread
from pretrain.models.positions import rotary_table, rotate
from pretrain.models.windows import fit, merge, needs_padding, same_group_bias, split


@dataclass(frozen=True)
class Layout:
    """All that the blocks of one stage share about one batch: computed once, used by every block."""

    windows: tuple[tuple[int, int], ...]
    """Sides of each window on this map."""
    rotary: tuple[Tensor, Tensor]
    """Cosines and signed sines, `[h, w, 1, 1, head_dim]`."""
    biases: tuple[Tensor | None, ...]
    """Per window: `[b*rows*cols, 1, n, n]` to add to the scores, or None where nothing is forbidden."""
    same_view: Tensor | None
    """`[b, units, units]`: rows average over the units of the same view; None: one view, the whole map."""
    side: int
    """Tokens along the edge of a mask unit."""


def stage_layout(
    size: tuple[int, int],
    windows: tuple[int, ...],
    head_dim: int,
    side: int,
    group: Tensor | None,
    like: Tensor,
) -> Layout:
    """The layout of a stage.

    Args:
        size: Rows and columns of the token map; whole units.
        windows: Window sides in tokens; 0 is global.
        head_dim: Channels of one head.
        side: Tokens along the edge of a mask unit at this stage.
        group: View of every unit, int64 `[b, h, w]`, or None for ordinary inference.
        like: The token map, for its device, dtype and batch.
    """
    h, w = size
    dtype = (
        torch.get_autocast_dtype(like.device.type)
        if torch.is_autocast_enabled(like.device.type)
        else like.dtype
    )
    fitted = tuple(fit(window, h, w) for window in windows)
    tokens = None if group is None else spread(group, side)
    biases: dict[tuple[int, int], Tensor | None] = {}
    for window in fitted:
        if window in biases:
            continue
        padded = needs_padding(window, h, w)
        crosses_units = tokens is not None and (side % window[0] != 0 or side % window[1] != 0)
        if padded or crosses_units:
            whole = like.new_zeros((like.shape[0], h, w), dtype=torch.int64) if tokens is None else tokens
            biases[window] = same_group_bias(whole, window, dtype)
        else:
            biases[window] = None
    return Layout(
        windows=fitted,
        rotary=rotary_table(h, w, head_dim, device=like.device, dtype=dtype),
        biases=tuple(biases[window] for window in fitted),
        same_view=None if group is None else _same_view(group),
        side=side,
    )


class DynamicMultiWindowAttention(nn.Module):
    """DM-MSA over a token map.

    Args:
        dim: Channels in and out.
        heads: Attention heads, shared out equally over the windows.
        windows: How many window sizes there are.
    """

    def __init__(self, dim: int, heads: int, windows: int) -> None:
        super().__init__()
        self.heads = heads
        self.windows = windows
        self.qkv = nn.Linear(dim, 3 * dim)
        self.gate = WindowGate(dim, windows) if windows > 1 else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Attend: `[b, h, w, c]` -> `[b, h, w, c]`."""
        qkv = rearrange(
            self.qkv(x), "b h w (parts heads d) -> b h w parts heads d", parts=3, heads=self.heads
        )
        q, k = rotate(qkv[:, :, :, :2], layout.rotary).unbind(dim=3)
        parts = zip(*(part.chunk(self.windows, dim=3) for part in (q, k, qkv[:, :, :, 2])), strict=True)
        outputs = [
            _attend(q, k, v, window, bias)
            for (q, k, v), window, bias in zip(parts, layout.windows, layout.biases, strict=True)
        ]
        out = torch.cat(outputs, dim=-1)
        if self.gate is not None:
            out = out * self.gate(out, layout)
        return self.proj(out)


class WindowGate(nn.Module):
    """How much each window counts, per channel: a softmax over the windows of an MLP on the pooled output.

    Pooled per view, never over the map: anything pooled over all tokens would tell one view about the
    others. The last layer starts at zero, so that all windows start with weight 1.

    Args:
        dim: Channels of the concatenated window outputs.
        windows: How many windows share them.
    """

    def __init__(self, dim: int, windows: int) -> None:
        super().__init__()
        self.windows = windows
        self.hidden = nn.Linear(dim, max(dim // 4, 8))
        self.out = nn.Linear(max(dim // 4, 8), dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Weights that average 1 over the windows, to be multiplied with `x [b, h, w, c]`."""
        if layout.same_view is None:
            return self.weigh(x.mean(dim=(1, 2), keepdim=True))
        b, h, w, c = x.shape
        rows, cols = h // layout.side, w // layout.side
        units = x.view(b, rows, layout.side, cols, layout.side, c).mean(dim=(2, 4)).flatten(1, 2)
        views = layout.same_view.to(units.dtype) @ units  # b units c: each unit gets the mean of its view
        return spread(self.weigh(views).view(b, rows, cols, c), layout.side)

    def weigh(self, pooled: Tensor) -> Tensor:
        """Pooled outputs `[..., c]` to weights `[..., c]`."""
        logits = self.out(F.gelu(self.hidden(pooled)))
        weights = rearrange(logits, "... (g c) -> ... g c", g=self.windows).softmax(dim=-2) * self.windows
        return rearrange(weights, "... g c -> ... (g c)").to(logits.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], bias: Tensor | None) -> Tensor:
    # three of b h w heads d -> b h w (heads d)
    h, w = q.shape[1:3]
    q, k, v = (split(part, window).transpose(1, 2) for part in (q, k, v))  # n heads tokens d
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return merge(rearrange(out, "n heads tokens d -> n tokens (heads d)"), window, h, w)


def _same_view(group: Tensor) -> Tensor:
    flat = group.flatten(1)
    same = (flat[:, :, None] == flat[:, None, :]).float()
    return same / same.sum(dim=-1, keepdim=True)
