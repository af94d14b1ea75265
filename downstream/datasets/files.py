"""The files of a dataset: which picture a label file is about, and which split a picture belongs to.

Only files that a search below the dataset's folder found are opened, whatever paths label files hold.
"""

from __future__ import annotations

import atexit
import copy
import hashlib
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from coma.errors import BadInput
from coma.messages import printable
from coma.splits import SPLITS, Split, split_of

HELD_OUT = 0.2
"""Share of the pictures that become the val split where a dataset has no splits."""
LARGEST_TEXT = 1 << 28
"""Largest label file of one picture, list of classes or configuration, in bytes."""
LARGEST_TABLE = 1 << 31
"""Largest JSON or CSV file of a whole dataset, in bytes: instances_train2017.json has 448 MB."""

_ROLES = {
    *("images", "image", "img", "imgs", "jpegimages", "data", "pictures", "photos", "img_dir", "leftimg8bit"),
    *("labels", "label", "annotations", "annotation", "ann_dir", "xml", "xmls", "json", "jsons", "txt"),
    *("masks", "mask", "segmentationclass", "gt", "segmentations", "main", "labelme", "obj_train_data"),
}
"""Folders that separate pictures from labels, in lower case."""
_ROLE_ENDS = re.compile(r"[_-]?(annot|annots|annotations?|labels?|masks?|images?)$", re.IGNORECASE)


_LABELS = (".txt", ".json", ".xml")
"""Endings of label files of one picture."""


def _picture_names(path: str) -> list[str]:
    """Returns the names of pictures, with or without suffix, that a label file or a path in it may mean."""
    from coma.data.decode import EXTENSIONS, WITH_EXTRA  # imports torch: only where it is needed
    from coma.data.inventory import kind_of

    name = PurePosixPath(path.replace("\\", "/")).name
    kind = kind_of(name)
    stem = name[: -len(kind)]
    if kind in _LABELS:
        return [stem]
    return [name, stem] if kind in EXTENSIONS or kind in WITH_EXTRA else [name]


class DatasetFiles:
    """All files below a folder, hidden ones and those of system folders left out."""

    def __init__(self, root: Path) -> None:
        """Searches the folder.

        Raises:
            BadInput: there is no such folder, it cannot be read, or coma wrote it.
        """
        from coma.data.decode import EXTENSIONS  # imports torch: only where it is needed
        from coma.data.inventory import Inventory, kind_of
        from coma.data.sources.image_folder import walk_files

        if not root.is_dir():
            what = "is a file, not a" if root.is_file() else "there is no"
            raise BadInput(f"{root}: {what} folder of a dataset")
        self.root = root
        self.names = sorted(walk_files(root, lambda _: Inventory()))
        self._set_images([name for name in self.names if kind_of(name) in EXTENSIONS])

    def only(self, images: Collection[str]) -> DatasetFiles:
        """Returns the same files, of which only these are pictures."""
        part = copy.copy(self)
        part._set_images(sorted(images))
        return part

    def _set_images(self, images: list[str]) -> None:
        self.images = images
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for image in self.images:
            path = PurePosixPath(image)
            self._by_name[path.name].append(image)
            if path.stem != path.name:
                self._by_name[path.stem].append(image)

    def ending(self, *suffixes: str) -> list[str]:
        """Returns the files with one of these endings, upper or lower case."""
        return [name for name in self.names if name.lower().endswith(suffixes)]

    def in_root(self, *names: str) -> list[str]:
        """Returns those of these files that lie directly in the folder."""
        return [name for name in names if (self.root / name).is_file()]

    def image_of(self, label: str, *said: str) -> str | None:
        """Returns the picture of a label file: the one of its name, or one that the file names.

        Names in full come first; only endings of pictures and label files are left out, and one at most:
        plant.1 is plant.1.jpg, never plant.jpg.

        Of pictures with the same name in several folders the one whose folder belongs to the label's.

        Args:
            label: Relative path of the label file.
            said: Names inside the file; folders before them are ignored.
        """
        for path in (label, *said):
            found = [self._by_name.get(name, []) for name in _picture_names(path)]
            near = [[image for image in each if place_of(image) == place_of(label)] for each in found]
            for images in (*near, *found):
                if len(images) == 1:
                    return images[0]
        return None

    def read(self, name: str, largest: int = LARGEST_TEXT) -> bytes:
        """Returns the content of a file.

        Raises:
            BadInput: it cannot be read, or is larger than `largest` bytes.
        """
        path = self.root / name
        try:
            if path.stat().st_size > largest:
                raise BadInput(f"{printable(str(path))}: has more than {largest >> 20} MiB; split it")
            return path.read_bytes()
        except OSError as error:
            raise BadInput(f"{printable(str(path))}: cannot be read ({error.strerror})") from None

    def text(self, name: str) -> str:
        """Returns the content of a text file in UTF-8, with or without a byte order mark.

        Raises:
            BadInput: it cannot be read, or is no text in UTF-8.
        """
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadInput(f"{printable(str(self.root / name))}: not a text file in UTF-8") from None


