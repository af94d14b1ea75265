"""All runtimes of one model on one picture: how long each takes, and how far each is from the first."""

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
from demo.masking import draw_views
from demo.models import Model
from demo.predict import prepare
from demo.reconstruction import run
from demo.resize import fit_picture
from export.preprocessing import as_input

MOST_RUNS, SECONDS = 30, 1.0


@dataclass(frozen=True)
class Measured:
    """One runtime.

    Attributes:
        title: "ONNX Runtime fp16".
        version: Library, version and device; empty if it did not run.
        milliseconds: Median of the runs, one picture each, with the copies to and from a GPU.
        runs: How many.
        cosine: Least cosine similarity of an output to the first runtime's.
        difference: Largest difference of a value of the first output; of reconstructions in levels of 0 to
            255.
        reason: Why it did not run; None if it did.
    """

    title: str
    version: str = ""
    milliseconds: float = 0.0
    runs: int = 0
    cosine: float = 1.0
    difference: float = 0.0
    reason: str | None = None


def compare(
    model: Model, form: GraphKind, pixels: np.ndarray, told: Callable[[float, str], None] = lambda *_: None
) -> list[Measured]:
    """Run every runtime of `form` on the picture `[H, W, c]`.

    Args:
        model: The model.
        form: What it is used as.
        pixels: uint8, or float32 in 0..1.
        told: Called with the share that is done and what comes next.
    """
    offers = model.offers(form)
    rows: list[Measured] = []
    first: dict[str, Tensor] | None = None
    for done, offer in enumerate(offers):
        told(done / len(offers), offer.title)
        if offer.reason:
            rows.append(Measured(offer.title, reason=offer.reason))
            continue
        try:
            runtime = model.runtime(form, offer.title)
            outputs, milliseconds, runs = _time(runtime, pixels)
        except ComaError as error:
            rows.append(Measured(offer.title, reason=str(error)))
            continue
        first = first or outputs
        cosine = min(_cosine(first[name], outputs[name]) for name in first)
        name = next(iter(first))
        scale = 255 * max(runtime.spec.preprocessing.std) if form == "reconstructor" else 1.0
        difference = float((first[name].double() - outputs[name].double()).abs().max()) * scale
        rows.append(Measured(offer.title, runtime.title, milliseconds, runs, cosine, difference))
    return rows


def _time(runtime: Runtime, pixels: np.ndarray) -> tuple[dict[str, Tensor], float, int]:
    about, rule = runtime.spec, runtime.spec.preprocessing
    if about.graph == "reconstructor":
        side = rule.size[0] if rule.size else 224
        fitted = fit_picture(pixels, side, "crop", rule.mean)
        images = as_input([fitted.pixels], rule)
        others = {"visible": draw_views("coma", 0, *unit_grid(side, side, about.unit))[:1]}
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
