"""How near to PyTorch a file must be, by precision: limits that a failing export cannot talk itself past."""

from __future__ import annotations

from dataclasses import dataclass

from export.description import Precision


@dataclass(frozen=True)
class Gate:
    """Limits of one precision.

    Attributes:
        cosine: Least cosine similarity of any output of any image.
        agreement: Least share of classes (segmentor: pixels; detector: detections found again) that are the
            same, over all images.
        points: Largest loss of the task's metric (top-1, mIoU, AP), in points of a hundred.
    """

    cosine: float
    agreement: float
    points: float


GATES: dict[Precision, Gate] = {
    "fp32": Gate(cosine=0.9999, agreement=0.999, points=0.1),
    "fp16": Gate(cosine=0.999, agreement=0.99, points=0.1),
    "bf16": Gate(cosine=0.999, agreement=0.95, points=0.1),
    "int8": Gate(cosine=0.99, agreement=0.90, points=0.5),
    "fp8": Gate(cosine=0.99, agreement=0.90, points=0.5),
}
"""Cosines and points are this project's promise; the shares that must agree are its own choice."""
