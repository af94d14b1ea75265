"""Compares the runtimes of a model on one picture: latency, and difference to the first runtime."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from coma.data.transforms import normalize
from coma.errors import ComaError
from coma.masking.patchify import unit_grid
from coma.runtimes.base import Runtime
from coma.runtimes.model_spec import GraphKind
from coma.runtimes.preprocessing import to_input
from demo.masking import sample_views
from demo.models import Model
from demo.predict import prepare
from demo.reconstruction import run
from demo.resize import resize_picture

MOST_RUNS, SECONDS = 30, 1.0


@dataclass(frozen=True)
class RuntimeTiming:
    """Measurements of one runtime.

    Attributes:
        title: Name on the page, for example "ONNX Runtime fp16".
        version: Library, version and device; empty if it did not run.
        milliseconds: Median latency for one picture, with copies to and from the GPU.
        runs: Number of runs.
        cosine: Lowest cosine similarity of an output to the first runtime's.
        difference: Largest difference of a value of the first output; for reconstructions in levels of 0 to
            255.
        reason: Why it did not run, or that its outputs are not finite; None otherwise.
    """

    title: str
    version: str = ""
    milliseconds: float = 0.0
    runs: int = 0
    cosine: float = 1.0
    difference: float = 0.0
    reason: str | None = None


def time_runtimes(
    model: Model,
    form: GraphKind,
    pixels: np.ndarray,
    report_progress: Callable[[float, str], None] = lambda *_: None,
) -> list[RuntimeTiming]:
    """Runs every runtime of a graph on the picture.

    Args:
        model: The model.
        form: Kind of the graph.
        pixels: `[H, W, c]`, uint8, or float32 in 0..1.
        report_progress: Called with the share that is done and the next runtime.
    """
    options = model.options(form)
    rows: list[RuntimeTiming] = []
    first: dict[str, Tensor] | None = None
    for done, option in enumerate(options):
        report_progress(done / len(options), option.title)
        if option.reason:
            rows.append(RuntimeTiming(option.title, reason=option.reason))
            continue
        try:
            runtime = model.runtime(form, option.title)
            outputs, milliseconds, runs = _time(runtime, pixels)
        except ComaError as error:
            rows.append(RuntimeTiming(option.title, reason=str(error)))
            continue
        if broken := [name for name, each in outputs.items() if not each.isfinite().all()]:
            rows.append(RuntimeTiming(option.title, reason=f"its output {broken[0]} is not finite"))
            continue
        first = first or outputs
        cosine = min(_cosine(first[name], outputs[name]) for name in first)
        name = next(iter(first))
        scale = 255 * max(runtime.spec.preprocessing.std) if form == "reconstructor" else 1.0
        difference = float((first[name].double() - outputs[name].double()).abs().max()) * scale
        rows.append(RuntimeTiming(option.title, runtime.title, milliseconds, runs, cosine, difference))
    return rows


def _time(runtime: Runtime, pixels: np.ndarray) -> tuple[dict[str, Tensor], float, int]:
    about, rule = runtime.spec, runtime.spec.preprocessing
    if about.graph == "reconstructor":
        size = rule.size or (224, 224)
        resized = resize_picture(pixels, size, "crop", rule.mean)
        images = to_input([resized.pixels], rule)
        others = {"visible": sample_views("coma", 0, *unit_grid(*size, about.unit))[:1]}
    else:
        images, others = prepare(pixels, runtime), {}
    outputs = run(runtime, images, **others)
    if about.graph == "reconstructor" and rule.normalize_in_graph:
        outputs["reconstruction"] = normalize(outputs["reconstruction"] / 255, rule.mean, rule.std)
    seconds: list[float] = []
    while len(seconds) < MOST_RUNS and (len(seconds) < 3 or sum(seconds) < SECONDS):
        began = time.perf_counter()
        run(runtime, images, **others)
        seconds.append(time.perf_counter() - began)
    return outputs, 1000 * statistics.median(seconds), len(seconds)


def _cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().flatten(), b.double().flatten()
    length = float(x.norm() * y.norm())
    return float(x @ y) / length if length else float(x.equal(y))
