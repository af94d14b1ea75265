"""Images for exported files: the bundled photographs, a source of one's own, and an even choice of it."""

from __future__ import annotations

from pathlib import Path

from coma.data.sources.base import EncodedSource, Source, read_at
from coma.paths import Location

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "ihc.png")
"""Files in the data folder of scikit-image."""


class Photographs(EncodedSource):
    """Photographs bundled with scikit-image: the default images for verification."""

    def __init__(self) -> None:
        import skimage

        self._folder = Path(skimage.__file__).parent / "data"
        super().__init__(self._folder)

    def __len__(self) -> int:
        """Returns the number of photographs."""
        return len(PHOTOGRAPHS)

    def describe(self, i: int) -> str:
        """Returns the path of the file."""
        return str(self._folder / PHOTOGRAPHS[i])

    def read_bytes(self, i: int) -> bytes:
        """Returns the content of the file."""
        path = self._folder / PHOTOGRAPHS[i]
        return read_at(path, 0, path.stat().st_size, path.name)


def open_images(place: Location | None, *, held_out: bool = False) -> Source:
    """Opens the images at `place` (a folder, with or without a subfolder per class, .npz or .tar shards).

    Without a place, the bundled photographs are used. In a folder with splits, the training images are used,
    or those of test or val if `held_out`.

    Raises:
        BadInput: `place` holds no images that can be read.
    """
    from coma.data.sources.open import open_source

    return Photographs() if place is None else open_source(place, held_out=held_out)


def evenly_spaced(count: int, most: int) -> list[int]:
    """Returns up to `most` evenly spaced numbers below `count`, including the first and the last."""
    most = min(most, count)
    return [round(i * (count - 1) / max(most - 1, 1)) for i in range(most)]
