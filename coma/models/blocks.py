"""Helpers for stacks of transformer blocks, shared by all encoders."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, *context: Any, recompute: bool) -> Tensor:
    """`block(x, *context)`; with `recompute`, activations are not kept but computed again backwards."""
    if not recompute:
        return block(x, *context)
    return cast(Tensor, checkpoint(block, x, *context, use_reentrant=False))


def drop_path_rates(largest: float, blocks: int) -> list[float]:
    """Stochastic-depth rates that rise linearly from 0 to `largest` (Huang et al. 2016, sec. 3)."""
    return [largest * i / max(blocks - 1, 1) for i in range(blocks)]
