"""Labels images with a classifier, in any runtime, and writes CSV, JSON and a contact sheet."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coma.atomic_io import Descriptor, lies_among, write_whole
from coma.contact_sheet import Cell, Section, draw_sections, write_png
from coma.data import Source
from coma.data.channels import scale_to_unit
from coma.data.sources.files import open_all_images
from coma.errors import BadImage, Interrupted
from coma.messages import abridged, counted
from coma.preflight import require_folder
from coma.progress import Progress
from coma.runtimes.base import Runtime
from coma.runtimes.find import DeviceName, RuntimeName
from coma.signals import sigterm_interrupts
from downstream.classify.inference import class_names_of, classify_images, open_classifier
from downstream.classify.metrics import THRESHOLD

log = logging.getLogger(__name__)

TOP_K = 5
"""Default number of classes per image."""
_NAMED = 3
"""Number of unreadable images that a message names; predictions.json lists all."""
_CLASSES_SHOWN, _IMAGES_SHOWN = 8, 6
"""Most classes on a contact sheet, and images of each."""


@dataclass(frozen=True)
class Predictions:
    """The most probable classes of images.

    Attributes:
        source: The images.
        indices: Position of each predicted image in the source.
        classes: int64 `[n, m]`: most probable class first; m is `top_k`, or the number of classes if an image
            may have any number of them.
        scores: float32 `[n, m]`: their probabilities.
        top_k: Number of classes to show.
        names: Class names.
        skipped: One line for each image that could not be read.
        multi_label: Whether an image may have any number of classes.
    """

    source: Source
    indices: list[int]
    classes: Tensor
    scores: Tensor
    top_k: int
    names: tuple[str, ...]
    skipped: list[str]
    multi_label: bool

    def top(self, row: int) -> list[tuple[str, float]]:
        """Returns names and probabilities of the most probable classes of the image in a row."""
        return self._ranked(row)[: self.top_k]

    def labels(self, row: int) -> list[str]:
        """Returns the classes that the image in a row has, where it may have any number."""
        return [name for name, score in self._ranked(row) if score >= THRESHOLD]

    def _ranked(self, row: int) -> list[tuple[str, float]]:
        pairs = zip(self.classes[row].tolist(), self.scores[row].tolist(), strict=True)
        return [(self.names[number], score) for number, score in pairs]


def predict_classes(
    classifier: Path,
    images: Sequence[Path],
    *,
    out: Path,
    top_k: int | None = None,
    runtime: RuntimeName = "auto",
    device: DeviceName = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Labels images and writes predictions.csv, predictions.json and contact_sheet.png to `out`.

    Images are read one batch at a time. On Ctrl-C or SIGTERM, both files are written with what was done.

    Args:
        classifier: Artifact, exported file, or folder of exports.
        images: Image files and folders (searched recursively); or one pack, shard or CSV file.
        out: Folder to write to; it is made.
        top_k: Most probable classes per image (default: 5, or all if there are fewer).
        runtime: Runtime to use; see `open_model`.
        device: Device to use; see `open_model`.
        batch_size: Images per forward pass.
        workers: Number of processes that decode images.
        progress: Shows a bar with the time left.

    Raises:
        BadInput: a model or images that cannot be used.
        CheckFailed: outputs that are not finite.
        Interrupted: Ctrl-C or SIGTERM; what was done is written.
    """
    require_folder(out)
    for note in filter(None, (lies_among(out, path) for path in images if path.is_dir())):
        log.warning(note)
    source = open_all_images(images)
    model = open_classifier(classifier, runtime, device)
    names = class_names_of(model)
    if top_k and top_k > len(names):
        log.info("--top-k %d: the classifier has %d classes, and all of them are given", top_k, len(names))
    k = min(top_k or TOP_K, len(names))
    indices, classes, scores, skipped = [], [], [], []
    bar = progress.bar("images", len(source), lines=20) if progress else None
    stopped = False
    try:
        with sigterm_interrupts("what was done is written"):
            for batch in classify_images(model, source, batch_size=batch_size, workers=workers):
                best = batch.values.topk(len(names) if model.spec.multi_label else k, dim=1)
                classes.append(best.indices)
                scores.append(best.values)
                indices += batch.indices  # the last of the three: all are cut to its length
                skipped += batch.failures
                if bar:
                    bar.advance(len(batch.indices) + len(batch.failures))
    except KeyboardInterrupt:
        if not indices:
            raise
        stopped = True
    done = len(indices) + len(skipped)
    found = Predictions(
        source,
        indices,
        torch.cat(classes)[: len(indices)],
        torch.cat(scores)[: len(indices)],
        k,
        names,
        skipped,
        model.spec.multi_label,
    )
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(out / "predictions.csv", found)
    _write_json(out / "predictions.json", found, classifier, model)
    if skipped:
        what = counted(len(skipped), "image that cannot be read", "images that cannot be read")
        log.warning("skipped %s: %s", what, abridged(skipped, _NAMED, "; "))
    if stopped:
        raise Interrupted(
            f"interrupted; {out / 'predictions.csv'} and .json hold the first {done:,} of "
            f"{counted(len(source), 'image')}"
        )
    write_png(out / "contact_sheet.png", contact_sheet(found))
    return found


