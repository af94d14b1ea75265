"""Labels images with a classifier, in any runtime, and writes CSV, JSON and a contact sheet.

The work is done in parts (see `predictions`), so the same command continues what was stopped or killed.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from coma.atomic_io import lies_among
from coma.contact_sheet import Cell, Section, draw_sections, write_png
from coma.data import Source
from coma.data.sources.files import open_all_images
from coma.errors import BadImage, Interrupted
from coma.messages import abridged, counted
from coma.paths import Location
from coma.preflight import require_folder
from coma.progress import Bar, Progress
from coma.runtimes.base import Runtime
from coma.runtimes.find import DeviceName
from coma.runtimes.names import RuntimeName
from coma.signals import sigterm_interrupts
from downstream.classify.inference import (
    Probabilities,
    class_names_of,
    classify_images,
    none_readable,
    open_classifier,
)
from downstream.classify.metrics import THRESHOLD
from downstream.classify.predictions import Entry, PredictionParts, Predictions
from downstream.parts import listing_hash
from downstream.search.pictures import picture_of

log = logging.getLogger(__name__)

TOP_K = 5
"""Default number of classes per image."""
PART_IMAGES = 256
"""Default number of images in a part, which is computed whole or not at all."""
_NAMED = 3
"""Number of unreadable images that a message names; predictions.json lists all."""
_CLASSES_SHOWN, _IMAGES_SHOWN = 8, 6
"""Most classes on a contact sheet, and images of each."""
_SIDE = 256
"""Longer side in pixels of the pictures that a contact sheet is drawn from."""


def predict_classes(
    classifier: Path,
    images: Sequence[Location],
    *,
    out: Path,
    top_k: int | None = None,
    runtime: RuntimeName = "auto",
    device: DeviceName = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    part_images: int = PART_IMAGES,
    progress: Progress | None = None,
) -> Predictions:
    """Labels images and writes predictions.csv, predictions.json and contact_sheet.png to `out`.

    A call that was stopped at any moment continues when it is made again.

    Args:
        classifier: Artifact, exported file, or folder of exports.
        images: Image files and folders (searched recursively); or one pack, shard, CSV file or
            address of shards or parquet files.
        out: Folder to write to; it is made.
        top_k: Most probable classes per image (default: 5, or all if there are fewer).
        runtime: Runtime to use; see `open_model`.
        device: Device to use; see `open_model`.
        batch_size: Images per forward pass.
        workers: Number of processes that decode images.
        part_images: Largest number of images that are computed again after a stop.
        progress: Shows a bar with the time left.

    Raises:
        BadInput: a model or images that cannot be used; parts in `out` of other images or another model.
        CheckFailed: outputs that are not finite.
        ComaError: the disk is full; finished parts are kept.
        Interrupted: Ctrl-C or SIGTERM; finished parts are kept.
    """
    require_folder(out)
    for note in filter(None, (lies_among(out, path) for path in images)):
        log.warning(note)
    source = open_all_images(images)
    model = open_classifier(classifier, runtime, device)
    names = class_names_of(model)
    if top_k and top_k > len(names):
        log.info("--top-k %d: the classifier has %d classes, and all of them are given", top_k, len(names))
    k = min(top_k or TOP_K, len(names))
    spec, listing = model.spec, listing_hash(source)[1]
    about = {"model": spec.source, "precision": spec.precision, "top_k": k, "listing": listing}
    parts = PredictionParts(out, source, about, part_images)
    parts.make_folder()
    if done := parts.done():
        log.info("%s: %s of %d are done already", out, counted(done, "image"), len(source))
    bar = progress.bar("images", len(source), done, lines=20) if progress else None
    try:
        with sigterm_interrupts("finished parts are kept"):
            _compute(model, parts, k, bar, batch_size=batch_size, workers=workers)
            return _conclude(classifier, model, parts, k)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; {parts.folder} keeps its finished parts; run the same command again to resume"
        ) from None


def _compute(
    model: Runtime,
    parts: PredictionParts,
    top_k: int,
    bar: Bar | None,
    *,
    batch_size: int,
    workers: int | None,
) -> None:
    """Computes and writes the parts that are missing."""
    todo = parts.missing()
    ranges = [parts.images(number) for number in todo]
    batches = classify_images(model, parts.source, ranges, batch_size=batch_size, workers=workers)
    with closing(batches):
        for number, images in zip(todo, ranges, strict=True):
            entries: list[Entry] = []
            while len(entries) < len(images):
                batch = next(batches)
                entries += _entries(batch, parts.source, class_names_of(model), top_k, model.spec.multi_label)
                if bar:
                    bar.advance(len(batch.indices) + len(batch.failures))
            parts.write(number, "".join(json.dumps(entry) + "\n" for entry in entries).encode())


def _entries(
    batch: Probabilities, source: Source, names: tuple[str, ...], top_k: int, multi_label: bool
) -> Iterator[Entry]:
    """Yields the lines of a part for a batch."""
    best = batch.values.topk(top_k, dim=1)
    for row, index in enumerate(batch.indices):
        entry: Entry = {"index": index, "path": source.describe(index)}
        if multi_label:
            order = batch.values[row].argsort(descending=True, stable=True).tolist()
            entry["labels"] = [names[i] for i in order if batch.values[row, i] >= THRESHOLD]
        pairs = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
        entry["classes"] = [{"name": names[i], "score": round(score, 6)} for i, score in pairs]
        yield entry
    for failure in batch.failures:
        yield {"failure": failure}


def _conclude(classifier: Path, model: Runtime, parts: PredictionParts, top_k: int) -> Predictions:
    """Writes the results from the parts, and removes the parts."""
    tops = _Tops.of(parts, class_names_of(model))
    if not tops.indices:
        parts.remove()
        raise none_readable(parts.source, tops.skipped)
    skipped, names, multi_label = tops.skipped, class_names_of(model), model.spec.multi_label
    found = Predictions(parts.out, len(tops.indices), tuple(skipped), top_k, names, multi_label)
    about = {
        "classifier": str(classifier),
        "runtime": model.title,
        "class_names": list(names),
        "multi_label": multi_label,
        "images": found.images,
        "skipped": skipped,
    }
    parts.write_results(found, about)
    with parts.disk_errors():
        write_png(parts.out / "contact_sheet.png", contact_sheet(parts, tops, names))
    parts.remove()
    if skipped:
        what = counted(len(skipped), "image that cannot be read", "images that cannot be read")
        log.warning("skipped %s: %s", what, abridged(skipped, _NAMED, "; "))
    return found


@dataclass(frozen=True)
class _Tops:
    """The most probable class of every image, in 16 bytes each."""

    indices: array[int] = field(default_factory=lambda: array("q"))
    classes: array[int] = field(default_factory=lambda: array("i"))
    scores: array[float] = field(default_factory=lambda: array("f"))
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, parts: PredictionParts, names: tuple[str, ...]) -> _Tops:
        found, numbers = cls(), {name: number for number, name in enumerate(names)}
        for entry in parts.all_entries():
            if "failure" in entry:
                found.skipped.append(entry["failure"])
                continue
            top = entry["classes"][0]
            found.indices.append(entry["index"])
            found.classes.append(numbers[top["name"]])
            found.scores.append(top["score"])
        return found


def contact_sheet(parts: PredictionParts, tops: _Tops, names: tuple[str, ...]) -> Image.Image:
    """Draws images by predicted class, from the most to the least certain of each, evenly spaced.

    Of more than eight classes, the most frequent ones are shown.
    """
    first, certainty = np.array(tops.classes), np.array(tops.scores)
    counts = np.bincount(first, minlength=len(names))
    shown = (-counts).argsort(kind="stable")[:_CLASSES_SHOWN]
    sections = []
    for number in shown[counts[shown] > 0].tolist():
        rows = np.flatnonzero(first == number)
        rows = rows[(-certainty[rows]).argsort(kind="stable")]
        chosen = np.linspace(0, len(rows) - 1, min(len(rows), _IMAGES_SHOWN)).round().astype(np.int64)
        cells = [_cell(parts, tops.indices[row]) for row in rows[chosen].tolist()]
        share = len(rows) / len(first)
        heading = f"{names[number]}: {counted(len(rows), 'image')}, {share:.1%}"
        sections.append(Section(heading, cells))
    title = f"{'/'.join(str(parts.source.location).split('/')[-2:])}: {counted(len(first), 'image')}"
    notes = "Predicted classes, and images of each from the most to the least certain"
    left_out = int((counts > 0).sum()) - len(sections)
    if left_out:
        notes += f"; {counted(left_out, 'less frequent class', 'less frequent classes')} not shown"
    return draw_sections(sections, title, notes, across=_IMAGES_SHOWN)


def _cell(parts: PredictionParts, index: int) -> Cell:
    entry = next(each for each in parts.entries(index // parts.size) if each.get("index") == index)
    classes = (f"{each['name']} {each['score']:.1%}" for each in entry["classes"][:2])
    lines = [Path(entry["path"]).name, *classes]
    try:
        picture = picture_of(parts.source.read(index, min_side=_SIDE), _SIDE)
    except BadImage:
        picture = None
    return Cell(picture, "\n".join(lines))
