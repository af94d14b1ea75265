"""YOLO's text files: `class x y width height` or `class x1 y1 x2 y2 ...`, as fractions of the picture.

    data.yaml       names, and train, val and test: folders, or text files of names (Ultralytics, Roboflow)
    obj.names       one name a line, with train.txt beside it (darknet, CVAT's YOLO 1.1); also classes.txt
    labels/a.txt    for images/a.jpg, or a.txt beside a.jpg

Six values are a box with a score, as Ultralytics writes predictions. Keypoints (`kpt_shape`) are ignored.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import yaml

from coma.errors import BadInput
from coma.messages import abridged
from coma.splits import SPLITS, Split, split_of
from downstream.datasets.drawn import Drawn, Labelled, Reading, numbers
from downstream.datasets.files import DatasetFiles, Splits, splits_by_folder
from downstream.datasets.formats.class_lists import class_list
from downstream.datasets.validation_report import ValidationReport

LISTS = ("obj.names", "classes.txt", "labels.txt", "_darknet.labels", "predefined_classes.txt")
_NO_LABELS = {*LISTS, "requirements.txt", "readme.txt", "license.txt", "notes.txt", "labelmap.txt"}
_LARGEST_YAML = 1 << 20


def read(files: DatasetFiles, report: ValidationReport, say: Any) -> Reading | None:
    """Returns the labels of a dataset in YOLO's format; None if it is in another one."""
    described = _described(files)
    labels = _label_files(files)
    if described is None and not labels:
        return None
    config_name, config = described or ("", {})
    names = _names(files, config_name, config)
    if names is None:
        if described is None and not any(_looks_like_labels(files, name) for name in list(labels)[:20]):
            return None
        raise BadInput(
            f"{files.root}: has YOLO labels, but neither a data.yaml with names nor a classes.txt; "
            "write one with one name a line"
        )
    splits = _splits(files, config_name, config, say)
    keypoints = "kpt_shape" in config
    pictures = [
        Labelled(image, label, _objects(files, label, names, keypoints, report))
        for label, image in labels.items()
    ]
    title = f"YOLO ({config_name})" if config_name else "YOLO"
    return Reading(title, names, pictures, splits, empty_are_labelled=True)


def _described(files: DatasetFiles) -> tuple[str, dict[str, Any]] | None:
    """Returns the name and the content of the data.yaml."""
    found = []
    for name in files.ending(".yaml", ".yml"):
        if "/" in name or (files.root / name).stat().st_size > _LARGEST_YAML:
            continue
        try:
            content = yaml.safe_load(files.text(name))
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            if PurePosixPath(name).stem in ("data", "dataset"):
                said = " ".join(str(error).split())[:120]
                raise BadInput(f"{files.root / name}: not a YAML file ({said})") from None
            continue
        if isinstance(content, dict) and "names" in content:
            found.append((name, content))
    if len(found) > 1:
        raise BadInput(f"{files.root}: more than one data.yaml ({', '.join(n for n, _ in found)}); keep one")
    return found[0] if found else None


def _names(files: DatasetFiles, config_name: str, config: dict[str, Any]) -> tuple[str, ...] | None:
    if not config_name:
        return class_list(files, *LISTS)
    names, path = config["names"], files.root / config_name
    if isinstance(names, dict):
        try:
            ordered = {int(key): str(value) for key, value in names.items()}
        except (ValueError, TypeError):
            raise BadInput(f"{path}: names must be a list, or numbers with names") from None
        if sorted(ordered) != list(range(len(ordered))):
            raise BadInput(f"{path}: the numbers of names must be 0 to {len(ordered) - 1} without gaps")
        names = [ordered[i] for i in range(len(ordered))]
    if not isinstance(names, list) or not names:
        raise BadInput(f"{path}: names must be a list of class names")
    if isinstance(config.get("nc"), int) and config["nc"] != len(names):
        raise BadInput(f"{path}: nc is {config['nc']}, but there are {len(names)} names; correct one of them")
    return tuple(str(name) for name in names)


def _splits(files: DatasetFiles, config_name: str, config: dict[str, Any], say: Any) -> Splits:
    found: Splits = {}
    for key, value in config.items():
        split: Split | None = (
            split_of(str(key)) if str(key) in {n for s in SPLITS.values() for n in s} else None
        )
        if split is None or not value:
            continue
        places = value if isinstance(value, list) else [value]
        images = [image for place in places for image in _listed(files, config_name, config, str(place))]
        found.setdefault(split, []).extend(images)
    if not config_name:
        for name in files.in_root("train.txt", "val.txt", "valid.txt", "test.txt"):
            found.setdefault(split_of(PurePosixPath(name).stem) or "train", []).extend(_named(files, name))
    shared = set(found.get("train", ())) & set(found.get("val", ()))
    if shared:
        say(f"{len(shared)} pictures are in train and in val: scores of val will be too good")
    return found if any(found.values()) else splits_by_folder(files.images)


