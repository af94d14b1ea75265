"""Tolerances of the verification by precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coma.runtimes.model_spec import Precision


@dataclass(frozen=True)
class Tolerance:
    """Tolerances of one precision.

    Attributes:
        cosine: Minimum cosine similarity of any output of any image.
        agreement: Minimum share of a segmentor's pixels with the same class, over all images.
        found: Minimum share of a detector's detections that match, PyTorch's in the file and the file's in
            PyTorch. It is below one even in fp32: if two proposals overlap by the threshold of their
            suppression, rounding decides which one remains. 16 bits change more, though hardly the AP: in
            torch's own fp16, 93 to 99 % of the detections of four small detectors matched, in bf16 85 to 90
            %.
        points: Maximum loss of the task's metric (top-1, mIoU, AP) in percentage points.
    """

    cosine: float
    agreement: float
    found: float
    points: float

    @property
    def relative(self) -> float:
        """Maximum relative error: that of two vectors of equal length at the minimum cosine."""
        return math.sqrt(2 * (1 - self.cosine))


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(cosine=0.9999, agreement=0.999, found=0.995, points=0.1),
    "fp16": Tolerance(cosine=0.999, agreement=0.99, found=0.90, points=0.1),
    "bf16": Tolerance(cosine=0.999, agreement=0.95, found=0.80, points=0.1),
    "int8": Tolerance(cosine=0.99, agreement=0.90, found=0.85, points=0.5),
    "fp8": Tolerance(cosine=0.99, agreement=0.90, found=0.85, points=0.5),
}
"""Tolerances by precision."""
