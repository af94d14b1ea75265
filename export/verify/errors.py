"""Errors between the outputs of PyTorch and of a file, accumulated image by image."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Role = Literal["output", "detections", "selection"]
"""What an output is held to: `output` is continuous in the pixels (or an integer for each of them),
`detections` were selected from all others, `selection` was computed from the file's own raw outputs."""


@dataclass
class OutputError:
    """Error of one output over all images.

    Attributes:
        role: Kind of the output, which decides on its tolerances.
        cosine: Minimum cosine similarity of an image; floating-point outputs only.
        relative: Maximum relative error (norm of the error over norm of PyTorch's output) of an image;
            detects a wrong scale, which the cosine does not.
        max: Maximum absolute error.
        p99_9: Maximum 99.9th percentile of the absolute error of an image.
        largest: Maximum absolute value of PyTorch's output.
        compared: Number of compared values.
        total: Sum of the absolute errors.
        same: Number of equal integers, or of matching detections.
        counted: Number of integers or detections.
        finite: Whether all values are finite.
    """

    role: Role = "output"
    cosine: float = 1.0
    relative: float = 0.0
    max: float = 0.0
    p99_9: float = 0.0
    largest: float = 0.0
    compared: int = 0
    total: float = 0.0
    same: int = 0
    counted: int = 0
    finite: bool = True

    @property
    def mean(self) -> float:
        """Mean absolute error."""
        return self.total / max(self.compared, 1)

    @property
    def agreement(self) -> float | None:
        """Share of equal integers or matching detections; None for other outputs."""
        return self.same / self.counted if self.counted else None

    @property
    def size(self) -> tuple[float, float]:
        """Sort key: larger errors come last."""
        return self.relative, 1 - (1.0 if self.agreement is None else self.agreement)

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Adds the floating-point values of one image, of any shape."""
        if not (wanted.isfinite().all() and found.isfinite().all()):
            self.finite = False
            self.cosine, self.relative, self.max, self.p99_9 = -1.0, inf, inf, inf
            return
        if not wanted.numel():
            return
        self.largest = max(self.largest, wanted.abs().max().item())
        wanted, found = wanted.double().flatten(), found.double().flatten()
        error = (wanted - found).abs_()
        self.cosine = min(self.cosine, cosine(wanted, found))
        self.relative = max(self.relative, relative_error(wanted, error))
        self.max = max(self.max, error.max().item())
        kth = max(int(0.999 * len(error)), 1)
        self.p99_9 = max(self.p99_9, error.kthvalue(kth).values.item())
        self.compared += len(error)
        self.total += error.sum().item()

    def count(self, same: int, of: int) -> None:
        """Adds integers or detections."""
        self.same += same
        self.counted += of

    def merge(self, other: OutputError) -> None:
        """Adds the images of another error of the same output."""
        self.cosine = min(self.cosine, other.cosine)
        for name in ("relative", "max", "p99_9", "largest"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        for name in ("compared", "total", "same", "counted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.finite &= other.finite


def cosine(wanted: Tensor, found: Tensor) -> float:
    """Returns the cosine similarity of two vectors; 1 if both are zero."""
    if not wanted.any() and not found.any():
        return 1.0
    return F.cosine_similarity(wanted, found, dim=0).item()


def relative_error(wanted: Tensor, error: Tensor) -> float:
    """Returns |error| / |wanted|; 0 if both are zero."""
    off, size = error.norm().item(), wanted.norm().item()
    return off / size if size else (inf if off else 0.0)


@dataclass
class OutputErrors:
    """Errors of all outputs of a file by name."""

    outputs: dict[str, OutputError] = field(default_factory=dict)

    def of(self, name: str, role: Role = "output") -> OutputError:
        """Returns the error of one output."""
        return self.outputs.setdefault(name, OutputError(role))

    def add(self, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """Adds the outputs of one image, without a batch axis."""
        for name, values in wanted.items():
            if values.is_floating_point():
                self.of(name).add(values, found[name])
            else:
                self.of(name).count(int((values == found[name]).sum()), values.numel())

    def merge(self, other: OutputErrors) -> None:
        """Adds the errors of other images."""
        for name, error in other.outputs.items():
            self.of(name, error.role).merge(error)


def split_pixels(images: Tensor, visible: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Returns the pixels `[c, n]` of hidden and of visible units of `[c, H, W]`; `visible`: bool `[h, w]`."""
    height, width = images.shape[1:]
    shown = visible.repeat_interleave(unit, 0).repeat_interleave(unit, 1)[:height, :width]
    return images[:, ~shown], images[:, shown]
