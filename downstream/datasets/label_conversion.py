"""Makes label maps of colour masks, masks per class and polygons, as segmentation is trained on label maps.

    a.png, or a_mask.png                              every class in a colour, or by its number
    masks/train/car/a.png, masks/a/car.png, a_car.png one mask per class: what is not 0 belongs to it
    COCO, LabelMe, YOLO, ...                          polygons, run lengths; smaller objects over larger ones

A map has the number of its class at every pixel; pixels of no class are `background`, where the classes have
one, else ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from coma.errors import BadInput
from coma.messages import counted
from coma.splits import Split
from downstream.datasets.coco import check_images
from downstream.datasets.coco_checks import records
from downstream.datasets.coco_layouts import NoLabels
from downstream.datasets.coco_loading import load_split
from downstream.datasets.files import DatasetFiles, choose_split, splits_by_folder, splits_by_lists
from downstream.datasets.formats.find import FORMATS as OTHERS
from downstream.datasets.label_classes import HOW_TO_SAY, Classes, Colour, default_palette
from downstream.datasets.label_layouts import Layout, Pairing, nothing_found, pair
from downstream.datasets.mask_files import FORMATS, ClassMask, find_masks
from downstream.datasets.masks import filled, mask_error
from downstream.datasets.validation_report import Progress, ValidationReport, map_in_threads

BACKGROUND = "background"
_MOST_COLOURS = 64
"""Largest number of colours that are taken as classes without a palette."""


class Converted(NamedTuple):
    """Label maps that were made, and what they mean."""

    title: str
    layout: Layout
    pairing: Pairing
    classes: Classes
    listing: Path
    """Text file of the pairs' stems, for mmseg: the folder of the images may hold others too."""
    warnings: list[str]


class _Maps:
    """Writes label maps of pictures with one suffix, below a folder."""

    def __init__(self, folder: Path, split: Split, images: Path, names: list[str]) -> None:
        self.folder, self.listing, self.images = folder / split, folder / f"{split}.txt", images
        counts = Counter(PurePosixPath(name).suffix for name in names)
        self.suffix = max(sorted(counts), key=counts.__getitem__)
        self.others = [name for name in names if not name.endswith(self.suffix)]
        self.stems = sorted(name.removesuffix(self.suffix) for name in names if name.endswith(self.suffix))

    def write(self, image: str, label: np.ndarray) -> None:
        path = self.folder / f"{image.removesuffix(self.suffix)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label.astype(np.uint8 if label.max(initial=0) < 256 else np.uint16)).save(path)

    def close(self, title: str, classes: Classes, warnings: list[str]) -> Converted:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.listing.write_text("".join(f"{stem}\n" for stem in self.stems), encoding="utf-8")
        layout = Layout(self.images, self.folder)
        pairing = Pairing(self.suffix, ".png", self.stems, [], [], self.others)
        return Converted(title, layout, pairing, classes, self.listing, warnings)


def _check_names(names: list[str], report: ValidationReport) -> None:
    """Reports pictures that mmseg would not find, since it reads lists of names in UTF-8."""
    foreign = [name for name in names if re.search("[\ud800-\udfff]", name)]
    report.add_all("file name that is not in UTF-8; rename the picture and its label", foreign, str)


def are_maps(data: Path, layout: Layout, classes: Classes | None) -> bool:
    """Returns whether the labels of a layout are maps of class numbers, by their names and the first one.

    Otherwise they are in colours, one per class, or no pictures.
    """
    if not layout.kind and not (classes and classes.label_suffix):
        files = DatasetFiles(data)
        masks, _ = find_masks(files)
        several = Counter(mask.image for mask in masks if mask.label)
        inside = f"{layout.labels.relative_to(data).as_posix()}/"
        texts = [name for name in files.ending(".txt", ".json", ".xml") if name.startswith(inside)]
        if max(several.values(), default=0) > 1 or (texts and not masks):
            return False
    pairing = pair(layout, classes and classes.image_suffix, classes and classes.label_suffix)
    return not any(_in_colours(layout.labels / (stem + pairing.label_suffix)) for stem in pairing.stems[:1])


