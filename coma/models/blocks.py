"""Helpers for stacks of transformer blocks, shared by all encoders."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coma.errors import BadInput


def run_block(block: nn.Module, x: Tensor, *context: Any, recompute: bool) -> Tensor:
    """`block(x, *context)`; with `recompute`, activations are not kept but computed again backwards."""
    if not recompute:
        return block(x, *context)
    return cast(Tensor, checkpoint(block, x, *context, use_reentrant=False))


def drop_path_rates(largest: float, blocks: int) -> list[float]:
    """Stochastic-depth rates that rise linearly from 0 to `largest` (Huang et al. 2016, sec. 3)."""
    return [largest * i / max(blocks - 1, 1) for i in range(blocks)]


def freeze_stages(encoder: Any, stages: int) -> list[nn.Module]:
    """Freezes the stem and the first stages of an encoder or classifier (of a plain ViT, the first blocks).

    0 freezes the stem with tokens and positions; all stages include the last norm; -1 freezes nothing.

    Returns:
        The frozen modules, which have to stay in evaluation mode.

    Raises:
        BadInput: the encoder does not have so many stages.
    """
    parts: list[nn.Module] = encoder.parts()
    if not -1 <= stages < len(parts):
        raise BadInput(f"frozen_stages {stages} must be -1 to {len(parts) - 1}")
    frozen = parts[: stages + 1] + [encoder.norm] * (stages == len(parts) - 1)
    for part in frozen:
        part.requires_grad_(False)
    return frozen