def contact_sheet(found: Predictions) -> Image.Image:
    """Draws images by predicted class, from the most to the least certain of each, evenly spaced.

    Of more than eight classes, the most frequent ones are shown.
    """
    first, certainty = found.classes[:, 0], found.scores[:, 0]
    counts = first.bincount(minlength=len(found.names))
    shown = counts.argsort(descending=True, stable=True)[:_CLASSES_SHOWN]
    sections = []
    for number in shown[counts[shown] > 0].tolist():
        rows = (first == number).nonzero()[:, 0]
        rows = rows[certainty[rows].argsort(descending=True, stable=True)]
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), _IMAGES_SHOWN)).round().long()
        cells = [_cell(found, row) for row in rows[chosen].tolist()]
        share = len(rows) / len(first)
        heading = f"{found.names[number]}: {counted(len(rows), 'image')}, {share:.1%}"
        sections.append(Section(heading, cells))
    title = f"{'/'.join(str(found.source.location).split('/')[-2:])}: {counted(len(first), 'image')}"
    notes = "Predicted classes, and images of each from the most to the least certain"
    left_out = int((counts > 0).sum()) - len(sections)
    if left_out:
        notes += f"; {counted(left_out, 'less frequent class', 'less frequent classes')} not shown"
    return draw_sections(sections, title, notes, across=_IMAGES_SHOWN)


def _cell(found: Predictions, row: int) -> Cell:
    index = found.indices[row]
    lines = [Path(found.source.describe(index)).name, *(f"{n} {s:.1%}" for n, s in found.top(row)[:2])]
    try:
        pixels = found.source.read(index, min_side=256)
    except BadImage:
        return Cell(None, "\n".join(lines))
    if pixels.dtype != np.uint8:
        pixels = (scale_to_unit(pixels).clip(0, 1) * 255).astype(np.uint8)
    if pixels.shape[2] != 3:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    return Cell(Image.fromarray(pixels), "\n".join(lines))


def _write_csv(path: Path, found: Predictions) -> None:
    """Writes a line for each image: path, labels (any number of classes only), then classes and scores."""

    def write(text: TextIO) -> None:
        writer = csv.writer(text, lineterminator="\n")
        numbers = range(1, found.top_k + 1)
        labels = ["labels"] * found.multi_label
        writer.writerow(["path", *labels, *(f"{what}_{i}" for i in numbers for what in ("class", "score"))])
        for row, index in enumerate(found.indices):
            labels = [";".join(found.labels(row))] * found.multi_label
            cells = [cell for name, score in found.top(row) for cell in (name, f"{score:.6f}")]
            writer.writerow([found.source.describe(index), *labels, *cells])

    _write_lines(path, write)


def _write_json(path: Path, found: Predictions, classifier: Path, model: Runtime) -> None:
    def write(text: TextIO) -> None:
        about = {
            "classifier": str(classifier),
            "runtime": model.title,
            "class_names": list(found.names),
            "multi_label": found.multi_label,
            "images": len(found.indices),
            "skipped": found.skipped,
        }
        text.write(json.dumps(about)[:-1] + ', "predictions": [')
        for row, index in enumerate(found.indices):
            classes: list[dict[str, Any]] = [
                {"name": name, "score": round(score, 6)} for name, score in found.top(row)
            ]
            labels = {"labels": found.labels(row)} if found.multi_label else {}
            plain = {"path": found.source.describe(index), **labels, "classes": classes}
            text.write(("," if row else "") + "\n" + json.dumps(plain))
        text.write("\n]}\n")

    _write_lines(path, write)


def _write_lines(path: Path, write: Callable[[TextIO], None]) -> None:
    def through_buffer(file: Descriptor) -> None:
        text = io.TextIOWrapper(io.BufferedWriter(cast(Any, file), 1 << 20), "utf-8", newline="")
        write(text)
        text.flush()
        text.detach()

    write_whole(path, through_buffer)
