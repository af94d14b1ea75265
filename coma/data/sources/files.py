"""Images that are named one by one, and all images of folders, whatever their splits."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from coma.data.sources.base import EncodedSource, Names, Source
from coma.data.sources.image_folder import find_images
from coma.data.sources.open import open_source
from coma.errors import BadImage, BadInput
from coma.messages import printable
from coma.paths import Address, Location
from coma.preflight import check_regular_file

log = logging.getLogger(__name__)

_PACKED = (".npz", ".tar", ".csv")


class FileSource(EncodedSource):
    """Image files by their paths.

    Args:
        paths: The files, at least one.
        location: Where they are, for messages.
    """

    def __init__(self, paths: Iterable[Path], location: Location) -> None:
        super().__init__(location)
        self._paths = Names(map(str, paths))

    def __len__(self) -> int:
        """Returns the number of files."""
        return len(self._paths)

    def describe(self, i: int) -> str:
        """Returns the path of an image, for messages."""
        return printable(self._paths[i])

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns the paths, and the sizes of the files in bytes; 0 for those that are gone."""
        names = list(self._paths)
        return names, [os.stat(name).st_size if os.path.isfile(name) else 0 for name in names]

    def read_bytes(self, i: int) -> bytes:
        """Returns the content of an image file."""
        try:
            return Path(self._paths[i]).read_bytes()
        except OSError as error:
            raise BadImage(f"{self.describe(i)}: cannot be read ({error.strerror})") from None


def images_below(folder: Path) -> list[Path]:
    """Returns all images below a folder, sorted, of all its splits; how many they are is logged.

    Raises:
        BadInput: there is none.
    """
    names, inventory = find_images(folder)
    if not names:
        raise BadInput(f"{folder}: no image in this folder; it holds {inventory.skipped() or 'nothing'}")
    log.info(inventory.summary(folder), extra={"once": True})
    return [folder / name for name in sorted(names)]


def open_all_images(paths: Sequence[Location]) -> Source:
    """Opens image files and all images below folders, each file once; or one pack, shard, CSV file, address.

    In contrast to `open_source`, the images of all splits of a folder are read.

    Raises:
        BadInput: a path does not exist, or is no regular file; or there is no image.
    """
    first = paths[0]
    if len(paths) == 1 and (
        isinstance(first, Address) or (first.suffix.lower() in _PACKED and not first.is_dir())
    ):
        return open_source(first)
    files: dict[Path, None] = {}
    for path in paths:
        if isinstance(path, Address):
            raise BadInput(f"{path}: give an address alone, without other images")
        if path.is_dir():
            files |= dict.fromkeys(images_below(path))
        else:
            check_regular_file(path, "give image files, or folders of images")
            files[path] = None
    return FileSource(files, first if len(paths) == 1 else Path("images"))