def _in_colours(path: Path) -> bool:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.mode in ("RGB", "RGBA")
    except Exception:  # damaged files are reported when all are read
        return False


def convert(
    data: Path,
    split: Split,
    classes: Classes | None,
    folder: Path,
    progress: Progress | None,
) -> Converted:
    """Makes label maps of a split in `folder`, from masks or polygons.

    Args:
        data: Folder of the dataset.
        split: Split to read.
        classes: Classes that the user lists.
        folder: Where label maps are written.
        progress: Called with the number of pictures done and the total.

    Raises:
        BadInput: neither masks nor polygons, or masks that cannot be read.
    """
    files = DatasetFiles(data)
    masks, pictures = find_masks(files)
    if masks:
        return _from_masks(pictures, split, classes, masks, folder, progress)
    return _from_polygons(data, split, classes, folder, progress)


def _from_masks(
    files: DatasetFiles,
    split: Split,
    classes: Classes | None,
    masks: list[ClassMask],
    folder: Path,
    progress: Progress | None,
) -> Converted:
    warnings: list[str] = []
    of_image: dict[str, list[ClassMask]] = {}
    for mask in masks:
        of_image.setdefault(mask.image, []).append(mask)
    lists = [name for name in files.ending(".txt") if "ImageSets/Segmentation/" in f"/{name}"]
    splits = splits_by_lists(files, lists, warnings.append) or splits_by_folder(list(of_image))
    chosen = [
        name
        for name in choose_split(splits, list(of_image), split, files.root, warnings.append)
        if name in of_image
    ]
    if not chosen:
        raise BadInput(f"{files.root}: no picture of the {split} split has a mask")
    maps = _Maps(folder, split, files.root, chosen)
    report = ValidationReport(str(files.root))
    _check_names(chosen, report)
    if any(mask.label for mask in masks):
        title, classes = "masks per class", _with_background(classes, sorted({m.label for m in masks}))
        unknown = [mask for mask in masks if mask.label not in classes.names]
        report.add_all("mask of an unknown class", unknown, lambda mask: f"{mask.path}: {mask.label!r}")
        report.raise_if_any()

        def read(image: str) -> Any:
            return _joined(files.root, of_image[image], classes)
    else:
        twice = [image for image, found in of_image.items() if len(found) > 1]
        report.add_all("picture with two masks", twice, lambda name: f"{name}: {of_image[name][1].path}")
        report.raise_if_any()
        title, classes, colours = _palette_of(files, of_image, classes, report, warnings)

        def read(image: str) -> Any:
            return _numbered(files.root, of_image[image][0].path, colours, classes.ignore_index)

    def make(image: str) -> Any:
        result = read(image)
        if isinstance(result, str):
            return result
        label, *numbers = result
        if image.endswith(maps.suffix):
            maps.write(image, label)
        return numbers

    overlaps, strange = 0, 0
    for result in map_in_threads(make, chosen, progress):
        if isinstance(result, str):
            report.add("label cannot be read", result)
            continue
        overlaps, strange = overlaps + result[0], strange + result[1]
    if strange:
        report.add("colour that is no class", f"{strange} pixels; add it to the palette of classes.json")
    report.raise_if_any()
    if overlaps:
        warnings.append(f"pixels in the masks of two classes, which the last one gets: {overlaps}")
    return maps.close(title, classes, warnings)


def _joined(root: Path, masks: list[ClassMask], classes: Classes) -> tuple[np.ndarray, int, int] | str:
    """Returns the label map of masks per class, and the number of pixels in two of them."""
    label, taken = None, np.zeros((1, 1), bool)
    overlaps = 0
    for mask in sorted(masks, key=lambda each: classes.names.index(each.label)):
        pixels = _pixels(root, mask.path)
        if isinstance(pixels, str):
            return pixels
        there = pixels.reshape(*pixels.shape[:2], -1)[..., :3].any(axis=2)
        if label is None:
            label = np.full(there.shape, _rest(classes), np.uint16)
            taken = np.zeros(there.shape, bool)
        if there.shape != label.shape:
            return f"{mask.path}: has another size than the masks of other classes"
        overlaps += int((taken & there).sum())
        taken |= there
        label[there] = classes.names.index(mask.label)
    assert label is not None
    return label, overlaps, 0


