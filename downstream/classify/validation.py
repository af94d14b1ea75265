"""Accuracy of a classifier on validation or test images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coma.amp import Precision, autocast
from coma.data import Source, normalized_batches, topk_accuracy
from coma.errors import CheckFailed
from coma.image_size import ImageSize
from coma.models.classifiers import Classifier
from downstream.classify.metrics import average_precisions


@dataclass(frozen=True)
class Validation:
    """Scores of a classifier on validation or test images."""

    step: int
    """Number of optimizer steps that the classifier has taken."""
    top1: float | None
    """Top-1 accuracy, 0..1; None if an image may have any number of classes."""
    top5: float | None
    """Top-5 accuracy; None for five classes or fewer, and where top-1 is None."""
    loss: float
    """Mean cross-entropy, without label smoothing."""
    images: int
    """Number of images that could be read."""
    mean_ap: float | None = None
    """Mean average precision over the classes, 0..1, if an image may have any number of them; else None."""

    @property
    def score(self) -> float:
        """Returns what chooses the checkpoint: top-1, or the mean average precision."""
        return self.mean_ap or 0.0 if self.top1 is None else self.top1

    def __str__(self) -> str:
        return f"{'mAP' if self.top1 is None else 'top-1'} {self.score:.2%}"


def validate(
    classifier: Classifier,
    source: Source,
    labels: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    step: int,
    image_size: ImageSize,
    batch_size: int,
    precision: Precision = "fp32",
    workers: int | None = None,
) -> tuple[Validation, tuple[str, ...]]:
    """Scores a classifier on centre crops, the crops that `coma evaluate` uses.

    Args:
        classifier: Classifier on the device to compute on; it stays in evaluation mode.
        source: Validation or test images.
        labels: Labels of all these images, int64 `[m]`, or float32 `[m, classes]` of 0 and 1.
        mean: Per-channel mean of pixels scaled to 0..1.
        std: Per-channel standard deviation.
        step: Number of optimizer steps that the classifier has taken.
        image_size: Size of the crops.
        batch_size: Images per forward pass.
        precision: Number format of the forward pass.
        workers: Number of processes that decode images.

    Returns:
        The scores, and one line for each image that could not be read.

    Raises:
        BadInput: no image could be read.
        CheckFailed: the classifier's outputs are not finite.
    """
    device = next(classifier.parameters()).device
    classifier.eval()
    logits, indices, failures = [], [], []
    batches = normalized_batches(
        source,
        mean,
        std,
        image_size=image_size,
        channels=classifier.config.channels,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    with closing(batches), torch.inference_mode(), autocast(precision, device):
        for images, batch in batches:
            logits.append(classifier(images).float().cpu())  # b classes
            indices.append(batch.indices)
            failures += batch.failures
    return score(torch.cat(logits), labels[torch.cat(indices)], step), tuple(failures)


def score(logits: Tensor, labels: Tensor, step: int) -> Validation:
    """Returns the scores of logits `[m, classes]` for labels as those of `validate`.

    Raises:
        CheckFailed: the logits are not finite.
    """
    if not logits.isfinite().all():
        raise CheckFailed(f"step {step}: the classifier's outputs are not finite; try --precision fp32")
    if labels.ndim == 2:
        loss = F.binary_cross_entropy_with_logits(logits, labels).item()
        precisions = average_precisions(logits, labels)
        defined = precisions[~np.isnan(precisions)]
        mean_ap = float(defined.mean()) if len(defined) else 0.0
        return Validation(step, None, None, loss, len(labels), mean_ap)
    top5 = topk_accuracy(logits, labels, 5) if logits.shape[1] > 5 else None
    loss = F.cross_entropy(logits, labels).item()
    return Validation(step, topk_accuracy(logits, labels, 1), top5, loss, len(labels))
