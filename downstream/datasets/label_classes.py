"""Reads the classes of a segmentation dataset: `classes.json`, `classes.txt`, Cityscapes, ADE20K."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coma.errors import BadInput
from coma.preflight import check_regular_file
from downstream.datasets.validation_report import ValidationReport

if TYPE_CHECKING:
    from coma.artifact import ArtifactConfig

Colour = tuple[int, int, int]

MOST = 254
"""Largest number of classes in 8-bit labels, where 0 and 255 may be ignored."""

CITYSCAPES: dict[str, Colour] = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
"""The 19 classes of the benchmark with their colours, in the order of their train ids."""

ADE20K_CLASSES = 150

HOW_TO_SAY = (
    'write the classes into classes.json ({"classes": ["road", "car"], "ignore_index": 255}) '
    "or into classes.txt (one name a line), in the order of their numbers"
)


@dataclass(frozen=True)
class Classes:
    """Meaning of the label values, and suffixes of file names if given."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    ignore_index: int = 255
    image_suffix: str | None = None
    label_suffix: str | None = None
    reduce_zero_label: bool | None = None
    has_palette: bool = False
    """Whether the user lists the colours."""
    ignored_colours: tuple[Colour, ...] = ()


CLASS_FILES = ("classes.json", "classes.txt", "labelmap.txt", "class_dict.csv")
"""Lists of classes that are looked for: ours, CVAT's, and that of CamVid on Kaggle."""


def find_classes(data: Path, given: Path | None) -> Classes | None:
    """Reads the classes from the given file, or else from one of `CLASS_FILES` in the folder.

    Raises:
        BadInput: a malformed file.
    """
    for path in [given] if given else [data / name for name in CLASS_FILES]:
        if given or path.is_file():
            return _read(path)
    return None


def cityscapes_classes() -> Classes:
    """Returns the classes of the Cityscapes benchmark."""
    return Classes(tuple(CITYSCAPES), tuple(CITYSCAPES.values()))


def ade20k_classes() -> Classes:
    """Returns 150 classes without names, for labels of ADE20K's scene parsing benchmark."""
    names = tuple(f"class {number}" for number in range(1, ADE20K_CLASSES + 1))
    return Classes(names, default_palette(len(names)))


def default_palette(count: int) -> tuple[Colour, ...]:
    """Returns the colours of PASCAL VOC without black."""

    def channel(number: int, first: int) -> int:
        return sum((number >> (3 * bit + first) & 1) << (7 - bit) for bit in range(3))

    return tuple((channel(n, 0), channel(n, 1), channel(n, 2)) for n in range(1, count + 1))


def dataset_meta(config: ArtifactConfig) -> dict[str, Any]:
    """Returns class names and colours of an artifact for OpenMMLab's visualizers and metrics."""
    names = config.class_names or ()
    palette = (config.head or {}).get("palette") or default_palette(len(names))
    return {"classes": names, "palette": [tuple(colour) for colour in palette]}


def _read(path: Path) -> Classes:
    check_regular_file(path, must_exist=False)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise BadInput(f"{path}: not a text file in UTF-8") from None
    report = ValidationReport(str(path))
    if path.name in ("labelmap.txt", "class_dict.csv"):
        content: Any = _coloured(text)
    elif path.suffix.lower() != ".json":
        names = [line.strip() for line in text.splitlines()]
        while names and not names[-1]:
            names.pop()
        content = {"classes": names}
    else:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: not a JSON file ({error}); {HOW_TO_SAY}") from None
    if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
        raise BadInput(f"{path}: there is no list 'classes'; {HOW_TO_SAY}")
    classes = _interpreted(content, report)
    report.raise_if_any()
    return classes


def _coloured(text: str) -> dict[str, Any]:
    """Returns names and colours of lines `name:red,green,blue:...` (CVAT) or `name,red,green,blue`."""
    names, palette = [], []
    for line in text.splitlines():
        found = re.match(r"\s*([^#:,][^:,]*)[:,]\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)", line)
        if found:
            names.append(found[1].strip())
            palette.append([int(found[i]) for i in (2, 3, 4)])
    return {"classes": names, "palette": palette}


def _interpreted(content: dict[str, Any], report: ValidationReport) -> Classes:
    names = content["classes"]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            report.add("class without a name", f"class {number} is {name!r:.40}")
        elif name in names[:number]:
            report.add("class name used more than once", f"{name!r} for {names.index(name)} and {number}")
    if not 2 <= len(names) <= MOST:
        report.add("number of classes", f"{len(names)}; there must be 2 to {MOST}")
    ignore = content.get("ignore_index", 255)
    reduce = content.get("reduce_zero_label")
    if not isinstance(reduce, bool | None):
        report.add("reduce_zero_label is neither true nor false", f"{reduce!r:.40}")
    if type(ignore) is not int or not 0 <= ignore <= 255:
        report.add("ignore_index is not 0 to 255", f"{ignore!r:.40}")
    elif not reduce and ignore < len(names):
        report.add("ignore_index is also a class", f"{ignore} ({names[ignore]!r:.40})")
    suffixes = [content.get(key) for key in ("img_suffix", "seg_map_suffix")]
    for key, suffix in zip(("img_suffix", "seg_map_suffix"), suffixes, strict=True):
        if not (suffix is None or (isinstance(suffix, str) and "." in suffix)):
            report.add(f"{key} is not the end of a file name", f"{suffix!r:.40}")
    return Classes(
        names=tuple(map(str, names)),
        palette=_palette(content.get("palette"), len(names), report),
        ignore_index=ignore,
        image_suffix=suffixes[0],
        label_suffix=suffixes[1],
        reduce_zero_label=reduce,
        has_palette=content.get("palette") is not None,
    )


def _palette(listed: Any, count: int, report: ValidationReport) -> tuple[Colour, ...]:
    if listed is None:
        return default_palette(count)
    if not isinstance(listed, list) or len(listed) != count:
        size = f"{len(listed)} colours" if isinstance(listed, list) else repr(listed)[:40]
        report.add("palette does not match", f"{size} for {count} classes")
        return ()
    for number, colour in enumerate(listed):
        whole = isinstance(colour, list) and len(colour) == 3 and all(type(c) is int for c in colour)
        if not whole or not all(0 <= c <= 255 for c in colour):
            report.add("palette colour is not three numbers from 0 to 255", f"class {number}: {colour!r:.40}")
    return tuple(tuple(colour) if isinstance(colour, list) else () for colour in listed)  # type: ignore[misc]