def _rest(classes: Classes) -> int:
    """Returns the value of pixels of no class."""
    return classes.names.index(BACKGROUND) if BACKGROUND in classes.names else classes.ignore_index


def _numbered(
    root: Path, path: str, colours: dict[Colour, int] | None, ignore: int
) -> tuple[np.ndarray, int, int] | str:
    """Returns a label map of a mask by number or colour, and the number of pixels of no class."""
    pixels = _pixels(root, path)
    if isinstance(pixels, str):
        return pixels
    if colours is None:
        if pixels.ndim == 3:
            return f"{path}: in colours, where other masks hold numbers"
        return pixels, 0, 0
    if pixels.ndim == 2:
        return f"{path}: holds numbers, where other masks are in colours"
    label, strange = np.full(pixels.shape[:2], ignore, np.uint16), np.ones(pixels.shape[:2], bool)
    codes = _codes(pixels)
    for colour, number in colours.items():
        there = codes == (colour[0] << 16 | colour[1] << 8 | colour[2])
        label[there], strange[there] = number, False
    return label, 0, int(strange.sum())


def _pixels(root: Path, path: str) -> np.ndarray | str:
    """Returns numbers `[h, w]` or colours `[h, w, 3]` of a mask, or a short description of the error."""
    try:
        with Image.open(root / path, formats=FORMATS) as image:
            if image.mode in ("RGB", "RGBA"):
                return np.asarray(image.convert("RGB"))
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                return f"{path}: mode {image.mode}; save it as an RGB or 8-bit PNG"
            return np.asarray(image)
    except Exception as error:  # OSError, SyntaxError, struct.error, DecompressionBombError, ...
        said = " ".join(str(error).split())[:60]
        return f"{path}: not a PNG, TIFF or BMP file, which keep colours exactly ({said})"


def _codes(pixels: np.ndarray) -> np.ndarray:
    parts = pixels.astype(np.int64)
    return parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2]


def _palette_of(
    files: DatasetFiles,
    of_image: dict[str, list[ClassMask]],
    classes: Classes | None,
    report: ValidationReport,
    warnings: list[str],
) -> tuple[str, Classes, dict[Colour, int] | None]:
    """Returns the kind of masks, their classes, and the number of every colour (None: they hold numbers).

    Raises:
        BadInput: numbers without a list of classes, or colours that cannot be learned.
    """
    paths = [masks[0].path for masks in of_image.values()]
    if not _in_colours(files.root / paths[0]):
        if classes is None:
            raise BadInput(f"{files.root}: no list of classes; {HOW_TO_SAY}")
        return "label maps", classes, None
    if classes is not None and classes.has_palette:
        numbers = {colour: number for number, colour in enumerate(classes.palette)}
        return "colour masks", classes, numbers | {c: classes.ignore_index for c in classes.ignored_colours}
    there = [files.root / path for path in paths]
    times = tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in there)
    found = _count_colours(files.root, tuple(paths), times)
    colours: list[Colour] = [(code >> 16, code >> 8 & 255, code & 255) for code in sorted(found)]
    total = found.total()
    shown = ", ".join(
        f"{_hex(c)} {found[code] / total:.1%}" for c, code in zip(colours, sorted(found), strict=True)
    )
    if classes is not None or len(colours) < 2:
        raise BadInput(
            f"{files.root}: the masks have {counted(len(colours), 'colour')} ({shown}); say which class "
            'has which in classes.json: {"classes": ["road", "car"], "palette": [[128, 64, 128], [0, 0, 9]]}'
        )
    warnings.append(f"colours taken as classes: {shown}; classes.json with classes and palette names them")
    learned = Classes(tuple(map(_hex, colours)), tuple(colours), has_palette=True)
    return "colour masks", learned, {colour: number for number, colour in enumerate(colours)}


