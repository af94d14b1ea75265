"""DM-MSA: dynamic multi-window self-attention.

The heads of a layer are split over several window sizes; each set of heads attends inside windows of its
own size; the results are weighted per channel, by weights that depend on the image, before the output
projection. That CoMA's encoder uses "dynamic multi-window self-attention" is stated in the paper's
abstract (Li et al. 2025, arXiv 2511.05929); how it is built here is this project's own, near to DW-ViT
(Ren et al. 2022, arXiv 2203.12856). No shift, no bias table: positions are rotary.

Tokens are `[n, s, t, c]`: n sequences (see `view_sequences`) of s units of t tokens in nested order (see
`windows`). Windows inside a unit and windows over the whole sequence are then views. The former take no mask;
the latter take none where all views are of one size, else one row that leaves out the slots without a unit.
Only windows that cross units without covering them all go through a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.fx
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from coma.masking.patchify import spread
from coma.models.position_embeddings import rotary_table, rotate
from coma.models.view_sequences import ViewSequences, has_known_size, is_exporting
from coma.models.windows import (
    MASKED,
    fit,
    merge,
    needs_padding,
    nest,
    nested_places,
    same_group_bias,
    split,
    unnest,
)

for _name in ("rearrange", "pool_outputs", "concat_weighted"):
    torch.fx.wrap(_name)  # one node each in graphs of torch.fx

Rotary = tuple[Tensor, Tensor]

_MOST_WINDOWS = 65_535
"""Windows of one call: some CUDA kernels start a block for each along a grid axis that ends here."""


@dataclass(frozen=True)
class Consecutive:
    """Windows that are runs of consecutive tokens: inside a unit, or the whole sequence.

    Attributes:
        length: Tokens of a window; a whole sequence where it equals s*t.
        bias: `[n, 1, 1, s*t]` to add to the scores, where not all slots are real.
    """

    length: int
    bias: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
        """Three of `[n, s, t, heads, d]` to `[n, s, t, heads*d]`."""
        n, s, t, heads, d = q.shape
        q, k, v = (x.reshape(-1, self.length, heads, d).transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product(q, k, v, self.bias, fused=fused)
        return out.transpose(1, 2).reshape(n, s, t, heads * d)


@dataclass(frozen=True)
class Crossing:
    """Windows that hold tokens of several units, but not all: cut from the map of the image.

    Attributes:
        sequences: Where the units lie.
        side: Tokens along the edge of a unit.
        window: Sides of a window in tokens.
        bias: `[b*windows, 1, m, m]` to add to the scores of a window's m tokens, where some are forbidden.
    """

    sequences: ViewSequences
    side: int
    window: tuple[int, int]
    bias: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
        """Three of `[n, s, t, heads, d]` to `[n, s, t, heads*d]`."""
        rows, cols = self.sequences.rows, self.sequences.cols
        maps = (unnest(self.sequences.scatter(x), self.side, rows, cols) for x in (q, k, v))
        q, k, v = (split(x, self.window).transpose(1, 2) for x in maps)  # windows heads m d
        out = scaled_dot_product(q, k, v, self.bias, fused=fused)
        out = merge(out.transpose(1, 2).flatten(2), self.window, rows * self.side, cols * self.side)
        return self.sequences.gather(nest(out, self.side))


class Windows(Protocol):
    """One set of windows, and how the heads that look through it attend."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
        """Three of `[n, s, t, heads, d]` to `[n, s, t, heads*d]`."""
        ...


@dataclass(frozen=True)
class Layout:
    """All that the blocks of one stage share about one batch: computed once, used by every block.

    Attributes:
        sequences: Where the units lie.
        windows: One for every set of heads, which are equally large.
        rotary: Cosines and signed sines of every token's place, `[(n or 1, s,) t, 1, 1, head_dim]`. Scores
            depend on offsets only: one table serves all windows, and places inside the unit do where all
            windows lie inside units.
    """

    sequences: ViewSequences
    windows: tuple[Windows, ...]
    rotary: Rotary

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> list[Tensor]:
        """Three of `[n, s, t, heads, d]` to the output of every set of heads, `[n, s, t, its channels]`."""
        shares = zip(*(part.chunk(len(self.windows), dim=3) for part in (q, k, v)), strict=True)
        return [
            window.attend(*share, fused=fused) for window, share in zip(self.windows, shares, strict=True)
        ]


