"""Images and labels that a CSV file lists, one image per line.

    image,label                 one class for each image
    image,labels                any number of classes, separated by ; or |
    image,cat,dog,horse         a column of 0 and 1 for each class: any number of classes

The first column holds paths, relative to the folder of the CSV file. A column `split` (train, val, test) may
divide the images; otherwise a folder has one file per split: `train.csv`, `val.csv` and `test.csv`, or
`_classes.csv` in a folder per split (as Roboflow writes it), or one `labels.csv` with a column `split`.
"""

from __future__ import annotations

import csv
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from coma.data.sources.base import LocalSource, Names, read_at
from coma.data.sources.image_folder import list_files, list_folders, parse_whole_numbers
from coma.errors import BadInput
from coma.messages import abridged, counted, printable
from coma.preflight import check_regular_file
from coma.splits import Split, choose_split, split_of

_ONE = ("label", "class", "category")
_ANY = ("labels", "classes", "categories", "tags")
_SPLIT = "split"
_IN_FOLDER = "_classes.csv"
_WHOLE = "labels.csv"
_NAMED = 3
"""Most lines of one kind, or columns, that a message names."""


class TableSource(LocalSource):
    """The images that a CSV file lists, with their labels."""

    labels_are_stored = False

    def __init__(self, table: Path, split: str | None = None, *, held_out: bool = False) -> None:
        """Reads the file and looks for every image.

        Args:
            table: The CSV file.
            split: See `open_source`; needs a column `split`, without which all images are read.
            held_out: See `open_source`.

        Raises:
            BadInput: Not a table of this form, an image that is missing or listed twice, or values that are
                no labels; the message names file and line.
        """
        check_regular_file(table, "give a CSV file")
        header, rows = _read(table)
        if _SPLIT in header[1:]:
            rows, chosen = _rows_of_split(table, header, rows, split, held_out)
            header = [name for name in header if name != _SPLIT]
        elif split is not None:
            raise BadInput(
                f"{table}: has no column {_SPLIT!r} of train, val and test; add it, or give a folder "
                "with a file for each split (train.csv, test.csv)"
            )
        else:
            chosen = split_of(table.stem) or split_of(table.parent.name)
        if len(header) < 2:
            raise BadInput(f"{table}: has no column of labels")
        names, multi_hot = _classes(table, header, rows)
        labels = None if header[1].lower() not in _ONE else multi_hot.argmax(axis=1)
        super().__init__(table, labels, names)
        if labels is None:
            self.unlabelled_reason = "its images have any number of classes, which coma classify takes"
            self._multi_hot = torch.from_numpy(multi_hot)
        paths = [row[0] for _, row in rows]
        self._folder, self.split, self._paths = table.parent, chosen, Names(paths)
        self._lines = torch.tensor([line for line, _ in rows])
        self._sizes = torch.tensor(_sizes(table, rows))

    def __len__(self) -> int:
        """Returns the number of lines."""
        return len(self._paths)

    def path(self, i: int) -> Path:
        """Returns the path of an image."""
        return self._folder / self._paths[i]

    def describe(self, i: int) -> str:
        """Returns the path of an image, for messages."""
        return printable(str(self.path(i)))

    def label_place(self, i: int) -> str:
        """Returns file and line of the label of an image."""
        return f"{printable(str(self.location))}:{int(self._lines[i])}"

    def summary(self) -> str:
        """Returns one line: the number of images and classes, and how many classes an image has."""
        told = f"{printable(str(self.location))}: {counted(len(self), 'image')}"
        told += f", {counted(len(self.class_names or ()), 'class', 'classes')}"
        if self._multi_hot is None:
            return told
        per_image = self._multi_hot.sum(dim=1)
        without = int((per_image == 0).sum())
        told += f", {per_image.double().mean():.2g} per image"
        return f"{told}, {without:,} images without any" if without else told

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns the paths as the file has them, and the sizes of the images in bytes."""
        return list(self._paths), self._sizes.tolist()

    def read_bytes(self, i: int) -> bytes:
        """Returns the content of an image file."""
        return read_at(self.path(i), 0, int(self._sizes[i]), self.describe(i))


def find_table(
    folder: Path, split: str | None = None, *, held_out: bool = False
) -> tuple[Path, str | None] | None:
    """Returns the CSV file in a folder that lists the images of a split, and the split to read from it.

    The split is None if the file is of this split alone. Without such a file, the result is None.

    Args:
        folder: Data set.
        split: See `open_source`.
        held_out: See `open_source`.

    Raises:
        BadInput: There are such files, but not of this split.
    """
    if not folder.is_dir():
        return None
    found: dict[Split, Path] = {}
    files = list_files(folder)
    for name in files:
        if name.lower().endswith(".csv") and (of := split_of(name[:-4])):
            found.setdefault(of, folder / name)
    if not found:
        for name in list_folders(folder):
            if (of := split_of(name)) and (folder / name / _IN_FOLDER).is_file():
                found.setdefault(of, folder / name / _IN_FOLDER)
    if not found:
        whole = [name for name in (_WHOLE, _IN_FOLDER) if name in files]
        return (folder / whole[0], split) if whole else None
    chosen = choose_split(found, folder, split, held_out)
    return None if chosen is None else (found[chosen], None)


def _read(table: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Returns the header, and the other rows with their line numbers."""
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            for row in reader:
                line = reader.line_num
                if any(row):
                    rows.append((line, [cell.strip() for cell in row]))
    except OSError as error:
        raise BadInput(f"{table}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadInput(f"{table}: is not UTF-8 text; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise BadInput(f"{table}:{line + 1}: not CSV ({error}); quote cells with commas") from None
    if not rows:
        raise BadInput(f"{table}: is empty; give a line of column names, then a line for each image")
    header = rows[0][1]
    lower = [name.lower() for name in header]
    header = [_SPLIT if name == _SPLIT else own for name, own in zip(lower, header, strict=True)]
    if len(header) < 2:
        hint = "; separate its columns by commas" if re.search("[;\t]", header[0]) else ""
        raise BadInput(f"{table}:{rows[0][0]}: has one column; give paths and labels{hint}")
    if not header[0]:
        raise BadInput(f"{table}:{rows[0][0]}: its first column has no name; give the paths first, no index")
    if "" in header or len(set(header)) < len(header):
        twice = [name or "(no name)" for name, count in Counter(header).items() if count > 1 or not name]
        raise BadInput(f"{table}:{rows[0][0]}: columns need different names: {', '.join(twice)}")
    if len(rows) == 1:
        raise BadInput(f"{table}: lists no image; give a line for each")
    for line, row in rows:
        if len(row) != len(header):
            found = counted(len(row), "cell")
            raise BadInput(f"{table}:{line}: has {found} for {len(header)} columns; quote cells with commas")
    return header, rows[1:]


def _rows_of_split(
    table: Path,
    header: list[str],
    rows: list[tuple[int, list[str]]],
    split: str | None,
    held_out: bool,
) -> tuple[list[tuple[int, list[str]]], Split | None]:
    """Returns the rows of the split to read, without the column `split`, and the split."""
    at = header.index(_SPLIT)
    of_row: list[Split] = []
    for line, row in rows:
        of = split_of(row[at])
        if of is None:
            raise BadInput(f"{table}:{line}: split is {row[at]!r}; give train, val or test")
        of_row.append(of)
    chosen = choose_split(set(of_row), table, split, held_out)
    kept = [
        (line, row[:at] + row[at + 1 :]) for (line, row), of in zip(rows, of_row, strict=True) if of == chosen
    ]
    return kept, chosen


def _classes(
    table: Path, header: Sequence[str], rows: Sequence[tuple[int, list[str]]]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the class names and the classes of every image, bool `[n, classes]`."""
    kind = header[1].lower()
    if kind in (*_ONE, *_ANY):
        if len(header) > 2:
            raise BadInput(
                f"{table}: has the column {header[1]!r} and others beside it: "
                f"{printable(abridged(header[2:], _NAMED))}; delete the others, or rename {header[1]!r} if "
                "all are classes of 0 and 1"
            )
        cells = [[part.strip() for part in re.split("[;|]", row[1]) if part.strip()] for _, row in rows]
        for (line, _), labels in zip(rows, cells, strict=True):
            if kind in _ONE and len(labels) != 1:
                what = "no label" if not labels else f"{len(labels)} labels"
                raise BadInput(
                    f"{table}:{line}: has {what} in the column {header[1]!r}; give one, or call the column "
                    "'labels' for any number of classes per image"
                )
        names = sorted({label for labels in cells for label in labels})
        if not names:
            raise BadInput(f"{table}: no image has a label")
        values = parse_whole_numbers(names)
        names = sorted(names, key=values.__getitem__) if values else names
        place = {name: i for i, name in enumerate(names)}
        multi_hot = np.zeros((len(rows), len(names)), bool)
        for i, labels in enumerate(cells):
            multi_hot[i, [place[label] for label in labels]] = True
        return tuple(map(printable, names)), multi_hot
    for line, row in rows:
        for name, cell in zip(header[1:], row[1:], strict=True):
            if cell not in ("0", "1", "0.0", "1.0"):
                raise BadInput(
                    f"{table}:{line}: column {name!r} holds {cell!r}; give 0 or 1 in a column for each "
                    "class, or one column 'label' or 'labels' with names"
                )
    multi_hot = np.array([[cell[0] == "1" for cell in row[1:]] for _, row in rows], bool)
    return tuple(map(printable, header[1:])), multi_hot


def _sizes(table: Path, rows: Sequence[tuple[int, list[str]]]) -> list[int]:
    """Returns the sizes of the images in bytes.

    Raises:
        BadInput: An image is listed twice, is missing, or is no regular file.
    """
    first: dict[str, int] = {}
    missing, sizes = [], []
    for line, (name, *_) in rows:
        path, shown = os.path.normpath(name), f"line {line}: {printable(name) or '(no path)'}"
        if path in first:
            raise BadInput(
                f"{table}:{line}: {printable(name)} is listed in line {first[path]} too; give all labels of "
                "an image in one line"
            )
        first[path] = line
        try:
            status = os.stat(table.parent / name)
        except (OSError, ValueError) as error:
            missing.append(f"{shown} ({getattr(error, 'strerror', error)})")
            continue
        if not stat.S_ISREG(status.st_mode):
            missing.append(f"{shown} (not a file)")
            continue
        sizes.append(status.st_size)
    if missing:
        raise BadInput(
            f"{table}: {counted(len(missing), 'image')} of {len(rows):,} cannot be found in {table.parent}: "
            f"{abridged(missing, _NAMED)}; paths are relative to the folder of the CSV file"
        )
    return sizes
