"""How long runtimes take: warm, interleaved, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coma.data.decode import decode
from coma.runtimes.base import Runtime
from export.preprocessing import as_input, resized

_WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Of one runtime at one shape, in milliseconds.

    Attributes:
        p50: Half of the runs took at most this.
        p90: Nine tenths.
        p99: 99 of 100.
        images_per_second: By the median.
        runs: How many were timed.
    """

    p50: float
    p90: float
    p99: float
    images_per_second: float
    runs: int


def interleaved(
    calls: Sequence[Callable[[], object]], batch: int, seconds: float, least: int = 5
) -> list[Latency]:
    """Time calls in turns, for about `seconds` each and at least so many times.

    Args:
        calls: What is timed.
        batch: Images of a call.
        seconds: For each of them.
        least: Runs of each.
    """
    for call in calls:
        for _ in range(_WARM_UP):
            call()
    times: list[list[float]] = [[] for _ in calls]
    ends = time.perf_counter() + seconds * len(calls)
    while len(times[0]) < least or time.perf_counter() < ends:
        for call, spent in zip(calls, times, strict=True):
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            spent.append(1000 * (time.perf_counter() - start))
    return [_summary(spent, batch) for spent in times]


def compute(runtime: Runtime, inputs: dict[str, Tensor]) -> Callable[[], object]:
    """A call from inputs in memory to outputs on the runtime's device."""
    return lambda: runtime(**inputs)


def end_to_end(runtime: Runtime, files: Sequence[bytes], size: tuple[int, int], channels: int) -> Callable:
    """A call from the contents of image files to outputs: decoding and resizing in the caller's thread."""
    from coma.data.channels import convert_channels

    rule = runtime.spec.preprocessing

    def call() -> object:
        pixels = [convert_channels(decode(data, "image"), channels, "image") for data in files]
        return runtime(as_input([resized(each, rule, size) for each in pixels], rule))

    return call


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(times: list[float], batch: int) -> Latency:
    p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    return Latency(p50, p90, p99, 1000 * batch / p50, len(times))
