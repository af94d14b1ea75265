"""Moving average of the weights, which the artifact holds when `--ema-decay` is on.

Averaging is elementwise, so every process averages its own part of the parameters, under DDP and FSDP2 alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """average <- d * average + (1 - d) * weights, after every step.

    After n steps d is min(decay, (1 + n) / (10 + n)), so that the random start soon loses its weight (the
    ramp of TensorFlow's ExponentialMovingAverage).

    Args:
        parameters: The parameters to average.
        decay: d, in 0..1.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = list(parameters)
        self._average = [weight.clone() for weight in self._weights()]

    def _weights(self) -> list[Tensor]:
        return [_local(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Updates the average with the weights after step `steps` (counted from 1)."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        get_ema_multi_avg_fn(decay)(self._average, self._weights(), steps)

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the average to the current weights; this restores an average that was loaded into them."""
        _copy(self._weights(), self._average)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Puts the average into the model inside this block, and its own weights back afterwards."""
        with torch.no_grad():
            own = [weight.clone() for weight in self._weights()]
            _copy(self._average, self._weights())
            try:
                yield
            finally:
                _copy(own, self._weights())


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _local(parameter: nn.Parameter) -> Tensor:
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
