"""Moving average of the weights: what is published when `--ema-decay` is on.

Works on whatever part of a parameter lives on this process, so it knows nothing of DDP or FSDP2: averaging
is elementwise, and every process averages its own shard.
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

    Early on d is smaller, min(decay, (1 + n) / (10 + n)) after n steps, so that the random start is soon
    forgotten (the ramp of TensorFlow's ExponentialMovingAverage).

    Args:
        parameters: Those that are optimised.
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
        """Take in the weights after step number `steps` (counted from 1)."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        get_ema_multi_avg_fn(decay)(self._average, self._weights(), steps)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again from the present weights; after loading an average into them, this restores it."""
        _copy(self._weights(), self._average)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model holds the average inside this block, and its own weights again afterwards."""
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
