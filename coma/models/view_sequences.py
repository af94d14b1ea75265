"""From images to sequences and back: each view of each sample is a sequence of its own units only.

    units      [b, h*w, ...]   every unit of every image, row by row
    sequences  [n, s, ...]     n = b * views sequences of s units: all views of a sample, then the next sample

Encoders compute on sequences. Units of different views never meet in one, so nothing has to keep views apart,
pooling over a sequence is pooling over a view, and units that no view sees cost nothing. Where views differ
in size (25 and 24 of 49 units), the shorter sequences end in slots that are not `real`: they hold some unit,
nothing attends to them, and nothing reads them back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coma.errors import BadInput


@dataclass(frozen=True)
class ViewSequences:
    """Which unit lies in which slot of which sequence.

    Attributes:
        rows: Units along the height of an image.
        cols: Units along the width.
        group: View of every unit, int64 `[b, rows, cols]`, -1 for units no view sees; None: one sequence
            an image, its units in order, and all other attributes None.
        unit_of: Unit in every slot, int64 `[n, s]`; None: every unit lies in its own.
        slot_of: Slot of every unit among its sample's sequences laid end to end, int64 `[b, rows*cols]`;
            None: its own.
        real: Slots that hold a unit of their view, bool `[n, s]`; None: all of them.
        unseen: Units that no view sees, bool `[b, rows*cols]`; None: there is none.
    """

    rows: int
    cols: int
    group: Tensor | None = None
    unit_of: Tensor | None = None
    slot_of: Tensor | None = None
    real: Tensor | None = None
    unseen: Tensor | None = None

    def gather(self, units: Tensor) -> Tensor:
        """Deal units out: `[b, rows*cols, ...]` -> `[n, s, ...]`."""
        if self.unit_of is None:
            return units
        return _take(units, self.unit_of.view(len(units), -1)).view(*self.unit_of.shape, *units.shape[2:])

    def scatter(self, x: Tensor) -> Tensor:
        """Put units back: `[n, s, ...]` -> `[b, rows*cols, ...]`, zeros for units that no view sees."""
        units = x
        if self.slot_of is not None:
            units = _take(x.reshape(len(self.slot_of), -1, *x.shape[2:]), self.slot_of)
        if self.unseen is None:
            return units
        return units.masked_fill(self.unseen.view(*self.unseen.shape, *[1] * (x.ndim - 2)), 0)

    def at(self, table: Tensor) -> Tensor:
        """Returns the rows of `table [rows*cols, ...]` that belong to every slot: `[n or 1, s, ...]`."""
        if self.unit_of is None:
            return table[None]
        return table.index_select(0, self.unit_of.flatten()).unflatten(0, self.unit_of.shape)

    def attended(self, prefix: int) -> Tensor | None:
        """Returns the tokens to attend to, bool `[n, 1, 1, prefix + s]`; all where None."""
        return None if self.real is None else F.pad(self.real, (prefix, 0), value=True)[:, None, None]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over every sequence: `[n, s, t, c]` -> `[n, 1, 1, c]`."""
        if self.real is None:
            return x.mean(dim=(1, 2), keepdim=True)
        share = self.real / self.real.sum(dim=1, keepdim=True).clamp(min=1)
        units = x.mean(dim=2)  # n s c
        return (share.to(x.dtype)[:, None] @ units)[:, None]