def place_of(name: str) -> tuple[str, ...]:
    """Returns the folders of a file without those that part pictures from labels: `train` of train/masks."""
    parts = (
        _ROLE_ENDS.sub("", part) for part in PurePosixPath(name).parts[:-1] if part.lower() not in _ROLES
    )
    return tuple(part for part in parts if part)


Splits = dict[Split, list[str]]


def splits_by_folder(names: Sequence[str]) -> Splits:
    """Returns the pictures of every split by the folders they lie in; empty if none is named like one."""
    found: Splits = {}
    for name in names:
        for part in PurePosixPath(name).parts[:-1]:
            split = split_of(part)
            if split is not None:
                found.setdefault(split, []).append(name)
                break
    return found


def splits_by_lists(files: DatasetFiles, lists: Iterable[str], say: Callable[[str], None]) -> Splits:
    """Returns the pictures of every split by text files of names, such as `ImageSets/Main/train.txt`.

    How many names have no picture is told to `say`.
    """
    found: Splits = {}
    for listing in lists:
        split = split_of(PurePosixPath(listing).stem)
        if split is None:
            continue
        names = [line.split()[0] for line in files.text(listing).splitlines() if line.split()]
        images = [
            files.image_of(f"{PurePosixPath(listing).parent.parent.parent}/{name}", name) for name in names
        ]
        found.setdefault(split, []).extend(image for image in images if image is not None)
        if lost := images.count(None):
            say(f"names in {listing} without a picture: {lost} of {len(names)}")
    return found


def choose_split(
    splits: Splits, names: Sequence[str], split: Split, data: Path, say: Callable[[str], None]
) -> list[str]:
    """Returns the pictures of a split; without any splits, one picture in five is held out as val.

    Args:
        splits: Pictures by split.
        names: All pictures.
        split: The split to read.
        data: Folder of the dataset, for messages.
        say: Called with a sentence on pictures that are held out, or are in no split.

    Raises:
        BadInput: the dataset has other splits only.
    """
    if splits:
        if split not in splits:
            there = ", ".join(f"{name} ({len(splits[name])})" for name in SPLITS if name in splits)
            raise NoSplit(
                f"{data}: no {split} split; there is {there}. Move some pictures and labels into a folder "
                f"{split}, named like the one of the others"
            )
        outside = len(set(names).difference(*splits.values()))
        if outside:
            say(f"pictures in no split, left out: {outside}")
        return sorted(set(splits[split]))
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogatepass")).digest())
    held_out = max(round(HELD_OUT * len(ordered)), 1)
    chosen = {"train": ordered[held_out:], "val": ordered[:held_out], "test": []}[split]
    if not chosen:
        raise NoSplit(f"{data}: no {split} split; put pictures and labels into folders train and {split}")
    say(
        f"no splits in {data}: {held_out} of {len(ordered)} pictures, chosen by their names, are val, the "
        "others train; folders called train and val decide otherwise"
    )
    return sorted(chosen)


class NoSplit(BadInput):
    """A dataset without the split that is asked for."""


def temporary_folder() -> Path:
    """Returns a new folder that is removed when the program ends, for labels that were converted."""
    folder = tempfile.mkdtemp(prefix="coma-labels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
