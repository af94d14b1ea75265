"""From images to sequences and back: each view of each sample is a sequence of its own units only.

    units      [b, h*w, ...]   every unit of every image, row by row
    sequences  [n, s, ...]     n = b * views sequences of s units: all views of a sample, then the next sample

Encoders compute on sequences. Units of different views never meet in one, so views need no attention mask,
pooling over a sequence is pooling over a view, and units that no view sees cost nothing. Where views differ
in size, the shorter sequences are filled up with copies of one of their units; `filled` says which slots
count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Which unit lies in which slot of which sequence.

    Attributes:
        rows: Units along the height of an image.
        cols: Units along the width.
        group: View of every unit, int64 `[b, rows, cols]`, -1 for units no view sees; None: one sequence
            an image, its units in order, and all other attributes None.
        unit_of: Unit in every slot, int64 `[n, s]`.
        slot_of: Slot of every unit among its sample's sequences laid end to end, int64 `[b, rows*cols]`.
        filled: Slots that count, bool `[n, s]`; None: all of them.
    """

    rows: int
    cols: int
    group: Tensor | None = None
    unit_of: Tensor | None = None
    slot_of: Tensor | None = None
    filled: Tensor | None = None

    def gather(self, units: Tensor) -> Tensor:
        """Deal units out: `[b, rows*cols, ...]` -> `[n, s, ...]`."""
        if self.unit_of is None:
            return units
        return _take(units, self.unit_of.view(len(units), -1)).view(*self.unit_of.shape, *units.shape[2:])

    def scatter(self, x: Tensor) -> Tensor:
        """Put units back: `[n, s, ...]` -> `[b, rows*cols, ...]`, zeros for units that no view sees."""
        if self.group is None or self.slot_of is None:
            return x
        units = _take(x.reshape(len(self.slot_of), -1, *x.shape[2:]), self.slot_of)
        seen = self.group.flatten(1) >= 0
        return units * seen.view(*seen.shape, *[1] * (x.ndim - 2)).to(x.dtype)

    def places(self, device: torch.device) -> Tensor:
        """Row and column of the unit in every slot, int64 `[n or 1, s, 2]`."""
        lines = (torch.arange(length, device=device) for length in (self.rows, self.cols))
        grid = torch.cartesian_prod(*lines)
        return grid[None] if self.unit_of is None else grid[self.unit_of]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over every sequence: `[n, s, t, c]` -> `[n, 1, 1, c]`."""
        if self.filled is None:
            return x.mean(dim=(1, 2), keepdim=True)
        share = self.filled / self.filled.sum(dim=1, keepdim=True).clamp(min=1)
        units = x.mean(dim=2)  # n s c
        return (share.to(x.dtype)[:, None] @ units)[:, None]


def image_sequences(
    rows: int, cols: int, group: Tensor | None = None, sizes: Sequence[int] | None = None
) -> Sequences:
    """The sequences of a batch of images.

    Args:
        rows: Units along the height of an image.
        cols: Units along the width.
        group: View of every unit, int64 `[b, rows, cols]`, -1 for units that no view sees; None: every
            image is one sequence of all its units.
        sizes: Units in each view, the same in every sample. When not given they are counted, which waits
            for the device, and may then differ from sample to sample.
    """
    if group is None:
        return Sequences(rows, cols)
    flat, device = group.flatten(1), group.device
    b = len(flat)
    if sizes is None:
        views = max(int(flat.max()) + 1, 1)
        counts = torch.stack([(flat == view).sum(dim=1) for view in range(views)], dim=1)  # b views
        longest = max(int(counts.max()), 1)
        even = bool((counts == longest).all())
    else:
        views, longest, even = len(sizes), max(sizes), len(set(sizes)) == 1
        counts = torch.tensor(sizes, device=device).expand(b, views)

    # Units sorted by view: those that no view sees first, then view after view.
    order = flat.argsort(dim=1, stable=True)
    starts = rows * cols - counts.sum(dim=1, keepdim=True) + counts.cumsum(dim=1) - counts
    place = torch.arange(longest, device=device)
    last = (counts - 1).clamp(min=0)[:, :, None]
    slots = (starts[:, :, None] + place.minimum(last)).clamp(max=rows * cols - 1).flatten(1)
    unit_of = order.gather(1, slots)
    filled = place < counts[:, :, None]  # b views longest

    # The inverse; copies that only fill up write beyond the end.
    target = torch.where(filled.flatten(1), unit_of, rows * cols)
    slot_of = torch.zeros(b, rows * cols + 1, dtype=torch.int64, device=device)
    slot_of.scatter_(1, target, torch.arange(views * longest, device=device).expand_as(target))
    return Sequences(
        rows,
        cols,
        group,
        unit_of.view(b * views, longest),
        slot_of[:, :-1],
        None if even else filled.flatten(0, 1),
    )


def _take(x: Tensor, index: Tensor) -> Tensor:
    # b n ..., b m -> b m ...: whole units are copied, row by row
    b, n = x.shape[:2]
    rows = index + torch.arange(b, device=x.device)[:, None] * n
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)
