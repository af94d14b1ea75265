"""Classification: cross-entropy with soft targets on mixed and partly erased images.

Images with any number of classes get a binary cross-entropy per class (a sigmoid for each output).

The recipe is that of MAE's fine-tuning (He et al. 2021, arXiv 2111.06377, table 9), in timm's implementation.
A quarter of the images get a rectangle of noise (random erasing, Zhong et al. 2020). Then every batch is
mixed with itself in reverse order: either pixels and labels are blended with a weight from Beta(0.8, 0.8)
(mixup, Zhang et al. 2018, sec. 1), or a box of one image is pasted into the other and labels are blended by
its area (CutMix, Yun et al. 2019, eq. 1). Labels are smoothed (Szegedy et al. 2016, sec. 7). All of it is
drawn from the global generators, which the training loop seeds before every pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from coma.config import FinetuneRecipe
from coma.models.blocks import freeze_stages
from coma.models.classifiers import Classifier


@dataclass
class ClassificationOutput:
    """Results of one forward pass.

    Attributes:
        loss: Scalar, float32.
        metrics: Scalars to log.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Classification(nn.Module):
    """Training objective of a classifier.

    Args:
        recipe: Settings of erasing, mixing and smoothing.
        classifier: Classifier to train.
        classes: Number of classes.
        weights: Weight of every class, `[classes]`; see `balanced_weights`.
    """

    def __init__(
        self, recipe: FinetuneRecipe, classifier: Classifier, classes: int, weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.recipe, self.classes = recipe, classes
        self.classifier = classifier
        self.register_buffer("weights", weights, persistent=False)
        self._frozen = freeze_stages(classifier, recipe.frozen_stages)

    def train(self, mode: bool = True) -> Classification:
        """Sets the mode; frozen parts stay in evaluation mode, without drop path."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor) -> ClassificationOutput:
        """Returns the loss of normalised images `[b, c, H, W]` (b even for mixing) and their labels.

        Labels are int64 `[b]`, or float32 `[b, classes]` of 0 and 1 for any number of classes per image.
        """
        images, targets = self.mix(images, labels)
        logits, weights = self.classifier(images).float(), getattr(self, "weights", None)
        if labels.ndim == 2:
            loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
        else:
            loss = F.cross_entropy(logits, targets, weight=weights)
        return ClassificationOutput(loss)

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Erases and mixes; returns images and targets `[b, classes]`.

        The rows of the targets add up to 1, unless an image may have any number of classes.
        """
        recipe = self.recipe
        images = images.clone()  # timm works in place
        if recipe.random_erasing:
            images = RandomErasing(recipe.random_erasing, mode="pixel", device=images.device)(images)  # type: ignore[arg-type]
        if labels.ndim == 2:
            if recipe.mixup or recipe.cutmix:
                mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=len(labels))
                images, shares = mixup(images, torch.arange(len(labels), device=labels.device))
                labels = shares @ labels  # shares [b, b]: of every image in every mixed one
            smoothing = recipe.label_smoothing
            return images, labels * (1 - smoothing) + smoothing / self.classes
        if not (recipe.mixup or recipe.cutmix):
            return images, mixup_target(labels, self.classes, smoothing=recipe.label_smoothing)
        mixup = Mixup(
            recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=self.classes
        )
        return mixup(images, labels)

    def before_step(self, progress: float) -> None:
        """Does nothing; the training loop calls it before every optimizer step."""

    def after_step(self, progress: float) -> None:
        """Does nothing; the training loop calls it after every optimizer step."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes block activations in the backward pass instead of storing them."""
        self.classifier.set_grad_checkpointing(enable)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the classifier alone: mixing draws other numbers in every pass."""
        self.classifier.compile(*args, **kwargs)


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Returns the weight of every class with which all classes contribute equally to the loss, `[classes]`.

    With one class per image it is n / (classes * images of the class) (King and Zeng 2001, "Logistic
    regression in rare events data", as scikit-learn's "balanced"). With any number, it is the weight of the
    images that have the class: images without it / images with it.

    Args:
        labels: int64 `[n]`, or float32 `[n, classes]` of 0 and 1.
        classes: Number of classes, each with an image.
    """
    if labels.ndim == 2:
        positive = labels.sum(dim=0).clamp(min=1)
        return ((len(labels) - positive) / positive).clamp(min=1 / len(labels))
    return len(labels) / (classes * labels.bincount(minlength=classes).float())
