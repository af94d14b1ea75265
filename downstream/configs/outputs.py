"""What a backbone hands to neck and heads, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from coma.errors import BadInput


@dataclass(frozen=True)
class Outputs:
    """What a backbone hands to neck and heads.

    Attributes:
        channels: Channels of every map.
        strides: Pixels per position of every map.
        unused: Numbers of maps that neck and heads ignore; these are zeros without layers of their own.
        class_token: Every map comes in a pair with its mean over all positions `[b, c]`, the class token.
        image: The image itself comes first.
        single: In evaluation the map of this number is output alone, not in a tuple.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    unused: tuple[int, ...] = ()
    class_token: bool = False
    image: bool = False
    single: int | None = None

    def __post_init__(self) -> None:
        maps = len(self.channels)
        if not maps or maps != len(self.strides) or min(*self.channels, *self.strides) < 1:
            raise BadInput(
                f"outputs: give as many channels {self.channels} as strides {self.strides}, from 1 on"
            )
        numbers = {*self.unused, *([] if self.single is None else [self.single])}
        if not numbers <= set(range(maps)) or len(set(self.unused)) == maps:
            raise BadInput(
                f"outputs: unused {self.unused} and single {self.single} must be numbers of {maps} maps"
            )