def image_sequences(
    rows: int, cols: int, group: Tensor | None = None, sizes: Sequence[int] | None = None
) -> ViewSequences:
    """Returns the sequences of a batch of images.

    Args:
        rows: Units along the height of an image.
        cols: Units along the width.
        group: View of every unit, int64 `[b, rows, cols]`, -1 for units that no view sees; None: every
            image is one sequence of all its units.
        sizes: Units in each view, the same in every sample. When not given they are counted, which waits
            for the device, and may then differ from sample to sample.

    Raises:
        BadInput: on a CPU, `sizes` are not those of `group`.
    """
    if group is None:
        return ViewSequences(rows, cols)
    if is_exporting():
        return one_view_in_place(rows, cols, group)
    flat, device = group.flatten(1), group.device
    b, units = flat.shape
    views = len(sizes) if sizes else max(int(flat.max()) + 1, 1)
    if sizes is None or _readable(group):
        counts = torch.stack([(flat == view).sum(dim=1) for view in range(views)], dim=1)  # b views
        if sizes and not all(row == list(sizes) for row in counts.tolist()):
            raise BadInput(f"sizes {tuple(sizes)} are not how many units the group map gives to each view")
    else:
        counts = torch.stack([torch.full((b,), size, device=device) for size in sizes or ()], dim=1)
    if sizes:
        longest, even, complete = max(sizes), len(set(sizes)) == 1, sum(sizes) == units
    else:
        longest = max(int(counts.max()), 1)
        even, complete = bool((counts == longest).all()), bool((flat >= 0).all())

    # Units sorted by view: those that no view sees first, then view after view.
    order = flat.argsort(dim=1, stable=True)
    starts = units - counts.sum(dim=1, keepdim=True) + counts.cumsum(dim=1) - counts
    place = torch.arange(longest, device=device)
    last = (counts - 1).clamp(min=0)[:, :, None]
    slots = (starts[:, :, None] + place.minimum(last)).clamp(max=units - 1).flatten(1)
    unit_of = order.gather(1, slots)
    real = place < counts[:, :, None]  # b views longest

    # The inverse; slots that are not real write beyond the end, units without a slot name any.
    target = torch.where(real.flatten(1), unit_of, units)
    slot_of = (torch.arange(units + 1, device=device) % (views * longest)).repeat(b, 1)
    slot_of.scatter_(1, target, torch.arange(views * longest, device=device).expand_as(target))
    return ViewSequences(
        rows,
        cols,
        group,
        unit_of.view(b * views, longest),
        slot_of[:, :-1],
        real=None if even else real.flatten(0, 1),
        unseen=None if complete else flat < 0,
    )


def one_view_in_place(rows: int, cols: int, group: Tensor) -> ViewSequences:
    """One view an image, every unit in its own slot: what graphs take whose shapes cannot follow values.

    The same results as `image_sequences` gives, at the cost of the whole image.

    Args:
        rows: Units along the height of an image.
        cols: Units along the width.
        group: 0 for units that the view sees, -1 for others, int64 `[b, rows, cols]`.
    """
    real = (group >= 0).flatten(1)
    return ViewSequences(rows, cols, group, real=real, unseen=~real)


def listed_units(rows: int, cols: int, listed: Tensor) -> ViewSequences:
    """One view an image, given as a list of units: only these are computed, in graphs for other programs too.

    Args:
        rows: Units along the height of an image.
        cols: Units along the width.
        listed: Units that the view sees, each once, in any order: int64 `[b, s]`.
    """
    place = torch.arange(rows * cols, device=listed.device)
    here = (listed[:, :, None] == place).long()  # b s units
    slot_of = (here * torch.arange(listed.shape[1], device=listed.device)[:, None]).sum(dim=1)
    unseen = here.sum(dim=1) == 0
    group = (-unseen.long()).unflatten(1, (rows, cols))
    return ViewSequences(rows, cols, group, listed, slot_of, unseen=unseen)


def _readable(x: Tensor) -> bool:
    # whether looking at values waits for nobody: on a CPU, and not where only shapes are traced
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def _take(x: Tensor, index: Tensor) -> Tensor:
    # b n ..., b m -> b m ...: whole units are copied, row by row
    b, n = x.shape[:2]
    places = index + torch.arange(b, device=x.device)[:, None] * n
    return x.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, index.shape)


def is_exporting() -> bool:
    """Whether a graph for other programs is made (`torch.export`, not strict), as `torch.onnx.export` does.

    Inside `torch.compile`, torch's function of this name is always true (seen in 2.11).
    """
    return _as_exported or (torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling())


@contextmanager
def computed_as_exported() -> Iterator[None]:
    """Makes models compute in PyTorch as their exported graphs do, so that all tensors inside are alike."""
    global _as_exported
    before, _as_exported = _as_exported, True
    try:
        yield
    finally:
        _as_exported = before


_as_exported = False


def has_known_size(h: int, w: int) -> bool:
    """Returns whether the sides of a map are numbers: not so in a graph that is exported for any size."""
    return isinstance(h, int) and isinstance(w, int)
