"""How far two results lie apart: one image's outputs at a time, gathered over all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

SURE = 0.3
"""Least score of the reference's detections that have to be found again."""
_BEST = 10  # of each image where none is sure
_SAME_PLACE = 0.9  # intersection over union


@dataclass
class Difference:
    """Of one output, over all that was compared.

    Attributes:
        cosine: Least cosine similarity of an image; of whole numbers not taken.
        relative: Largest norm of an image's error over that of PyTorch's values: what a cosine cannot see, a
            wrong scale, it does.
        max: Largest absolute error.
        p99_9: Largest 99.9th percentile of the absolute error of an image.
        largest: Largest absolute value of PyTorch's.
        compared: Values that were compared.
        total: Sum of the absolute errors.
        same: Whole numbers that are equal, or detections that were found again.
        counted: How many of them there were.
        finite: Neither NaN nor infinite values.
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
        """Share of whole numbers, or detections, that are the same; None of other outputs."""
        return self.same / self.counted if self.counted else None

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """One image's values, floats, of any shape."""
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
        """Some whole numbers, or detections."""
        self.same += same
        self.counted += of


def cosine(wanted: Tensor, found: Tensor) -> float:
    """Cosine similarity of two vectors; 1 where both are zero."""
    if not wanted.any() and not found.any():
        return 1.0
    return F.cosine_similarity(wanted, found, dim=0).item()


def relative_error(wanted: Tensor, error: Tensor) -> float:
    """|error| / |wanted|; 0 where both are zero."""
    off, size = error.norm().item(), wanted.norm().item()
    return off / size if size else (inf if off else 0.0)


@dataclass
class Differences:
    """Of all outputs of a file, by name."""

    outputs: dict[str, Difference] = field(default_factory=dict)

    def of(self, name: str) -> Difference:
        """The difference of one output."""
        return self.outputs.setdefault(name, Difference())

    def add(self, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """One image's outputs, without a batch axis."""
        if "boxes" in wanted:
            self._add_detections(wanted, found)
            return
        for name, values in wanted.items():
            if values.is_floating_point():
                self.of(name).add(values, found[name])
            else:
                self.of(name).count(int((values == found[name]).sum()), values.numel())

    def _add_detections(self, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        # near-equal scores decide the order of detections: they are matched first, and both ways, so that one
        # that is there twice, or invented, counts like one that is missing
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
    """Detections of one image that are the same: of one class, and nearly in one place.

    Args:
        wanted: boxes `[n, 4]`, scores `[n]`, labels `[n]`, likeliest first; empty slots have the score 0.
        found: Likewise.

    Returns:
        Pairs of places in the two lists, and how many were sought: those of at least `SURE`, or the best few.
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
    """Pixels of hidden and of visible mask units: of `[c, H, W]`, by bool `[h, w]`, two of `[c, n]`."""
    height, width = images.shape[1:]
    shown = visible.repeat_interleave(unit, 0).repeat_interleave(unit, 1)[:height, :width]
    return images[:, ~shown], images[:, shown]
