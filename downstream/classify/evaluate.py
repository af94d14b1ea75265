"""Measures a classifier on labelled images, in any runtime."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from coma.atomic_io import write_json
from coma.data import class_indices, open_labelled
from coma.errors import BadInput
from coma.messages import abridged, counted
from coma.paths import Location
from coma.preflight import require_folder, require_packages
from coma.progress import Progress
from coma.runtimes.find import DeviceName, RuntimeName
from downstream.classify.inference import class_names_of, classify_images, none_readable, open_classifier
from downstream.classify.metrics import multi_label_metrics, single_label_metrics
from downstream.classify.plots import draw_confusion, draw_reliability

log = logging.getLogger(__name__)

_NAMED = 3
"""Number of unreadable images that a message names; scores.json lists all."""


def evaluate_classifier(
    classifier: Path,
    data: Location,
    *,
    split: str | None = None,
    out: Path | None = None,
    runtime: RuntimeName = "auto",
    device: DeviceName = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the metrics of a classifier on labelled images, and writes them to `out`.

    Args:
        classifier: Artifact, exported file, or folder of exports.
        data: Labelled images, as in training; their classes are matched by name.
        split: Split to measure on; by default test, else val, else all images.
        out: Folder for scores.json, confusion_matrix.png (one class per image) and reliability.png.
        runtime: Runtime to use; see `open_model`.
        device: Device to use; see `open_model`.
        batch_size: Images per forward pass.
        workers: Number of processes that decode images.
        progress: Shows a bar with the time left.

    Returns:
        What scores.json holds: the classifier, its runtime, data, split, images, skipped (a line for each
        unreadable image), class_names, multi_label, and the metrics of `downstream.classify.metrics`.

    Raises:
        BadInput: a model, images or labels that cannot be used; classes that the classifier does not have.
        CheckFailed: outputs that are not finite.
    """
    require_packages("sklearn")
    if out:
        require_folder(out)
    source = open_labelled(data, split, held_out=split is None)
    model = open_classifier(classifier, runtime, device)
    names, multi_label = class_names_of(model), model.spec.multi_label
    if multi_label and source.multi_hot is None:
        has = "have one class" if source.labels is not None else "have no labels"
        raise BadInput(
            f"{source.location}: its images {has}, but those of {classifier} any number of classes; give "
            "a CSV file of labels"
        )
    if source.multi_hot is not None and not multi_label:
        raise BadInput(
            f"{source.location}: its images have any number of classes, but {classifier} is for one class "
            "per image; give a folder for each class"
        )
    labels = class_indices(source, names, f"{classifier}")
    log.info("classes: matched by name, %d of %d have images", len(set(_present(labels))), len(names))
    values, indices, failures = [], [], []
    bar = progress.bar("images", len(source), lines=10) if progress else None
    for batch in classify_images(model, source, batch_size=batch_size, workers=workers):
        values.append(batch.values)
        indices += batch.indices
        failures += batch.failures
        if bar:
            bar.advance(len(batch.indices) + len(batch.failures))
    if not indices:
        raise none_readable(source, failures)
    if failures:
        skipped = counted(len(failures), "image that cannot be read", "images that cannot be read")
        log.warning("skipped %s: %s", skipped, abridged(failures, _NAMED, "; "))
    probabilities, labels = torch.cat(values), labels[torch.tensor(indices)]
    if multi_label and not labels.any():
        raise BadInput(f"{source.location}: no image has a class, so nothing can be measured")
    measure = multi_label_metrics if multi_label else single_label_metrics
    scores = {
        "classifier": str(classifier),
        "runtime": model.title,
        "data": str(source.location),
        "split": source.split,
        "images": len(indices),
        "skipped": failures,
        "multi_label": multi_label,
        "class_names": list(names),
        **measure(probabilities, labels, names),
    }
    if out:
        _write(out, scores, names)
    return scores


def _present(labels: torch.Tensor) -> list[int]:
    return (labels if labels.ndim == 1 else labels.nonzero()[:, 1]).tolist()


def _write(out: Path, scores: dict[str, Any], names: tuple[str, ...]) -> None:
    about = f"{scores['images']:,} images of {'/'.join(Path(scores['data']).parts[-2:])}"
    error = scores["calibration"]["error"]
    if "confusion" in scores:
        title = f"top-1 {scores['top1']:.1%}, balanced accuracy {scores['balanced_accuracy']:.1%}\n{about}"
        draw_confusion(out / "confusion_matrix.png", scores["confusion"], names, title)
    title = f"expected calibration error {error:.1%}\n{about}"
    draw_reliability(out / "reliability.png", scores["calibration"], title)
    write_json(out / "scores.json", scores)
