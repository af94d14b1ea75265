"""How near to PyTorch a file must be, by precision: limits that a failing export cannot talk itself past."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coma.runtimes.model_spec import Precision


@dataclass(frozen=True)
class Gate:
    """Limits of one precision.

    Attributes:
        cosine: Least cosine similarity of any output of any image.
        agreement: Least share of a segmentor's pixels that are of the same class, over all images.
        found: Least share of a detector's detections that are found again, PyTorch's in the file and the
            file's in PyTorch. Below one even in fp32: where two proposals overlap by just the limit of their
            suppression, rounding decides which one stays. 16 bits change more, and hardly the AP: torch's own
            fp16 found 93 to 99 % of the detections of four small detectors again, its bf16 85 to 90 %.
        points: Largest loss of the task's metric (top-1, mIoU, AP), in points of a hundred.
    """

    cosine: float
    agreement: float
    found: float
    points: float

    @property
    def relative(self) -> float:
        """Largest norm of an error over that of the output: of two vectors of one length at that cosine."""
        return math.sqrt(2 * (1 - self.cosine))


TOLERANCES: dict[Precision, Gate] = {
    "fp32": Gate(cosine=0.9999, agreement=0.999, found=0.995, points=0.1),
    "fp16": Gate(cosine=0.999, agreement=0.99, found=0.90, points=0.1),
    "bf16": Gate(cosine=0.999, agreement=0.95, found=0.80, points=0.1),
    "int8": Gate(cosine=0.99, agreement=0.90, found=0.85, points=0.5),
    "fp8": Gate(cosine=0.99, agreement=0.90, found=0.85, points=0.5),
}
"""Cosines and points are this project's promise; the shares that must agree are its own choice."""
