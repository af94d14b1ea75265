"""Height and width of images in pixels, as settings, artifacts and commands give them: 224, or 224 448."""

from __future__ import annotations

from typing import Any, NamedTuple

from coma.errors import BadInput


class ImageSize(NamedTuple):
    """Height and width in pixels. As text it is `224`, or `224 x 448` where the two differ."""

    height: int
    width: int

    @classmethod
    def of(cls, value: Any) -> ImageSize:
        """Returns a size: one number is both sides of a square, two are height and width.

        Raises:
            BadInput: anything else.
        """
        sides = (value, value) if isinstance(value, int) else value
        whole = isinstance(sides, tuple | list) and all(type(side) is int for side in sides)
        if not whole or len(sides) != 2:
            raise BadInput(f"{value!r} must be a whole number, or two: height and width")
        return cls(*sides)

    @classmethod
    def parse(cls, text: str) -> ImageSize:
        """Returns the size in a text: one whole number, or two with spaces between them.

        Raises:
            ValueError: anything else.
        """
        words = text.split()
        try:
            sides = [int(word) for word in words]  # refuses numbers of more digits than Python converts
            return cls.of(sides[0] if len(sides) == 1 else sides)
        except (ValueError, BadInput):
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise ValueError(f"{shown!r} must be a whole number, or two: height and width") from None

    @property
    def plain(self) -> int | list[int]:
        """The size as files hold it: one number if it is square, else height and width."""
        return self.height if self.height == self.width else [*self]

    @property
    def words(self) -> str:
        """The size as flags take it."""
        return str(self).replace(" x", "")

    def __str__(self) -> str:
        return f"{self.height}" if self.height == self.width else f"{self.height} x {self.width}"
