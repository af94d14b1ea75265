"""Latency of runtimes, measured in turns after a warm-up, so that disturbances affect all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coma.data.decode import decode
from coma.runtimes.base import Runtime
from coma.runtimes.preprocessing import resize_image, to_input

_WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Latency of one runtime at one shape, in milliseconds.

    Attributes:
        p50: Median.
        p90: 90th percentile.
        p99: 99th percentile.
        images_per_second: Throughput at the median.
        runs: Number of timed runs.
    """

    p50: float
    p90: float
    p99: float
    images_per_second: float
    runs: int


def time_interleaved(
    calls: Sequence[Callable[[], object]],
    batch: int,
    seconds: float,
    least: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Latency]:
    """Times calls in turns.

    Args:
        calls: Calls to time.
        batch: Number of images in a call.
        seconds: Approximate time for each call.
        least: Minimum number of runs of each call.
        clock: Seconds that have passed; `time.process_time` counts those that this process computed, which
            on a CPU that others use, with one thread, is steadier.
    """
    for call in calls:
        for _ in range(_WARM_UP):
            call()
    times: list[list[float]] = [[] for _ in calls]
    ends = clock() + seconds * len(calls)
    while len(times[0]) < least or clock() < ends:
        for call, spent in zip(calls, times, strict=True):
            _synchronize()
            start = clock()
            call()
            _synchronize()
            spent.append(1000 * (clock() - start))
    return [_summary(spent, batch) for spent in times]


def end_to_end(runtime: Runtime, files: Sequence[bytes], size: tuple[int, int], channels: int) -> Callable:
    """Returns a call from the bytes of image files to outputs; decoding runs in the caller's thread."""
    from coma.data.channels import convert_channels

    rule = runtime.spec.preprocessing

    def call() -> object:
        pixels = [convert_channels(decode(data, "image"), channels, "image") for data in files]
        return runtime(to_input([resize_image(each, rule, size) for each in pixels], rule))

    return call


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(times: list[float], batch: int) -> Latency:
    p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    return Latency(p50, p90, p99, 1000 * batch / p50, len(times))