@dataclass(frozen=True)
class Pieces:
    """The exchangeable pieces of DM-MSA; `window_variants` has others that compute the same.

    Attributes:
        arrange: Rewrites the windows of a stage, given its tokens `[n, s, t, c]` and its number of heads.
        turn: Rotates queries and keys by a table of places.
        join: Joins window outputs under their gate: outputs, gate and sequences to `[n, s, t, c]`.
    """

    arrange: Callable[[tuple[Windows, ...], Tensor, int], tuple[Windows, ...]]
    turn: Callable[[Tensor, Rotary], Tensor]
    join: Callable[[Sequence[Tensor], WindowGate, ViewSequences], Tensor]


def stage_layout(
    sequences: ViewSequences, windows: Sequence[int], head_dim: int, side: int, like: Tensor
) -> Layout:
    """Returns the layout of a stage.

    Args:
        sequences: Where the units lie.
        windows: Window sides in tokens; 0 is global.
        head_dim: Channels of one head.
        side: Tokens along the edge of a mask unit at this stage, a power of two.
        like: The tokens `[n, s, t, c]`, for their shape, device and dtype.
    """
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    h, w = sequences.rows * side, sequences.cols * side
    known = has_known_size(h, w)  # otherwise the graph must do for maps larger and smaller than the window

    def resolve(window: int) -> Consecutive | Crossing:
        if window and side % window == 0:
            return Consecutive(window * window)
        if not window or (known and window >= h and window >= w):
            return Consecutive(like.shape[1] * side * side, _real_bias(sequences, side, dtype))
        sides = fit(window, h, w) if known else (window, window)
        return Crossing(sequences, side, sides, _crossing_bias(sequences, sides, side, like, dtype))

    resolved = {window: resolve(window) for window in set(windows)}
    places = nested_places(side, like.device)  # t 2
    if any(not window or side % window for window in windows):
        lines = (torch.arange(length, device=like.device) for length in (sequences.rows, sequences.cols))
        places = torch.cartesian_prod(*lines)[:, None] * side + places  # rows*cols t 2
    tables = rotary_table(places, head_dim, dtype)
    if places.ndim == 3:
        tables = tuple(sequences.at(table) for table in tables)
    cos, sin = (table[..., None, None, :] for table in tables)  # for the axes (q and k, heads)
    arranged = _pieces.arrange(
        tuple(resolved[window] for window in windows), like, like.shape[-1] // head_dim
    )
    return Layout(sequences, arranged, (cos, sin))


class DynamicMultiWindowAttention(nn.Module):
    """DM-MSA.

    Args:
        dim: Channels in and out.
        heads: Attention heads, shared out equally over the windows.
        windows: How many window sizes there are.
    """

    def __init__(self, dim: int, heads: int, windows: int) -> None:
        super().__init__()
        self.heads = heads
        self.fused_attn = True  # timm's name for it
        self.qkv = nn.Linear(dim, 3 * dim)
        self.gate = WindowGate(dim, windows) if windows > 1 else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Attend: `[n, s, t, c]` -> `[n, s, t, c]`."""
        outputs = layout.attend(*self.project(x, layout), fused=self.fused_attn)
        if self.gate is None:
            return self.proj(outputs[0])
        return self.proj(_pieces.join(outputs, self.gate, layout.sequences))

    def project(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values: `[n, s, t, c]` to three of `[n, s, t, heads, d]`."""
        qk, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).split((2, 1), dim=3)
        q, k = _pieces.turn(qk, layout.rotary).unbind(dim=3)
        return q, k, v.squeeze(3)


