"""Ranges of settings: declared beside the field, checked whenever the settings are made.

    @dataclass(frozen=True)
    class LoaderConfig(Ranged):
        batch_size: Annotated[int, Range(1, 65536)] = 256
        crop: Annotated[tuple[float, float], Range(0, 1, above=True)] = (0.2, 1.0)

A range holds for every number of the field, also for those inside tuples, and nothing for None and words. No
range contains a value that is not finite. Command lines, JSON files and code are all checked alike, because
all of them construct the same dataclasses. What several fields have to satisfy together stays in their
`__post_init__`, which calls this one first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, get_type_hints

from coma.errors import BadInput
from coma.image_size import ImageSize

RARE = "rare"
"""Marks a field, as in `Annotated[int, RARE]`, whose flag only `--help-all` shows."""
_UNSPOKEN = 10**4
"""Bounds from here on only keep numbers away from memory and clocks; help texts leave them out."""


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`.

    Attributes:
        low: Smallest number.
        high: Largest number.
        above: `low` itself is left out.
        below: `high` itself is left out.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Returns whether `value` lies in the range; what is not finite does not."""
        high_enough = value > self.low if self.above else value >= self.low
        low_enough = value < self.high if self.below else value <= self.high
        return high_enough and low_enough and math.isfinite(value)

    def __str__(self) -> str:
        """Returns the range in words that follow "must be", without bounds that only the machine sets."""
        if not (self.above or self.below) and max(abs(self.low), abs(self.high)) < _UNSPOKEN:
            return f"{_text(self.low)} to {_text(self.high)}"
        bounds = ((self.low, self._lower()), (self.high, self._upper()))
        return " and ".join(words for bound, words in bounds if abs(bound) < _UNSPOKEN)

    def check(self, name: str, value: Any) -> None:
        """Refuses numbers outside the range.

        Args:
            name: Name of the value for users, for example `--batch-size`.
            value: A number, a tuple that may hold some, or anything else, which passes.

        Raises:
            OutOfRange: naming the value and the range.
        """
        value = value.plain if isinstance(value, ImageSize) else value  # one number, if it is square
        for number in _numbers(value):
            if number not in self:
                separator = ":" if isinstance(value, tuple | list) else ""
                raise OutOfRange(f"{name}{separator}", f"{_text(number)} must be {self._broken_by(number)}")

    def _broken_by(self, number: float) -> str:
        """Returns the rule that a number outside the range breaks."""
        if abs(self.high) < _UNSPOKEN or number != number:
            return str(self) or "a number"
        return self._upper() if number >= self.high else self._lower()

    def _lower(self) -> str:
        return f"{'more than' if self.above else 'at least'} {_text(self.low)}"

    def _upper(self) -> str:
        return f"{'less than' if self.below else 'at most'} {_text(self.high)}"


class OutOfRange(BadInput):
    """A setting outside the range of its field; the message names the flag, the value and the range."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # what it is unpickled from
        self.name = name.removeprefix("--").removesuffix(":")
        """The flag without its dashes."""
        self.in_file = f"{name.removeprefix('--')} {reason}"
        """Message for readers of a file, which has fields in place of flags."""

    def __str__(self) -> str:
        """Returns the message."""
        return " ".join(self.args)


SEED = Range(-(2**63), 2**63 - 1)
"""Whole numbers of 64 bits."""
SIDE = Range(1, 16384)
"""Sides of images, crops and patches in pixels."""
TILE = Range(32, 16384)
"""Sides of the windows of large images in pixels."""
BATCH = Range(1, 2**20)
"""Images at a time."""
STEPS = Range(1, 10**12)
"""Numbers of steps, and steps between two events."""
IMAGES = Range(0, 10**12)
"""Numbers of images, of which 0 stands for all."""
CHANNELS = Range(1, 16)
BUDGET = Range(0, 1e30, above=True)
"""Amounts of images, views, seconds or operations."""
JOBS = Range(1, 4096)
"""Processes or threads side by side."""
MINUTES = Range(0, 10**6, above=True)
PROCESSES = Range(0, 4096)
"""Worker processes."""
EPOCHS = Range(0, 10**6, above=True)
RATE = Range(0, 1e4, above=True)
"""Learning rates."""
WEIGHT_DECAY = Range(0, 1e4)
DEPTH = Range(1, 256)
"""Transformer blocks."""
HEADS = Range(1, 1024)
VIEWS = Range(2, 1024)
WIDTH = Range(4, 16384)
"""Channels of a transformer."""
SHARE = Range(0, 1)
INSIDE = Range(0, 1, above=True, below=True)
"""Shares that may be neither nothing nor everything."""
DECAY = Range(0, 1, below=True)
"""Shares that may not be everything: of moving averages, stochastic depth, label smoothing."""
MEAN = Range(-1e9, 1e9)
"""Means of pixel values: any that are finite."""
STD = Range(1e-9, 1e9)
"""Standard deviations of pixel values; smaller ones would make normalised pixels overflow."""


class Ranged:
    """Base of dataclasses whose fields declare ranges; it checks them when an instance is made."""

    flags: ClassVar[str] = "--"
    """Prefix of the flags of these settings on the command line."""

    def __post_init__(self) -> None:
        for name, allowed in ranges_of(type(self)).items():
            allowed.check(self.flags + name.replace("_", "-"), getattr(self, name))


@cache
def ranges_of(kind: type) -> Mapping[str, Range]:
    """Returns the ranges that the fields of a dataclass declare, by field name."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: extra
        for field in fields(kind)
        for extra in getattr(hints[field.name], "__metadata__", ())
        if isinstance(extra, Range)
    }


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _numbers(part)


def _text(number: float) -> str:
    if isinstance(number, int) and abs(number) >= 10**20:
        return f"{str(number)[:6]}... ({len(str(abs(number)))} digits)"
    return str(number) if isinstance(number, int) else f"{number:.6g}"
