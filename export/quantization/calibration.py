"""Calibration: the clipping magnitude of every activation of a graph, from example inputs.

The graph runs once over the examples, batch by batch. A histogram of magnitudes is kept for every tensor, so
memory does not grow with the number of batches. ONNX Runtime's own calibrators watch all matrix
multiplications, including those of attention, and keep every activation of every batch until the end.

    minmax       the maximum magnitude: no value is clipped
    percentile   a percentile of the magnitudes
    entropy      the magnitude with the smallest Kullback-Leibler divergence between the distributions before
                 and after quantisation (Migacz, "8-bit inference with TensorRT", GTC 2017)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from coma.errors import BadInput, CheckFailed
from coma.runtimes.onnx_file import ORT_WEIGHTS_FOLDER

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

Method = Literal["minmax", "percentile", "entropy"]
Batch = Mapping[str, np.ndarray]

BINS = 4096
LEVELS = 128
"""Number of magnitudes of a symmetric int8."""


def activation_ranges(
    model: ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    method: Method,
    *,
    percentile: float = 99.99,
    progress: Callable[[int], None] | None = None,
    folder: Path | None = None,
) -> dict[str, float]:
    """Returns the clipping magnitude of each tensor.

    Args:
        model: The graph in fp32 or fp16; ONNX Runtime runs it on the CPU.
        tensors: Names of the activations.
        batches: Inputs by name; dynamic axes may have different sizes in different batches.
        method: Calibration method; see the module's docstring.
        percentile: Percentile of the method of that name.
        progress: Receives the number of finished batches.
        folder: Folder of the graph's weights file, if it has one.

    Returns:
        Magnitudes by name; 0 for a tensor that is zero everywhere.

    Raises:
        BadInput: there are no batches, the graph does not take one, or the percentile is outside 0 to 100.
        CheckFailed: an activation is not finite.
    """
    if not 0 < percentile <= 100:
        raise BadInput(f"percentile {percentile} must be more than 0 and at most 100")
    histograms = {name: MagnitudeHistogram() for name in tensors}
    session, done = _calibration_session(model, tensors, folder), 0
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
        raise BadInput("calibration needs at least one batch, of images like those that the model will see")
    if method == "minmax":
        return {name: each.largest for name, each in histograms.items()}
    if method == "percentile":
        return {name: each.percentile(percentile) for name, each in histograms.items()}
    return {name: each.least_divergence() for name, each in histograms.items()}


class MagnitudeHistogram:
    """Histogram of magnitudes; its range doubles whenever a value exceeds it."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.top = 0.0
        self.largest = 0.0

    def add(self, values: np.ndarray) -> None:
        """Adds finite values of any shape."""
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
        """Returns the magnitude that `share` percent of the values do not exceed, to within a bin."""
        cumulated = self.counts.cumsum()
        above = int(np.searchsorted(cumulated, share / 100 * cumulated[-1])) + 1
        return min(self.top * above / BINS, self.largest)

    def least_divergence(self) -> float:
        """Returns the magnitude at which clipping to `LEVELS` levels changes the distribution least.

        Exact zeros are left out: if most values are zero, they would dominate the result.
        """
        counts = self.counts.astype(np.float64)
        counts[0] = counts[1]
        ends = range(LEVELS, BINS + 1, 16)
        if not counts.any():
            return self.largest
        best = min(ends, key=lambda end: _divergence(counts, end))
        return min(self.top * best / BINS, self.largest)


def _divergence(counts: np.ndarray, end: int) -> float:
    """Returns the divergence of the first `end` bins, with clipped values in the last, from LEVELS levels."""
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


def _calibration_session(model: ModelProto, tensors: Sequence[str], folder: Path | None) -> InferenceSession:
    """Returns a session whose outputs include the tensors."""
    import onnxruntime
    from onnx import ModelProto, ValueInfoProto

    watched = ModelProto()
    watched.CopyFrom(model)
    known = {output.name for output in watched.graph.output}
    watched.graph.output.extend(ValueInfoProto(name=name) for name in tensors if name not in known)
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # otherwise batches of each size would keep their own arena
    options.log_severity_level = 3
    if folder:
        options.add_session_config_entry(ORT_WEIGHTS_FOLDER, str(folder))
    return onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