@lru_cache(maxsize=1)
def _count_colours(root: Path, paths: tuple[str, ...], times: tuple[int, ...]) -> Counter[int]:
    """Returns the number of pixels of each colour in the masks of all splits; each split asks for the same.

    Args:
        root: Folder of the dataset.
        paths: Masks, below the folder.
        times: Times of the last changes, so that masks that have changed are counted again.

    Raises:
        BadInput: there are more than `_MOST_COLOURS` colours.
    """

    def count(path: str) -> dict[int, int]:
        pixels = _pixels(root, path)
        if isinstance(pixels, str) or pixels.ndim == 2:
            return {}
        values, counts = np.unique(_codes(pixels), return_counts=True)
        few = slice(_MOST_COLOURS + 1)
        return dict(zip(values[few].tolist(), counts[few].tolist(), strict=True))

    found: Counter[int] = Counter()
    for each in map_in_threads(count, paths, None):
        found.update(each)
        if len(found) > _MOST_COLOURS:
            raise BadInput(
                f"{root}: the masks have more than {_MOST_COLOURS} colours; save them without "
                'smoothing, or list them in classes.json: {"classes": ["road"], "palette": [[128, 64, 128]]}'
            )
    return found


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _with_background(classes: Classes | None, names: list[str]) -> Classes:
    """Returns the classes that the user lists, or else `background` and the names."""
    if classes is not None:
        return classes
    ordered = (BACKGROUND, *(name for name in names if name != BACKGROUND))
    return Classes(ordered, ((0, 0, 0), *default_palette(len(ordered) - 1)))


def _from_polygons(
    data: Path, split: Split, classes: Classes | None, folder: Path, progress: Progress | None
) -> Converted:
    try:
        loaded = load_split(data, split)
    except NoLabels:
        raise nothing_found(data, split, f"COCO, {OTHERS}") from None
    report, warnings = loaded.report, loaded.warnings
    listed = records(loaded.content, report)
    names = {category["id"]: category["name"] for category in listed.categories}
    classes = _with_background(classes, list(names.values()))
    unknown = sorted(set(names.values()) - set(classes.names))
    report.add_all("class that the list of classes lacks", unknown, repr)
    of_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in listed.images}
    boxes = 0
    for record in listed.objects:
        image = of_image.get(record["image_id"])
        boxes += not record.get("segmentation")
        if image is not None and record.get("segmentation") and record["category_id"] in names:
            image.append(record)
    if boxes and boxes == len(listed.objects):
        raise BadInput(f"{data}: its {boxes} objects have boxes alone; segmentation needs masks or polygons")
    if boxes:
        warnings.append(f"objects without mask, left out: {boxes} of {len(listed.objects)}")
    for image in listed.images:
        for record in of_image[image["id"]]:
            if fault := mask_error(record["segmentation"], image["width"], image["height"]):
                report.add("segmentation is malformed", f"annotation {record['id']}: {fault}")
    check_images(listed.images, loaded.images, True, report, [], None)
    _check_names([image["file_name"] for image in listed.images], report)
    report.raise_if_any()
    if not listed.images:
        raise BadInput(f"{loaded.source}: there is no image")
    maps = _Maps(folder, split, loaded.images, [image["file_name"] for image in listed.images])
    kind = np.uint8 if max(len(classes.names), classes.ignore_index + 1) <= 256 else np.uint16

    def draw(image: dict[str, Any]) -> None:
        label = np.full((image["height"], image["width"]), _rest(classes), kind)
        for record in sorted(of_image[image["id"]], key=lambda each: -each["area"]):
            number = classes.names.index(names[record["category_id"]])
            label[filled(record["segmentation"], *label.shape)] = (
                classes.ignore_index if record["iscrowd"] else number
            )
        maps.write(image["file_name"], label)

    written = [image for image in listed.images if image["file_name"].endswith(maps.suffix)]
    for _ in map_in_threads(draw, written, progress):
        pass
    return maps.close(f"polygons of {loaded.title}", classes, warnings)
