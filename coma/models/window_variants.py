"""Other ways to compute DM-MSA: the same results by other kernels, to be timed on a GPU.

Small windows are what DM-MSA asks of a GPU and fused attention is not made for: its kernels work on tiles of
64 to 128 tokens, and a window of 2 x 2 or 4 x 4 tokens fills 3 or 12 % of one. `attention_variant` exchanges
pieces of every DM-MSA for a while; each entry of `VARIANTS` answers one finding of a profile:

    products     windows of at most 64 tokens by two batched products and a softmax
    elementwise  windows of at most 16 tokens by broadcast products and sums, which torch.compile fuses
    merged       one fused call for all heads of a layer: windows become blocks of one mask
    flex         the same by FlexAttention, which stores no mask and skips empty blocks
    varlen       whole views by flash attention for sequences of unequal length, in place of a mask
    rotary       rotary positions in five passes over queries and keys in place of seven
    pieces       rotary positions and gates each compiled into one kernel

Names joined by "+" apply one after the other, as in "merged+rotary". `test_window_variants.py` compares all
of them with the reference; `benchmarks/gpu.py` times them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from coma.models import attention
from coma.models.attention import (
    REFERENCE,
    Consecutive,
    Pieces,
    Rotary,
    Windows,
    join_gated,
    scaled_dot_product,
)
from coma.models.position_embeddings import rotate
from coma.models.windows import MASKED

BACKEND = "inductor"
"""Backend of torch.compile for small pieces and FlexAttention."""

_TILE = 128
"""Tokens that one tile of a fused kernel takes at most: merged windows are not made longer."""


@contextmanager
def attention_variant(name: str) -> Iterator[None]:
    """Inside, every DM-MSA computes by the named variants; "reference" changes nothing."""
    pieces = REFERENCE
    for part in name.split("+"):
        pieces = VARIANTS[part](pieces)
    before, attention._pieces = attention._pieces, pieces
    try:
        yield
    finally:
        attention._pieces = before


@dataclass(frozen=True)
class Products(Consecutive):
    """Windows by two batched products and a softmax, whatever `fused` says."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
        """Three of `[n, s, t, heads, d]` to `[n, s, t, heads*d]`."""
        return super().attend(q, k, v, fused=False)


@dataclass(frozen=True)
class Elementwise(Consecutive):
    """Windows by broadcast products and sums: no matrix product, so a compiler can fuse all of it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
        """Three of `[n, s, t, heads, d]` to `[n, s, t, heads*d]`."""
        n, s, t, heads, d = q.shape
        q, k, v = (x.reshape(-1, self.length, heads, d) for x in (q, k, v))  # w m heads d
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = (q[:, :, None] * k[:, None]).sum(dim=-1, dtype=exact) * d**-0.5  # w m m heads
        weights = scores.softmax(dim=2).to(v.dtype)
        out = (weights[..., None] * v[:, None]).sum(dim=2)
        return out.reshape(n, s, t, heads * d)


@dataclass(frozen=True)
class Flex:
    """All windows of a layer by one call of FlexAttention.

    Attributes:
        mask: Its `BlockMask`.
    """

    mask: Any

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
        """Three of `[n, s, t, heads, d]` to `[n, s, t, heads*d]`."""
        n, s, t, heads, d = q.shape
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # n heads s*t d
        out = flex_attention_of(q.is_cuda)(q, k, v, block_mask=self.mask)
        return out.transpose(1, 2).reshape(n, s, t, heads * d)


def allowed_pairs(
    lengths: tuple[int, ...], real: Tensor | None, tokens: int, device: torch.device
) -> Callable[..., Tensor]:
    """Returns whether a head of a sequence lets one token attend to another, as FlexAttention asks for it.

    Args:
        lengths: Tokens of the window of every head.
        real: Slots that hold a unit of their view, bool `[n, s]`; None: all of them.
        tokens: Tokens of a unit.
        device: Device of the tokens.
    """
    length = torch.cat([torch.full((1,), each, device=device) for each in lengths])

    def same_window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i // length[h] == j // length[h]

    if real is None:
        return same_window

    def same_window_and_real(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return same_window(b, h, i, j) & (real[b, j // tokens] | ~real[b, i // tokens])

    return same_window_and_real


@dataclass(frozen=True)
class Varlen:
    """Whole views as sequences of unequal length: slots without a unit become sequences of their own.

    Attributes:
        real: Slots that hold a unit of their view, bool `[n, s]`; the others come last.
    """

    real: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
        """Three of `[n, s, t, heads, d]` to `[n, s, t, heads*d]`."""
        n, s, t, heads, d = q.shape
        q, k, v = (x.reshape(n * s * t, heads, d) for x in (q, k, v))
        starts = torch.arange(n + 1, device=q.device) * (s * t)
        ends = starts[:-1] + self.real.sum(dim=1) * t
        bounds = torch.cat([torch.stack([starts[:-1], ends], dim=1).flatten(), starts[-1:]]).int()
        return varlen_attention(q, k, v, bounds, s * t).reshape(n, s, t, heads * d)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Attention within the stretches that `bounds` cut: three of `[tokens, heads, d]` to the same shape."""
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest)
        return out
    parts = []
    for start, end in pairwise(bounds.tolist()):
        one, other, values = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(scaled_dot_product(one, other, values, None, fused=False)[0].transpose(0, 1))
    return torch.cat(parts)


def _small(kind: type[Consecutive], longest: int) -> Callable[[Pieces], Pieces]:
    """Returns a variant that lets `kind` take the windows of at most `longest` tokens."""

    def arrange(windows: tuple[Windows, ...], like: Tensor, heads: int) -> tuple[Windows, ...]:
        return tuple(
            kind(each.length)
            if isinstance(each, Consecutive) and each.bias is None and each.length <= longest
            else each
            for each in windows
        )

    return lambda pieces: replace(pieces, arrange=_after(pieces, arrange))


