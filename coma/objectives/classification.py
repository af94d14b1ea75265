"""Classification: cross-entropy with soft targets on mixed and partly erased images.

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

from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.loss.cross_entropy import SoftTargetCrossEntropy
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
    """

    def __init__(self, recipe: FinetuneRecipe, classifier: Classifier, classes: int) -> None:
        super().__init__()
        self.recipe, self.classes = recipe, classes
        self.classifier = classifier
        self.loss = SoftTargetCrossEntropy()
        self._frozen = freeze_stages(classifier, recipe.frozen_stages)

    def train(self, mode: bool = True) -> Classification:
        """Sets the mode; frozen parts stay in evaluation mode, without drop path."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor) -> ClassificationOutput:
        """Returns the loss of normalised images `[b, c, H, W]` (b even for mixing) and labels int64 `[b]`."""
        images, targets = self.mix(images, labels)
        return ClassificationOutput(self.loss(self.classifier(images).float(), targets))

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Erases and mixes; returns images and targets `[b, classes]`, whose rows add up to 1."""
        recipe = self.recipe
        images = images.clone()  # timm works in place
        if recipe.random_erasing:
            images = RandomErasing(recipe.random_erasing, mode="pixel", device=images.device)(images)  # type: ignore[arg-type]
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
