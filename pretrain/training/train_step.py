"""One optimizer step, and everything that it changes: weights, optimizer, loss scale, moving average.

A train step knows no method: an objective maps normalised images and their seeds (or labels, where there are
any) to a loss. The random numbers of a forward pass (drop path) are seeded from the position of its first
sample in the stream, so they do not depend on earlier draws, on restarts, or on the number of processes.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from coma.amp import Precision, autocast, build_scaler, choose_attention
from coma.config import OptimizerConfig, RunConfig
from coma.data import Batch, BatchLayout, normalize
from coma.data.shuffle import splitmix64
from coma.objectives import Objective
from coma.objectives.classification import Classification
from pretrain.training.distributed import Processes, parallelize, reducing
from pretrain.training.ema import MovingAverage
from pretrain.training.optimizer import build_optimizer

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step; the same on every process, except for the waiting time."""

    values: dict[str, float]
    """loss, grad_norm, and the objective's own metrics; means over the global batch."""
    requests: tuple[bool, ...]
    """For each of the requests passed to `TrainStep`, whether any process raised it."""
    failures: tuple[str, ...]
    """Images that could not be read, by any process."""
    waited: float
    """Seconds this process waited for data."""


class NotFinite(Exception):
    """A loss or gradient is not finite; raised on all processes before the weights are touched."""

    def __init__(self, loss: float, grad_norm: float) -> None:
        super().__init__(f"loss {loss}, gradient norm {grad_norm}")
        self.loss = loss
        self.grad_norm = grad_norm