class WindowGate(nn.Module):
    """Weight of each window, per channel: a softmax over the windows of an MLP on the pooled output.

    Pooled per sequence, that is per view: anything pooled over all tokens of an image would tell one view
    about the others. The last layer starts at zero, so that all windows start with weight 1.

    Args:
        dim: Channels of the concatenated window outputs.
        windows: How many windows share them.
    """

    def __init__(self, dim: int, windows: int) -> None:
        super().__init__()
        self.windows = windows
        self.hidden = nn.Linear(dim, max(dim // 4, 8))
        self.out = nn.Linear(max(dim // 4, 8), dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled outputs `[..., c]` to weights `[..., c]` that average 1 over the windows."""
        logits = self.out(F.gelu(self.hidden(pooled)))
        weights = rearrange(logits, "... (g c) -> ... g c", g=self.windows).softmax(dim=-2) * self.windows
        return rearrange(weights, "... g c -> ... (g c)").to(logits.dtype)


def join_gated(outputs: Sequence[Tensor], gate: WindowGate, sequences: ViewSequences) -> Tensor:
    """Window outputs side by side, each channel weighted by the gate: `[n, s, t, c]`."""
    return concat_weighted(outputs, gate(pool_outputs(outputs, sequences)))


def pool_outputs(outputs: Sequence[Tensor], sequences: ViewSequences) -> Tensor:
    """Means of window outputs over every sequence, side by side: `[n, 1, 1, c]`."""
    return torch.cat([sequences.mean(each) for each in outputs], dim=-1)


def concat_weighted(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`cat(parts, -1) * weights` for parts `[n, s, t, c_i]` and weights `[n, 1, 1, c]`, in one pass."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a compiler fuses the two
        return torch.cat(list(parts), dim=-1) * weights
    return _ConcatWeighted.apply(weights, *parts)


class _ConcatWeighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *parts)
        out = weights.new_empty(*parts[0].shape[:-1], weights.shape[-1])
        widths = [part.shape[-1] for part in parts]
        for part, weight, into in zip(parts, weights.split(widths, -1), out.split(widths, -1), strict=True):
            torch.mul(part, weight, out=into)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        weights, *parts = ctx.saved_tensors
        widths = [part.shape[-1] for part in parts]
        grads = grad_outputs[0].split(widths, -1)
        of_weights = [(g * part).sum(dim=(1, 2), keepdim=True) for g, part in zip(grads, parts, strict=True)]
        of_parts = (g * weight for g, weight in zip(grads, weights.split(widths, -1), strict=True))
        return torch.cat(of_weights, dim=-1), *of_parts


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, fused: bool) -> Tensor:
    """Attention of any number of windows: three of `[windows, heads, m, d]` to the same shape.

    `fused` in one kernel of torch's; otherwise, and in exported graphs, as two products and a softmax.
    """
    if not fused or is_exporting():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(dim=-1) @ v
    if q.shape[0] <= _MOST_WINDOWS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    parts = [x.split(_MOST_WINDOWS) for x in (q, k, v)]
    biases = [None] * len(parts[0]) if bias is None else bias.split(_MOST_WINDOWS)
    return torch.cat(
        [
            F.scaled_dot_product_attention(*each, attn_mask=part)
            for *each, part in zip(*parts, biases, strict=True)
        ]
    )


def _real_bias(sequences: ViewSequences, side: int, dtype: torch.dtype) -> Tensor | None:
    if sequences.real is None:
        return None
    forbidden = (~sequences.real).to(dtype) * MASKED
    return forbidden.repeat_interleave(side * side, dim=1)[:, None, None]


def _crossing_bias(
    sequences: ViewSequences, window: tuple[int, int], side: int, like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    group, rows, cols = sequences.group, sequences.rows, sequences.cols
    if group is None:
        h, w = rows * side, cols * side
        if has_known_size(h, w) and not needs_padding(window, h, w):
            return None
        group = like.new_zeros((like.shape[0], rows, cols), dtype=torch.int64)
    return same_group_bias(spread(group, side), window, dtype)


REFERENCE = Pieces(
    arrange=lambda windows, like, heads: windows, turn=lambda x, table: rotate(x, table), join=join_gated
)
_pieces = REFERENCE
"""In use; `window_variants.attention_variant` exchanges them for a while."""
