"""Muon for hidden matrices, with matrices of one shape in one batch, and AdamW for all other parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_RMS = 0.2
"""Root mean square of AdamW's steps in long trainings."""


class MuonWithAdamW(Optimizer):
    """Muon for hidden matrices, AdamW for all other parameters, as one optimizer.

    Muon steps along the orthogonalised Nesterov momentum of every matrix (Jordan et al. 2024, "Muon: An
    optimizer for hidden layers in neural networks"). Its steps are scaled to the root mean square of AdamW's,
    so that both share the learning rate and the weight decay (Liu et al. 2025, "Muon is Scalable for LLM
    Training", eq. 4).

    Its steps are those of `torch.optim.Muon`, which orthogonalises one matrix after the other and so takes
    longer in small models (`benchmarks/muon.py`). Matrices that FSDP shards are gathered first, so that every
    process computes what a single one would.

    Args:
        matrices: Groups of matrices.
        others: Groups of all other parameters.
        lr: Learning rate.
        betas: Decay rates of AdamW's moving averages.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
    ) -> None:
        self._adamw = AdamW(others, lr=lr, betas=betas, fused=True)
        hidden = [{"lr": lr, "momentum": _MOMENTUM, **group} for group in matrices]
        super().__init__([*hidden, *self._adamw.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient."""
        for group in self.matrix_groups():
            self._step_matrices(group)
        self._adamw.state = self.state  # loading a state replaces it, and the groups
        self._adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self._adamw.step()

    def matrix_groups(self) -> list[dict[str, Any]]:
        """Returns the groups of parameters that Muon trains."""
        return [group for group in self.param_groups if "momentum" in group]

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any]) -> None:
        lr, alike = group["lr"], defaultdict[tuple[int, int], list[Tensor]](list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike[min(matrix.shape), max(matrix.shape)].append(matrix)
        for (_, longer), matrices in alike.items():
            wide = [_wide(_gathered(self._momentum(each, group["momentum"]))) for each in matrices]
            for matrix, step in zip(matrices, orthogonalised(torch.stack(wide)), strict=True):
                step = step if step.shape == matrix.shape else step.mT
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.add_(_sharded_as(matrix, step), alpha=-lr * _RMS * math.sqrt(longer))

    def _momentum(self, matrix: Tensor, decay: float) -> Tensor:
        """Returns the gradient's Nesterov momentum, after an update of its moving average."""
        gradient, state = cast(Tensor, matrix.grad), self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        return gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - decay), decay)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Returns the nearest orthogonal matrices, roughly: singular values from 0.7 to 1.2.

    Five quintic Newton-Schulz iterations in bf16 (Jordan et al. 2024).

    Args:
        matrices: `[k, m, n]`, m <= n.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _gathered(matrix: Tensor) -> Tensor:
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def _sharded_as(other: Tensor, matrix: Tensor) -> Tensor:
    if not isinstance(other, DTensor):
        return matrix
    return distribute_tensor(matrix, other.device_mesh, other.placements, src_data_rank=None)