def _merged(pieces: Pieces) -> Pieces:
    def arrange(windows: tuple[Windows, ...], like: Tensor, heads: int) -> tuple[Windows, ...]:
        found = _lengths(windows, heads)
        tokens = like.shape[1] * like.shape[2]
        run = run_length(found[0], tokens) if found else None
        if not found or run is None:
            return windows
        lengths, real = found
        bias = blocks_bias(lengths, run, like.device, torch.float32 if real is None else real.dtype)
        if real is not None:
            bias = bias + real  # n heads run run
        elif torch.is_autocast_enabled(like.device.type):
            bias = bias.to(torch.get_autocast_dtype(like.device.type))
        else:
            bias = bias.to(like.dtype)
        return (Consecutive(run, bias.expand(len(like) * tokens // run, -1, -1, -1)),)

    return replace(pieces, arrange=_after(pieces, arrange))


def _flex(pieces: Pieces) -> Pieces:
    def arrange(windows: tuple[Windows, ...], like: Tensor, heads: int) -> tuple[Windows, ...]:
        found = _lengths(windows, heads)
        if not found:
            return windows
        from torch.nn.attention.flex_attention import create_block_mask

        lengths, bias = found
        n, s, t = like.shape[:3]
        real = None if bias is None else bias[:, 0, 0, ::t] == 0
        pairs = allowed_pairs(lengths, real, t, like.device)
        batch = None if real is None else n
        return (Flex(create_block_mask(pairs, batch, heads, s * t, s * t, device=like.device.type)),)

    return replace(pieces, arrange=_after(pieces, arrange))


def _varlen(pieces: Pieces) -> Pieces:
    def arrange(windows: tuple[Windows, ...], like: Tensor, heads: int) -> tuple[Windows, ...]:
        return tuple(
            Varlen(each.bias[:, 0, 0, :: like.shape[2]] == 0)
            if type(each) is Consecutive and each.bias is not None and each.bias.shape[2] == 1
            else each
            for each in windows
        )

    return replace(pieces, arrange=_after(pieces, arrange))


def _after(pieces: Pieces, arrange: Callable[..., tuple[Windows, ...]]) -> Callable[..., tuple[Windows, ...]]:
    return lambda windows, like, heads: arrange(pieces.arrange(windows, like, heads), like, heads)


def _lengths(windows: tuple[Windows, ...], heads: int) -> tuple[tuple[int, ...], Tensor | None] | None:
    """Window length of every head, and the bias of slots without a unit; None where windows cross units."""
    runs = [each for each in windows if type(each) is Consecutive]
    if len(runs) < len(windows) or len(windows) == 1:
        return None
    lengths = tuple(each.length for each in runs for _ in range(heads // len(runs)))
    return lengths, next((each.bias for each in runs if each.bias is not None), None)


def run_length(lengths: tuple[int, ...], tokens: int) -> int | None:
    """Tokens of the runs that windows of these lengths are merged into, a divisor of `tokens`.

    A run holds whole windows of every length and fills a tile as far as it can; None where a window is
    longer than two tiles, since blocks of a mask would then waste more than small windows do.
    """
    longest = max(lengths)
    if longest > 2 * _TILE:
        return None
    fitting = (run for run in range(longest, _TILE + 1, longest) if tokens % run == 0)
    return max(fitting, default=longest)


def blocks_bias(lengths: tuple[int, ...], run: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[1, heads, run, run]` to add to scores: 0 within a window of the head's length, `MASKED` elsewhere."""
    place = torch.arange(run, device=device)
    window = torch.stack([place // length for length in lengths])
    same = window[:, :, None] == window[:, None, :]
    return torch.zeros(same.shape, dtype=dtype, device=device).masked_fill_(~same, MASKED)[None]


class _Rotation(torch.autograd.Function):
    """`rotate`, written in place as far as possible; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return _rotated(x, cos, signed_sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        return _rotated(grad_outputs[0], cos, -signed_sin), None, None


def _rotated(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    out = x * cos
    half = x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], signed_sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], signed_sin[..., half:])
    return out


def _turn_in_place(x: Tensor, table: Rotary) -> Tensor:
    return _Rotation.apply(x, *table)  # type: ignore[return-value]


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False, backend=BACKEND)


def flex_attention_of(gpu: bool) -> Callable[..., Any]:
    """FlexAttention, compiled where it is a kernel: on a GPU, and not inside a larger graph."""
    from torch.nn.attention.flex_attention import flex_attention

    return _compiled(flex_attention) if gpu and not torch.compiler.is_compiling() else flex_attention


def _pieces_compiled(pieces: Pieces) -> Pieces:
    def turn(x: Tensor, table: Rotary) -> Tensor:
        return (rotate if torch.compiler.is_compiling() else _compiled(rotate))(x, table)

    def join(outputs: Any, gate: Any, sequences: Any) -> Tensor:
        function = join_gated if torch.compiler.is_compiling() else _compiled(join_gated)
        return function(tuple(outputs), gate, sequences)

    return replace(pieces, turn=turn, join=join)


VARIANTS: dict[str, Callable[[Pieces], Pieces]] = {
    "reference": lambda pieces: pieces,
    "products": _small(Products, 64),
    "elementwise": _small(Elementwise, 16),
    "merged": _merged,
    "flex": _flex,
    "varlen": _varlen,
    "rotary": lambda pieces: replace(pieces, turn=_turn_in_place),
    "pieces": _pieces_compiled,
}