class TrainStep:
    """Takes optimizer steps on an objective, and owns everything that they change.

    Args:
        objective: On its device, identical on every process; a pre-training objective, or a `Classification`.
        optimizer: Settings.
        run: How the machine is used.
        group: The processes.
        slices: Split of the global batch over processes and passes.
        precision: Number format of the forward pass.
        mean: Mean of every channel.
        std: Standard deviation of every channel.
    """

    def __init__(
        self,
        objective: Objective | Classification,
        optimizer: OptimizerConfig,
        run: RunConfig,
        group: Processes,
        slices: BatchLayout,
        precision: Precision,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.objective = objective.train()
        self.precision: Precision = precision
        self.progress = 0.0
        self.batches: list[Batch] = []  # of the step in progress, for the report of a loss that is not finite
        self._config, self._group, self._slices = optimizer, group, slices
        self._seed = pass_seed(run.seed)
        self._mean, self._std = (torch.tensor(v, device=group.device) for v in (mean, std))
        objective.set_grad_checkpointing(run.grad_checkpointing)
        choose_attention(objective, precision, group.device)
        self._model = parallelize(objective, group, run.parallel)
        if run.compile:
            objective.compile(dynamic=False)
        self._optimizer = build_optimizer(objective, optimizer)
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        self._scaler = build_scaler(precision, group.device)
        self._ema = MovingAverage(self._parameters, optimizer.ema_decay) if optimizer.ema_decay else None

    def __call__(
        self,
        number: int,
        lr: float,
        batches: Iterator[Batch],
        requests: Callable[[], tuple[bool, ...]] = tuple,
        progress: float = 0.0,
    ) -> StepResult:
        """Takes step `number` (from 0): forward, backward, update.

        Args:
            number: Number of the step, from 0.
            lr: Learning rate; groups of parameters with an `lr_scale` take that share of it.
            batches: Iterator of micro batches.
            requests: Returns the requests of this process, called late in the step; see `StepResult`.
            progress: Share of the run before this step, which schedules of the objective use.

        Raises:
            NotFinite: before anything was changed.
        """
        self.progress = progress
        self.objective.before_step(progress)
        for param_group in self._optimizer.param_groups:
            param_group["lr"] = lr * param_group.get("lr_scale", 1.0)
        self._optimizer.zero_grad(set_to_none=True)
        self.batches, waited = [], 0.0
        passes: list[dict[str, Tensor]] = []
        device = self._group.device
        micro_batch_starts = self._slices.micro_batch_starts(number * self._slices.global_batch)
        for last in [*[False] * (self._slices.accumulation - 1), True]:
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began
            self.batches.append(batch)
            images = normalize(batch.images.to(device, non_blocking=True), self._mean, self._std)
            beside = (batch.seeds if batch.labels is None else batch.labels).to(device, non_blocking=True)
            seed_generators(self._seed, next(micro_batch_starts))
            with reducing(self._model, last):  # gradients are averaged over processes in the last pass
                with autocast(self.precision, device):
                    output = self._model(images, beside)
                self._scaler.scale(output.loss / self._slices.accumulation).backward()
            values = {"loss": output.loss, **output.metrics}
            passes.append({name: value.detach().float() for name, value in values.items()})
        grad_norm = self._unscale_and_clip()
        sums = torch.stack([torch.stack(list(each.values())) for each in passes]).sum(dim=0)
        means = sums / (len(passes) * self._group.world)
        failures = tuple(failure for batch in self.batches for failure in batch.failures)
        flags = torch.tensor([bool(failures), *requests()], dtype=means.dtype)
        summed = self._group.total(torch.cat([means, flags.to(means.device, non_blocking=True)]))
        *numbers, norm = torch.cat([summed, grad_norm[None]]).tolist()  # the one wait for the device
        values = dict(zip(passes[0], numbers, strict=False)) | {"grad_norm": norm}
        failed, *raised = (flag > 0 for flag in numbers[len(passes[0]) :])
        self._check(values["loss"], norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._ema:
            self._ema.update(number + 1)
        self.objective.after_step(progress)
        if failed:
            failures = tuple(failure for each in self._group.gather(failures) for failure in each)
        return StepResult(values, tuple(raised), failures, waited)

    def _unscale_and_clip(self) -> Tensor:
        self._scaler.unscale_(self._optimizer)
        norm = clip_grad_norm_(self._parameters, self._config.clip_grad or math.inf)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()

    def _check(self, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        overflow = self._scaler.is_enabled() and self._scaler.get_scale() > 1
        if not math.isfinite(loss) or not overflow:  # an fp16 overflow is skipped, with a smaller scale next
            raise NotFinite(loss, grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a step changes: whole tensors on the CPU of process 0, none on the others."""
        optimizer = get_optimizer_state_dict(self.objective, self._optimizer, options=_WHOLE)
        return {
            "model": self.weights(),
            "optimizer": optimizer,
            "scaler": self._scaler.state_dict(),
            "ema": self.weights_to_publish() if self._ema else None,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restores what `state_dict` returned; process 0 gives the state, the others give None."""
        group = self._group
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=group.world > 1)
        state = state or {"model": {}, "optimizer": {}, "ema": {}}
        if self._ema and group.share(state["ema"] is not None):
            set_model_state_dict(self.objective, state["ema"], options=options)
            self._ema.restart()
        set_model_state_dict(self.objective, state["model"], options=options)
        optimizer = with_known_settings(state["optimizer"], self._optimizer)
        set_optimizer_state_dict(self.objective, self._optimizer, optimizer, options=options)
        scaler = group.share(state.get("scaler"))
        if scaler and self._scaler.is_enabled():
            self._scaler.load_state_dict(scaler)

    def weights_to_publish(self) -> dict[str, Tensor]:
        """Returns the weights for the artifact, on process 0: their moving average where there is one."""
        if self._ema is None:
            return self.weights()
        with self._ema.in_place_of_weights():
            return {name: tensor.clone() for name, tensor in self.weights().items()}

    def weights(self) -> dict[str, Tensor]:
        """Returns the current weights, whole, on the CPU of process 0."""
        return cast("dict[str, Tensor]", get_model_state_dict(self.objective, options=_WHOLE))


def with_known_settings(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Returns the state of an optimizer without settings that `optimizer` does not have.

    The code of another version wrote them; its moving averages stay.
    """
    if "param_groups" not in state:
        return state
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    return state | {"param_groups": [{k: v for k, v in old.items() if k in own} for old, own in pairs]}


def pass_seed(run_seed: int) -> int:
    """Returns a seed that separates the random numbers of forward passes from those of crops and masks."""
    return splitmix64((run_seed ^ 0x70617373) & (2**64 - 1))


def seed_generators(seed: int, position: int) -> None:
    """Seeds all generators from the run's seed and a position in the sample stream."""
    value = splitmix64((seed + position) & (2**64 - 1))
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)
