"""Errors between the outputs of PyTorch and of a file, accumulated image by image."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

SURE = 0.3
"""Minimum score of the reference's detections that must match."""
_BEST = 10  # detections per image if none has that score
_SAME_PLACE = 0.9  # minimum intersection over union of a match


@dataclass
class OutputError:
    """Error of one output over all images.

    Attributes:
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

    def of(self, name: str) -> OutputError:
        """Returns the error of one output."""
        return self.outputs.setdefault(name, OutputError())

    def add(self, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """Adds the outputs of one image, without a batch axis."""
        if "boxes" in wanted:
            self._add_detections(wanted, found)
            return
        for name, values in wanted.items():
            if values.is_floating_point():
                self.of(name).add(values, found[name])
            else:
                self.of(name).count(int((values == found[name]).sum()), values.numel())

    def _add_detections(self, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        # nearly equal scores make the order of detections arbitrary, so they are matched first; both ways, so
        # that duplicates and inventions count like missing detections
        for name in ("boxes", "scores"):
            if not found[name].isfinite().all() or not wanted[name].isfinite().all():
                self.of(name).add(wanted[name], found[name])
                return
        pairs, sought = match(wanted, found)
        back, found_back = match(found, wanted)
        self.of("labels").count(len(pairs) + len(back), sought + found_back)
        if pairs:
            ours, theirs = map(list, zip(*pairs, strict=True))
            for name in ("boxes", "scores", "masks"):
                if name in wanted:
                    self.of(name).add(wanted[name][ours], found[name][theirs])


def match(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[list[tuple[int, int]], int]:
    """Matches detections of one image that have the same class and nearly the same box.

    Args:
        wanted: boxes `[n, 4]`, scores `[n]` in descending order, and labels `[n]`; empty slots have score 0.
        found: Detections in the same form.

    Returns:
        Pairs of indices into the two lists, and the number of detections to match: those with a score of at
        least `SURE`, or the best few.
    """
    there = int((wanted["scores"] > 0).sum())
    sought = int((wanted["scores"] >= SURE).sum()) or min(there, _BEST)
    overlap = box_iou(wanted["boxes"][:sought].float(), found["boxes"].float())
    overlap[wanted["labels"][:sought, None] != found["labels"]] = 0
    overlap[:, found["scores"] <= 0] = 0
    pairs = []
    for ours in range(sought):
        theirs = int(overlap[ours].argmax())
        if overlap[ours, theirs] >= _SAME_PLACE:
            pairs.append((ours, theirs))
            overlap[:, theirs] = 0
    return pairs, sought


def split_pixels(images: Tensor, visible: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Returns the pixels `[c, n]` of hidden and of visible units of `[c, H, W]`; `visible`: bool `[h, w]`."""
    height, width = images.shape[1:]
    shown = visible.repeat_interleave(unit, 0).repeat_interleave(unit, 1)[:height, :width]
    return images[:, ~shown], images[:, shown]
