"""Up to which magnitude the activations of a graph are kept: one number a tensor, from example inputs.

The graph runs once over the examples, batch by batch; of every tensor only a histogram of magnitudes stays,
so that memory grows with one batch, not with their number. ONNX Runtime's own calibrators watch all
products, those of attention included, and keep every activation of every batch until the end.

    minmax       the largest magnitude seen: nothing is clipped
    percentile   a magnitude that all but a few values stay below
    entropy      where clipped and rounded values differ least in distribution from what they were, by
                 Kullback-Leibler divergence (Migacz, "8-bit inference with TensorRT", GTC 2017)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from coma.errors import BadInput, CheckFailed

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

Method = Literal["minmax", "percentile", "entropy"]
Batch = Mapping[str, np.ndarray]

BINS = 4096
LEVELS = 128
"""Magnitudes that a symmetric int8 tells apart."""


def activation_ranges(
    model: ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    method: Method,
    *,
    percentile: float = 99.99,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """The magnitude that each tensor's largest code stands for.

    Args:
        model: The graph, in fp32 or fp16; run by ONNX Runtime on the CPU.
        tensors: Names of activations in it.
        batches: Its inputs by name; sizes may differ from batch to batch where the graph's axes are dynamic.
        method: See above.
        percentile: Share of the values that `percentile` keeps, in percent.
        progress: Told the number of batches done, after each.

    Returns:
        By name; 0 for a tensor that was zero throughout.

    Raises:
        BadInput: no batches, one that the graph does not take, or a percentile outside 0 to 100.
        CheckFailed: an activation that is not finite.
    """
    if not 0 < percentile <= 100:
        raise BadInput(f"percentile {percentile}: it lies above 0 and is at most 100")
    histograms = {name: MagnitudeHistogram() for name in tensors}
    session, done = _watching(model, tensors), 0
    for batch in batches:
        try:
            outputs = cast(list[np.ndarray], session.run(list(tensors), dict(batch)))
        except Exception as error:  # the library has no public class for it
            raise BadInput(f"calibration batch {done} does not fit the graph: {error}") from None
        for name, values in zip(tensors, outputs, strict=True):
            if not np.isfinite(values).all():
                raise CheckFailed(f"calibration batch {done}: activation {name!r} is not finite")
            histograms[name].add(values)
        done += 1
        if progress:
            progress(done)
    if not done:
        raise BadInput("calibration got no batches: pass at least one, of images like those to be seen later")
    if method == "minmax":
        return {name: each.largest for name, each in histograms.items()}
    if method == "percentile":
        return {name: each.percentile(percentile) for name, each in histograms.items()}
    return {name: each.least_divergence() for name, each in histograms.items()}


class MagnitudeHistogram:
    """Histogram of magnitudes from 0 on; its range doubles whenever a value exceeds it."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.top = 0.0
        self.largest = 0.0

    def add(self, values: np.ndarray) -> None:
        """Count finite values of any shape."""
        magnitudes = np.abs(values.ravel().astype(np.float32, copy=False))
        self.largest = max(self.largest, float(magnitudes.max(initial=0)))
        if not self.top:
            self.top = self.largest
        while 0 < self.top < self.largest:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts, self.top = np.concatenate([merged, np.zeros_like(merged)]), 2 * self.top
        if self.top:
            self.counts += np.histogram(magnitudes, BINS, (0, self.top))[0]

    def percentile(self, share: float) -> float:
        """The least magnitude that `share` percent of the values do not exceed, up to a bin's width."""
        cumulated = self.counts.cumsum()
        above = int(np.searchsorted(cumulated, share / 100 * cumulated[-1])) + 1
        return min(self.top * above / BINS, self.largest)

    def least_divergence(self) -> float:
        """Where to clip so that `LEVELS` codes keep the distribution best.

        Exact zeros say nothing on it: where most values are zero they would drown the rest.
        """
        counts = self.counts.astype(np.float64)
        counts[0] = counts[1]
        ends = range(LEVELS, BINS + 1, 16)
        if not counts.any():
            return self.largest
        best = min(ends, key=lambda end: _divergence(counts, end))
        return min(self.top * best / BINS, self.largest)


def _divergence(counts: np.ndarray, end: int) -> float:
    # of the first `end` bins, with what is clipped in the last one, from the same in LEVELS steps
    kept = counts[:end]
    reference = kept.copy()
    reference[-1] += counts[end:].sum()
    level = np.arange(end) * LEVELS // end
    filled = kept > 0
    share = np.bincount(level, kept, LEVELS) / np.maximum(np.bincount(level, filled, LEVELS), 1)
    coarse = np.where(filled, share[level], 0)
    if not coarse.any():
        return np.inf
    p, q = reference / reference.sum(), coarse / coarse.sum()
    q = np.maximum(q, 1e-9)
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


def _watching(model: ModelProto, tensors: Sequence[str]) -> InferenceSession:
    # a session whose outputs include the tensors
    import onnxruntime
    from onnx import ModelProto, ValueInfoProto

    watched = ModelProto()
    watched.CopyFrom(model)
    known = {output.name for output in watched.graph.output}
    watched.graph.output.extend(ValueInfoProto(name=name) for name in tensors if name not in known)
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # batches of several sizes would each leave their arena behind
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
