"""AdamW, its parameter groups, and the learning rate at every step (MAE, He et al. 2021, appendix A.1)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.optim import AdamW

from pretrain.config import OptimizerConfig


def build_optimizer(objective: nn.Module, config: OptimizerConfig) -> AdamW:
    """Fused AdamW over the parameters of `objective`, matrices decayed and vectors not."""
    decayed, free = parameter_groups(objective)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def parameter_groups(objective: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters with weight decay, and without: biases, norms, tokens, and what a module's own
    `no_weight_decay()` names (timm's convention).
    """  # noqa: D205 - one sentence
    exempt: set[str] = set()
    for prefix, module in objective.named_modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            exempt |= {f"{prefix}.{name}" if prefix else name for name in names()}  # type: ignore[union-attr]
    decayed, free = [], []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or name in exempt else decayed).append(parameter)
    return decayed, free


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of step number `step` (0 to steps - 1): linear warm-up to `config.lr`, half a cosine to 0.

    Cosine decay as in Loshchilov and Hutter 2017 (SGDR, eq. 5) without restarts.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
