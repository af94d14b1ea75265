"""Metrics of classifiers, computed by scikit-learn from the probabilities of all images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from coma.data import topk_accuracy

BINS = 15
"""Number of equally wide bins of confidence, as Guo et al. 2017 use."""
THRESHOLD = 0.5
"""Probability from which an image has a class, where it may have any number."""


@dataclass(frozen=True)
class Calibration:
    """How often predictions of each confidence are right (Guo et al. 2017, arXiv 1706.04599, sec. 2)."""

    error: float
    """Expected calibration error, 0..1 (eq. 3): mean gap of confidence and accuracy over all predictions."""
    confidence: list[float | None]
    """Mean confidence of each bin; None for bins without a prediction."""
    accuracy: list[float | None]
    """Share of right predictions in each bin."""
    counts: list[int]
    """Number of predictions in each bin."""


def calibration(confidence: Tensor, right: Tensor) -> Calibration:
    """Returns the calibration of predictions.

    Args:
        confidence: Probabilities `[n]` of the predictions.
        right: Whether each prediction is right, bool `[n]`.
    """
    bins = (confidence.double() * BINS).long().clamp(max=BINS - 1)
    counts = bins.bincount(minlength=BINS)
    sums = [bins.bincount(weights=values.double(), minlength=BINS) for values in (confidence, right)]
    error = (sums[0] - sums[1]).abs().sum() / len(confidence)
    means = [
        [float(total / count) if count else None for total, count in zip(each, counts, strict=True)]
        for each in sums
    ]
    return Calibration(float(error), means[0], means[1], counts.tolist())


def single_label_metrics(probabilities: Tensor, labels: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the metrics of a classifier of images that have one class each, as plain data.

    Args:
        probabilities: `[n, classes]`; rows add up to 1.
        labels: int64 `[n]`.
        names: Class names.

    Returns:
        top1, top5 (None for five classes or fewer), balanced_accuracy, cross_entropy, calibration,
        classes (precision, recall, f1 and support of each; None where undefined) and confusion
        (`[classes][classes]` counts; rows are the true classes).
    """
    from sklearn import metrics

    score: Any = metrics.precision_recall_fscore_support  # annotated too narrowly
    confidence, guess = probabilities.max(dim=1)
    numbers = range(len(names))
    per_class = score(labels.numpy(), guess.numpy(), labels=list(numbers), zero_division=np.nan)
    recalls = per_class[1][per_class[3] > 0]
    return {
        "top1": topk_accuracy(probabilities, labels, 1),
        "top5": topk_accuracy(probabilities, labels, 5) if len(names) > 5 else None,
        "balanced_accuracy": float(recalls.mean()),
        "cross_entropy": F.nll_loss(probabilities.clamp(min=1e-12).log(), labels).item(),
        "calibration": asdict(calibration(confidence, guess == labels)),
        "classes": _rows(names, ("precision", "recall", "f1", "support"), per_class),
        "confusion": metrics.confusion_matrix(labels.numpy(), guess.numpy(), labels=list(numbers)).tolist(),
    }


def multi_label_metrics(probabilities: Tensor, labels: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the metrics of a classifier of images that have any number of classes, as plain data.

    Args:
        probabilities: `[n, classes]`, each 0..1.
        labels: float32 `[n, classes]` of 0 and 1.
        names: Class names.

    Returns:
        mean_ap, micro_f1, macro_f1 (with `THRESHOLD`), exact_match (share of images with exactly their
        classes), calibration, and classes (ap, precision, recall, f1 and support of each; None where
        undefined).
    """
    from sklearn import metrics

    score: Any = partial(metrics.precision_recall_fscore_support, average="binary")
    truth, guess = labels.numpy() > 0, probabilities.numpy() >= THRESHOLD
    support = truth.sum(axis=0)
    per_class = np.array(
        [score(*each, zero_division=np.nan)[:3] for each in zip(truth.T, guess.T, strict=True)]
    )
    micro_f1 = score(truth.ravel(), guess.ravel(), zero_division=0.0)[2]
    precisions = average_precisions(probabilities, labels)
    return {
        "mean_ap": float(np.nanmean(precisions)),
        "micro_f1": float(micro_f1),
        "macro_f1": float(np.nan_to_num(per_class[support > 0, 2]).mean()),
        "exact_match": float((truth == guess).all(axis=1).mean()),
        "calibration": asdict(calibration(probabilities.flatten(), labels.flatten() > 0)),
        "classes": _rows(
            names, ("ap", "precision", "recall", "f1", "support"), (precisions, *per_class.T, support)
        ),
    }


def average_precisions(scores: Tensor, labels: Tensor) -> np.ndarray:
    """Returns the average precision of every class, `[classes]`; nan for those that no image has.

    Args:
        scores: Probabilities or logits `[n, classes]`.
        labels: float32 `[n, classes]` of 0 and 1.
    """
    from sklearn.metrics import average_precision_score

    present = labels.any(dim=0).tolist()
    return np.array(
        [
            average_precision_score(labels[:, i].numpy(), scores[:, i].numpy()) if there else np.nan
            for i, there in enumerate(present)
        ]
    )


def _rows(names: tuple[str, ...], columns: tuple[str, ...], values: Any) -> list[dict[str, Any]]:
    """Returns a dictionary per class; undefined values (nan) become None, and the support a whole number."""
    rows = []
    for i, name in enumerate(names):
        row = {column: float(each[i]) for column, each in zip(columns, values, strict=True)}
        row = {column: None if np.isnan(value) else value for column, value in row.items()}
        rows.append({"name": name, **row, "support": int(row["support"] or 0)})
    return rows