def _listed(files: DatasetFiles, config_name: str, config: dict[str, Any], place: str) -> list[str]:
    """Returns the pictures of an entry of data.yaml: a folder, or a text file of names."""
    parts = [part for part in PurePosixPath(place.replace("\\", "/")).parts if part not in (".", "/")]
    while parts and parts[0] == "..":  # Roboflow writes ../train/images for what lies beside data.yaml
        parts.pop(0)
    if ".." in parts:
        raise BadInput(f"{files.root / config_name}: {place} leads out of {files.root}; keep pictures inside")
    before = [
        p for p in PurePosixPath(str(config.get("path") or "").replace("\\", "/")).parts if p not in "./"
    ]
    tried = [[*before, *parts], *([*before[i:], *parts] for i in range(1, len(before))), parts]
    tried += [parts[i:] for i in range(1, len(parts))]  # of absolute paths of another machine, what fits here
    for candidate in tried:
        name = "/".join(candidate)
        if ".." in candidate:
            continue
        if (files.root / name).is_file():
            return _named(files, name)
        if name and (files.root / name).is_dir():
            inside = [image for image in files.images if image.startswith(f"{name}/")]
            if inside:
                return inside
    raise BadInput(f"{files.root / config_name}: {place} has no pictures here; correct the path")


def _named(files: DatasetFiles, listing: str) -> list[str]:
    """Returns the pictures that a text file lists."""
    wanted = [line.strip() for line in files.text(listing).splitlines() if line.strip()]
    known = set(files.images)
    found, lost = [], []
    for line in wanted:
        name = "/".join(p for p in PurePosixPath(line.replace("\\", "/")).parts if p not in (".", "/", ".."))
        image = name if name in known else files.image_of(name, name)
        (lost if image is None else found).append(image or line)
    if lost:
        raise BadInput(
            f"{files.root / listing}: lists {len(lost)} pictures that are missing: {abridged(lost, 3)}"
        )
    return found


def _label_files(files: DatasetFiles) -> dict[str, str]:
    """Returns the pictures of the label files."""
    found = {}
    for name in files.ending(".txt"):
        path = PurePosixPath(name)
        if path.name.lower() in _NO_LABELS or (len(path.parts) == 1 and split_of(path.stem)):
            continue
        image = files.image_of(name)
        if image is not None:
            found[name] = image
        elif "labels" in path.parts or "obj_train_data" in path.parts:
            found[name] = ""
    return found


def _looks_like_labels(files: DatasetFiles, name: str) -> bool:
    try:
        first = files.text(name).split("\n", 1)[0].split()
        return len(first) >= 5 and all(0 <= value <= 1 for value in numbers(first[1:])) and first[0].isdigit()
    except (BadInput, ValueError):
        return False


def _objects(
    files: DatasetFiles, label: str, names: tuple[str, ...], keypoints: bool, report: ValidationReport
) -> list[Drawn]:
    try:
        text = files.text(label)
    except BadInput as error:
        report.add("label file cannot be read", str(error))
        return []
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        words, where = line.split(), f"{label}:{number}"
        if not words:
            continue
        try:
            found.append(_object(words, where, names, keypoints))
        except ValueError as error:
            report.add("label line is malformed", f"{where}: {error}")
    return found


def _object(words: list[str], where: str, names: tuple[str, ...], keypoints: bool) -> Drawn:
    """Reads a line.

    Raises:
        ValueError: numbers that are missing or out of range.
    """
    if len(words) < 5:
        raise ValueError(f"{len(words)} values; a box has 5, a polygon 7 or more")
    index, *values = numbers(words)
    if index != int(index) or not 0 <= index < len(names):
        raise ValueError(f"class {words[0]}, but there are {len(names)} (0 to {len(names) - 1})")
    drawn = Drawn(names[int(index)], where, fractions=True)
    if keypoints or len(values) in (4, 5):
        x, y, width, height = values[:4]
        if max(values[:4]) > 1.5:
            raise ValueError(
                f"{max(values[:4]):g} is no fraction of the picture; divide by its width and height"
            )
        drawn.box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        drawn.score = values[4] if len(values) == 5 else None
    else:
        points = values[: len(values) // 2 * 2]
        if max(points) > 1.5:
            raise ValueError(f"{max(points):g} is no fraction of the picture; divide by its width and height")
        drawn.polygons = [points]
        drawn.score = values[-1] if len(values) % 2 else None
    return drawn
