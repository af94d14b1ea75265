"""Input shapes of an exported file as min:opt:max: `--shapes 1x3x224x224:8x3x224x224:32x3x224x224`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from coma.errors import BadInput
from coma.ranges import BATCH, SIDE, Ranged

MOST_PIXELS = 2**29
"""Maximum number of pixels in a batch: with three channels in fp32 its tensor takes 6 GB."""
EXAMPLE = "1x3x224x224:8x3x224x224:32x3x224x224"


@dataclass(frozen=True, order=True)
class Shape(Ranged):
    """Number of images in a batch, and their height and width in pixels."""

    flags = "--shapes "

    batch: Annotated[int, BATCH]
    height: Annotated[int, SIDE]
    width: Annotated[int, SIDE]

    def __str__(self) -> str:
        return f"{self.batch} x {self.height} x {self.width}"


@dataclass(frozen=True)
class Shapes:
    """Minimum, optimal and maximum shape; axes that differ between minimum and maximum are dynamic.

    Raises:
        BadInput: the shapes are not in ascending order along every axis.
    """

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        for axis in ("batch", "height", "width"):
            low, middle, high = (getattr(each, axis) for each in (self.min, self.opt, self.max))
            if not low <= middle <= high:
                raise BadInput(f"--shapes {axis} {low}:{middle}:{high} must be in ascending order")

    @property
    def dynamic(self) -> frozenset[str]:
        """The dynamic axes among batch, height and width."""
        axes = ("batch", "height", "width")
        return frozenset(a for a in axes if getattr(self.min, a) != getattr(self.max, a))

    def allows(self, shape: Shape) -> bool:
        """Whether a shape lies between minimum and maximum."""
        axes = ("batch", "height", "width")
        return all(getattr(self.min, a) <= getattr(shape, a) <= getattr(self.max, a) for a in axes)

    def check(self, unit: int) -> None:
        """Refuses images smaller than a mask unit of `unit` pixels, and batches that fit into no memory.

        Raises:
            BadInput: the minimum is too small or the maximum too large.
        """
        check_pixels(self.max, "--shapes")
        if min(self.min.height, self.min.width) < unit:
            raise BadInput(
                f"--shapes: {self.min.height} x {self.min.width} px is smaller than the encoder's mask "
                f"unit of {unit} x {unit} px"
            )


def check_pixels(shape: Shape, flag: str) -> None:
    """Refuses a batch of more than `MOST_PIXELS` pixels.

    Raises:
        BadInput: the batch has more pixels.
    """
    pixels = shape.batch * shape.height * shape.width
    if pixels > MOST_PIXELS:
        raise BadInput(
            f"{flag}: {shape} px is a batch of {pixels:.1e} pixels; give at most {MOST_PIXELS:.1e}"
        )


def parse_shapes(text: str, channels: int) -> Shapes:
    """Parses one static shape, or min:opt:max; each is NxCxHxW or NxHxW.

    Raises:
        BadInput: the text has another form, or another number of channels than the model.
    """
    parts = [_parse_shape(part, channels, text) for part in text.lower().replace(" ", "").split(":")]
    if len(parts) == 1:
        return Shapes(parts[0], parts[0], parts[0])
    if len(parts) != 3:
        raise BadInput(f"--shapes {text!r}: give one shape, or three: min:opt:max, for example {EXAMPLE}")
    return Shapes(*parts)


def _parse_shape(text: str, channels: int, whole: str) -> Shape:
    try:
        numbers = [int(number) for number in text.split("x")]
    except ValueError:
        numbers = []
    if len(numbers) == 4:
        if numbers[1] != channels:
            raise BadInput(f"--shapes {whole!r}: {numbers[1]} channels, but the model takes {channels}")
        del numbers[1]
    if len(numbers) != 3:
        raise BadInput(f"--shapes {whole!r}: {text!r} is not NxCxHxW; for example {EXAMPLE}")
    return Shape(*numbers)
