"""The optimizer and its parameter groups, and the learning rate at every step (MAE, 2021, appendix A)."""

from __future__ import annotations

import math
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from coma.config import EncoderConfig, FinetuneRecipe, OptimizerConfig
from coma.models import Encoder
from coma.objectives.classification import Classification
from pretrain.training.muon import MuonWithAdamW

_HIDDEN = {"blocks", "merge"}
"""Modules whose matrices Muon trains: attention, MLPs, and the merging of patches between stages."""


def build_optimizer(objective: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Returns the optimizer of the parameters of `objective`, with weight decay on matrices only.

    The parameters of a classifier are grouped by layer, each group with its `lr_scale`.
    """
    groups: list[dict[str, Any]]
    if isinstance(objective, Classification) and isinstance(config, FinetuneRecipe):
        groups = layer_groups(objective.classifier, config)
    else:
        decayed, free = parameter_groups(objective)
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ]
    matrices = set(hidden_matrices(objective)) if config.optimizer == "muon" else set()
    hidden, others = (
        [{**g, "params": [p for p in g["params"] if (p in matrices) is wanted]} for g in groups]
        for wanted in (True, False)
    )
    hidden, others = ([g for g in each if g["params"]] for each in (hidden, others))
    if hidden:
        return MuonWithAdamW(hidden, others, config.lr, config.betas)
    return AdamW(others, lr=config.lr, betas=config.betas, fused=True)


def hidden_matrices(objective: nn.Module) -> list[Tensor]:
    """Returns the matrices that Muon trains: those inside blocks and merges, not stems, tokens or heads."""
    return [
        parameter
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and _HIDDEN & {*name.split(".")}
    ]


def parameter_groups(objective: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the parameters with weight decay and those without.

    Biases, norms, tokens and what a module's `no_weight_decay()` names (timm's convention) have none.
    """
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


def layer_groups(classifier: Encoder, recipe: FinetuneRecipe) -> list[dict[str, Any]]:
    """Returns the parameters by layer, each group with `weight_decay` and `lr_scale` = decay^(layers above).

    The encoder names its layers (`group_matcher`), from the stem to the last block with the norm after it.
    The head is on top, at scale 1 (Clark et al. 2020, ELECTRA; Bao et al. 2021, BEiT; implemented by timm).
    """
    decay = default_layer_decay(classifier.config) if recipe.layer_decay is None else recipe.layer_decay
    return param_groups_layer_decay(
        classifier,
        recipe.weight_decay,
        no_weight_decay_list=tuple(classifier.no_weight_decay()),
        layer_decay=decay,
    )


def default_layer_decay(model: EncoderConfig) -> float:
    """Returns 0.75 (MAE, table 9), or 0.65 for encoders as wide as the presets base and vit-base.

    MAE's released recipe uses 0.65 for ViT-B.
    """
    return 0.65 if model.as_wide_as_base else 0.75


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Returns the learning rate of step `step` (0 to steps - 1): linear warm-up, then half a cosine to 0.

    Cosine decay as in Loshchilov and Hutter 2017 (SGDR, eq. 5) without restarts.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
