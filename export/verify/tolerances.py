"""Tolerances of the verification by precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

from coma.runtimes.model_spec import Precision


@dataclass(frozen=True)
class Tolerance:
    """Tolerances of one precision.

    Attributes:
        cosine: Minimum cosine similarity of any output of any image.
        relative: Maximum relative error (norm of the error over norm of PyTorch's output) of any continuous
            output of any image, raw outputs of a detector's heads included.
        agreement: Minimum share of a segmentor's pixels with the same class, over all images.
        found: Minimum share of a detector's detections with a score of 0.3 or more that match, PyTorch's in
            the file and the file's in PyTorch. It is below one even in fp32: if two proposals overlap by the
            threshold of their suppression, rounding decides which one remains. 16 bits change more, though
            hardly the AP: in torch's own fp16, 93 to 99 % of the detections of four small detectors matched,
            in bf16 85 to 90 %.
        faint: Minimum share of the other detections that match.
        matched: Maximum relative error of the boxes, scores and masks of matching detections.
        points: Maximum loss of the task's metric (top-1, mIoU, AP) in percentage points.
    """

    cosine: float
    relative: float
    agreement: float
    found: float
    faint: float
    matched: float
    points: float


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(0.9999, 2e-5, 0.999, found=0.995, faint=0.99, matched=1e-3, points=0.1),
    "fp16": Tolerance(0.999, 0.02, 0.99, found=0.90, faint=0.80, matched=0.02, points=0.1),
    "bf16": Tolerance(0.999, 0.04, 0.95, found=0.80, faint=0.70, matched=0.04, points=0.1),
    "int8": Tolerance(0.99, 0.14, 0.90, found=0.85, faint=0.70, matched=0.14, points=0.5),
    "fp8": Tolerance(0.99, 0.14, 0.90, found=0.85, faint=0.70, matched=0.14, points=0.5),
}
TOLERANCES |= {"int8+fp16": TOLERANCES["int8"], "fp8+fp16": TOLERANCES["fp8"]}  # 8 bits dominate the error
"""Tolerances on a CPU; docs/design/gate.md has the errors of correct files."""
SELECTION = Tolerance(0.9999, 2e-5, 0.9999, found=0.998, faint=0.998, matched=2e-5, points=0.0)
"""Tolerances of what a file selects from its own raw outputs, in fp32 in every precision."""
GPU_RELATIVE = 1e-3
"""Minimum of `relative` on a GPU, where sums have another order; not measured on a GPU yet."""


def tolerance_of(precision: Precision, *, gpu: bool = False) -> Tolerance:
    """Returns the tolerances of a precision on a CPU or a GPU."""
    known = TOLERANCES[precision]
    return replace(known, relative=max(known.relative, GPU_RELATIVE)) if gpu else known
