"""Two position embeddings that need no learned table and fit any map size, and resampling for those that do.

Rotary (RoFormer, Su et al. 2021, arXiv 2104.09864, sec. 3.2.2) along both axes for DyViT: half of a
head's channels rotate with the row, half with the column, so scores depend on offsets only.
Sin-cos (Transformer, Vaswani et al. 2017, sec. 3.5; in 2-D as in MAE's appendix A.1) for the plain ViT
and the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROTARY_BASE = (
    100.0  # wavelengths from 2 pi to about 600 tokens: maps are tens of tokens wide, texts thousands
)


def rotary_table(places: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each `[..., dim]`, to rotate queries and keys with.

    Args:
        places: Row and column of every token, `[..., 2]`.
        dim: Channels of one head, a multiple of 4.
        dtype: Type of the result; angles are computed in float32.
    """
    exponents = torch.arange(dim // 4, device=places.device, dtype=torch.float32) / (dim // 4)
    angles = (places[..., None].float() * _ROTARY_BASE**-exponents).flatten(-2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the channel pairs (i, i + dim/2) of `[..., dim]` by the table's angles."""
    cos, signed_sin = table
    first, second = x.chunk(2, dim=-1)  # torch 2.11 compiles no backward of roll on CPUs
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), signed_sin)


def sincos_positions(h: int, w: int, dim: int, *, device: torch.device) -> Tensor:
    """Fixed 2-D sin-cos positions `[h, w, dim]` (float32); `dim` is a multiple of 4."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    rows = torch.arange(h, device=device, dtype=torch.float32)[:, None, None] * frequencies
    cols = torch.arange(w, device=device, dtype=torch.float32)[None, :, None] * frequencies
    parts = [cols.sin(), cols.cos(), rows.sin(), rows.cos()]
    return torch.cat([part.expand(h, w, -1) for part in parts], dim=-1)


def cubic_weights(old: int, new: int, *, device: torch.device) -> Tensor:
    """Returns the weights `[new, old]` of antialiased bicubic resampling along one axis (float32).

    Two products with such matrices equal `F.interpolate(mode="bicubic", antialias=True)`, for graphs: few
    runtimes resample with antialiasing.
    """
    scale = old / torch.full((), new, dtype=torch.float32, device=device)  # a tensor: `new` may be a symbol
    centres = (torch.arange(new, device=device) + 0.5) * scale
    places = torch.arange(old, device=device) + 0.5
    x = (places - centres[:, None]).abs() / scale.clamp(min=1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return weights / weights.sum(dim=1, keepdim=True)
