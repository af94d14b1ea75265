"""How good is the classifier so far? It is validated on the way, and the best one is kept.

The weights that did best are part of the resumable state as well as of the artifact: a run that is killed
between two validations loses neither them nor their score.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.artifact import LINEAR_HEAD, ArtifactConfig, library_versions
from pretrain.config import FinetuneConfig
from pretrain.data import Source, evaluation_batches, normalize, top_share
from pretrain.errors import BadInput, CheckFailed
from pretrain.models.classifier import Classifier, build_classifier
from pretrain.precision import Precision, autocast, choose_attention, choose_precision
from pretrain.training.finetune_plan import FinetunePlan
from pretrain.training.keeping import Keeper, first_images
from pretrain.training.report import Report

_PREFIX = "classifier."
"""Of the classifier's tensors in the objective's."""


@dataclass(frozen=True)
class Validation:
    """Scores of a classifier on the test images."""

    step: int
    """Optimizer steps before it."""
    top1: float
    """Share of images whose likeliest class is right, 0..1."""
    top5: float | None
    """Share whose class is among the five likeliest; None with five classes or fewer."""
    loss: float
    """Mean cross-entropy, without smoothing."""
    images: int
    """That could be read."""


def validate(
    classifier: Classifier,
    source: Source,
    labels: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    step: int,
    image_size: int,
    batch_size: int,
    precision: Precision = "fp32",
    workers: int | None = None,
) -> tuple[Validation, tuple[str, ...]]:
    """Score a classifier on centre crops, as `evaluate` shows them to frozen encoders.

    Args:
        classifier: On the device to compute on; is left in evaluation mode.
        source: Test images.
        labels: Of all of them, int64 `[m]`.
        mean: Per channel, of pixels scaled to 0..1.
        std: Per channel, likewise.
        step: Optimizer steps that the classifier has taken.
        image_size: Side in pixels of the images shown.
        batch_size: Images at a time.
        precision: Number format of the forward pass.
        workers: Processes that decode.

    Returns:
        The scores, and why images were left out, one line for each.

    Raises:
        BadInput: no image could be read.
        CheckFailed: the classifier's outputs are not finite.
    """
    device = next(classifier.parameters()).device
    classifier.eval()
    logits, indices, failures = [], [], []
    channels = classifier.config.channels
    with torch.inference_mode(), autocast(precision, device):
        for batch in evaluation_batches(
            source, image_size=image_size, channels=channels, batch_size=batch_size, workers=workers
        ):
            images = normalize(batch.images.to(device), mean, std)
            logits.append(classifier(images).float().cpu())  # b classes
            indices.append(batch.indices)
            failures += batch.failures
    guess, truth = torch.cat(logits), labels[torch.cat(indices)]
    if not guess.isfinite().all():
        raise CheckFailed(f"step {step}: the classifier's outputs are not finite; try --precision fp32")
    top5 = top_share(guess, truth, 5) if guess.shape[1] > 5 else None
    loss = F.cross_entropy(guess, truth).item()
    return Validation(step, top_share(guess, truth, 1), top5, loss, len(truth)), tuple(failures)


class ClassifierKeeper(Keeper[FinetuneConfig]):
    """Validates, hands over the classifier that did best (the earliest of several).

    Args:
        plan: The run.
        report: Told the scores, and what could not be written.

    Raises:
        BadInput: no training image, or no test image, can be read.
    """

    def __init__(self, plan: FinetunePlan, report: Report) -> None:
        super().__init__(plan, report)
        self._finetuning = plan
        self.best: Validation | None = None
        self.last: Validation | None = None
        self._weights: dict[str, Tensor] = {}
        self._told: set[str] = set()
        for source in (plan.source, plan.test):
            first_images(source, plan.config.model, plan.config.data.image_size)

    def resume(self) -> dict[str, Any] | None:
        """The state to go on from, if there is one.

        Raises:
            BadInput: other test images than before: their scores could not be compared.
        """
        state = super().resume()
        if state is None:
            return None
        kept, now = state["validation"], len(self._finetuning.test)
        if kept["test_images"] != now and not self.may_change:
            raise BadInput(
                f"{self._finetuning.test.location}: has {now} images, but the run was started with "
                f"{kept['test_images']} test images; give the same, or start a new run"
            )
        if self.changed or kept["test_images"] != now:
            return state  # scores on other images say nothing of what follows
        self._weights = kept["weights"]
        self.best, self.last = (Validation(**kept[name]) if kept[name] else None for name in ("best", "last"))
        self._looked = self.last.step if self.last else -1
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the resumable state and the artifact."""
        kept = {
            "best": self.best and asdict(self.best),
            "last": self.last and asdict(self.last),
            "weights": self._weights,
            "test_images": len(self._finetuning.test),
        }
        super().save(state | {"validation": kept})

    def look(self, weights: dict[str, Tensor], step: int, device: torch.device) -> None:
        """Validate these weights, unless that was done before the run was resumed."""
        if self.last and self.last.step == step:
            return
        plan, config = self._finetuning, self._finetuning.config
        with torch.device("meta"):
            classifier = build_classifier(config.model, len(plan.class_names))
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
        classifier.load_state_dict(own, assign=True)
        classifier.to(device)
        precision = choose_precision(config.run.precision, device)
        choose_attention(classifier, precision, device)
        with self.at_once():
            scored = validate(
                classifier,
                plan.test,
                plan.test_labels,
                *plan.statistics,
                step=step,
                image_size=config.data.image_size,
                batch_size=plan.slices.micro_batch,
                precision=precision,
                workers=config.data.workers,
            )
        self.last, failures = scored
        for failure in failures:
            if failure not in self._told:
                self._report.warn(f"left out of the test images: {failure}")
        self._told |= set(failures)
        if self.best is None or self.last.top1 > self.best.top1:
            self.best = self.last
            self._weights = {name: tensor.clone() for name, tensor in own.items()}
        row = {"step": step, "top1": self.last.top1, "top5": self.last.top5, "test_loss": self.last.loss}
        self.log({name: value for name, value in row.items() if value is not None})
        scores = f"top-1 {self.last.top1:.2%}, best {self.best.top1:.2%} at step {self.best.step}"
        self._report.say(f"step {step}/{plan.steps}  validation: {scores}")

    def handed_over(self, state: dict[str, Any]) -> tuple[dict[str, Tensor], ArtifactConfig] | None:
        """The best classifier so far, once there is one."""
        plan, best = self._finetuning, self.best
        if best is None:
            return None
        config = plan.config
        mean, std = plan.statistics
        return self._weights, ArtifactConfig(
            kind="classifier",
            model=config.model,
            objective=None if config.from_scratch else plan.about.objective,
            image_size=config.data.image_size,
            mean=mean,
            std=std,
            class_names=plan.class_names,
            trained={
                "method": "finetune",
                "steps": best.step,
                "steps_planned": plan.steps,
                "images_seen": best.step * plan.slices.global_batch,
                "top1": best.top1,
                "top5": best.top5,
                "test_loss": best.loss,
                "data": plan.source.location.name,
                "images": len(plan.source),
                "test": plan.test.location.name,
                "test_images": best.images,
                "ema": config.optimizer.ema,
                "pretrained": None if config.from_scratch else plan.about.trained,
            },
            versions=library_versions(),
            head=dict(LINEAR_HEAD),
        )
