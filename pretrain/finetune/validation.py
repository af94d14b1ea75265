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

from coma.amp import Precision, autocast, choose_attention, choose_precision
from coma.artifact import LINEAR_HEAD, ArtifactConfig, library_versions
from coma.config import FinetuneConfig
from coma.data import Source, evaluation_batches, normalize, top_share
from coma.errors import BadInput, CheckFailed
from coma.models.classifiers import Classifier, build_classifier
from pretrain.finetune.plan import FinetunePlan
from pretrain.training.console import Report
from pretrain.training.run_directory import RunDirectory, first_images

_PREFIX = "classifier."
"""Of the classifier's tensors in the objective's."""


@dataclass(frozen=True)
class Validation:
    """Scores of a classifier on validation or test images."""

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
        source: Validation or test images.
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


class ClassifierRunDirectory(RunDirectory[FinetuneConfig]):
    """Validates, hands over the classifier that did best (the earliest of several), and tests it at the end.

    Args:
        plan: The run.
        report: Told the scores, and what could not be written.

    Raises:
        BadInput: no training, validation or test image can be read.
    """

    def __init__(self, plan: FinetunePlan, report: Report) -> None:
        super().__init__(plan, report)
        self._finetuning = plan
        self.best: Validation | None = None
        self.last: Validation | None = None
        self.test: Validation | None = None
        self._chosen = 0  # the step whose weights are kept
        self._weights: dict[str, Tensor] = {}
        self._told: set[str] = set()
        for source in (plan.source, plan.val, plan.test):
            if source is not None:
                first_images(source, plan.config.model, plan.config.data.image_size)
        for note in plan.notes:
            report.say(note)

    def resume(self) -> dict[str, Any] | None:
        """The state to go on from, if there is one.

        Raises:
            BadInput: other validation or test images than before, whose scores could not be compared; or a
                run of an earlier version.
        """
        state = super().resume()
        if state is None:
            return None
        kept, plan = state["validation"], self._finetuning
        if "images" not in kept:
            raise BadInput(
                f"{plan.folder}: was begun by an earlier version, which chose the checkpoint on the test "
                "images, and cannot go on; its artifact can still be used; start a new run with another --run"
            )
        now, before = self._counts(), kept["images"]
        for what in () if self.may_change else now:
            if now[what] != before[what]:
                raise BadInput(
                    f"{plan.folder}: there are {now[what]} {what} images, but the run was started with "
                    f"{before[what]}; give the same, or start a new run"
                )
        if self.changed or before != now:
            if plan.held_out:
                self._report.warn("the held-out images were drawn anew; some of them were trained on before")
            return state  # scores on other images say nothing of what follows
        self._weights, self._chosen, self._looked = kept["weights"], kept["chosen"], kept["looked"]
        self.best, self.last, self.test = (
            Validation(**kept[name]) if kept[name] else None for name in ("best", "last", "test")
        )
        if self.test and state["step"] < plan.steps:
            self._report.say(
                "the test images were used already; they are used again if other weights do better now"
            )
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the resumable state and the artifact."""
        kept = {
            **{name: scores and asdict(scores) for name, scores in self._scores().items()},
            "weights": self._weights,
            "chosen": self._chosen,
            "looked": self._looked,
            "images": self._counts(),
        }
        super().save(state | {"validation": kept})

    def look(self, weights: dict[str, Tensor], step: int, device: torch.device) -> None:
        """Validate these weights, and test the best ones at the end, unless that was done before resuming."""
        if self._looked == step:
            return
        plan = self._finetuning
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
        if plan.val is not None:
            self.last = self._scored(own, plan.val, plan.val_labels, step, device, "validation")
        if self.last is None or self.best is None or _better(self.last, self.best):
            self.best, self._chosen, self.test = self.last, step, None
            self._weights = {name: tensor.clone() for name, tensor in own.items()}
        if self.last and self.best:
            self._log_scores("val", self.last, {"step": step})
            scores = f"top-1 {self.last.top1:.2%}, best {self.best.top1:.2%} at step {self._chosen}"
            self._report.say(f"step {step}/{plan.steps}  validation: {scores}")
        if step == plan.steps and self.test is None:
            self.test = self._scored(self._weights, plan.test, plan.test_labels, self._chosen, device, "test")
            self._log_scores("test", self.test, {"step": step, "chosen_step": self._chosen})
            scores = f"top-1 {self.test.top1:.2%} on {self.test.images:,} images"
            self._report.say(
                f"step {step}/{plan.steps}  test, with the weights of step {self._chosen}: {scores}"
            )
        self._looked = step

    def _counts(self) -> dict[str, int]:
        plan = self._finetuning
        return {"test": len(plan.test), "validation": 0 if plan.val is None else len(plan.val)}

    def _scores(self) -> dict[str, Validation | None]:
        return {"best": self.best, "last": self.last, "test": self.test}

    def _log_scores(self, what: str, scores: Validation, row: dict[str, Any]) -> None:
        values = {"top1": scores.top1, "top5": scores.top5, "loss": scores.loss}
        self.log(row | {f"{what}_{name}": value for name, value in values.items() if value is not None})

    def _scored(
        self,
        weights: dict[str, Tensor],
        source: Source,
        labels: Tensor,
        step: int,
        device: torch.device,
        what: str,
    ) -> Validation:
        """Scores of these weights of the classifier; images that cannot be read are named once."""
        plan, config = self._finetuning, self._finetuning.config
        with torch.device("meta"):
            classifier = build_classifier(config.model, len(plan.class_names))
        classifier.load_state_dict(weights, assign=True)
        classifier.to(device)
        precision = choose_precision(config.run.precision, device)
        choose_attention(classifier, precision, device)
        with self.at_once():
            scored = validate(
                classifier,
                source,
                labels,
                *plan.statistics,
                step=step,
                image_size=config.data.image_size,
                batch_size=plan.slices.micro_batch,
                precision=precision,
                workers=config.data.workers,
            )
        scores, failures = scored
        for failure in failures:
            if failure not in self._told:
                self._report.warn(f"left out of the {what} images: {failure}")
        self._told |= set(failures)
        return scores

    def handed_over(self, state: dict[str, Any]) -> tuple[dict[str, Tensor], ArtifactConfig] | None:
        """The best classifier so far, once there is one."""
        plan = self._finetuning
        if not self._weights:
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
                "steps": self._chosen,
                "steps_planned": plan.steps,
                "images_seen": self._chosen * plan.slices.global_batch,
                **_facts("val", self.best),
                **_facts("test", self.test),
                "data": plan.source.location.name,
                "images": len(plan.source),
                "val": None if plan.val is None else plan.val.location.name,
                "val_held_out_of_training": plan.held_out,
                "test": plan.test.location.name,
                "ema": config.optimizer.ema_decay,
                "pretrained": None if config.from_scratch else plan.about.trained,
            },
            versions=library_versions(),
            head=dict(LINEAR_HEAD),
        )


def _better(one: Validation, other: Validation) -> bool:
    """Returns whether the top-1 is higher, or the same (often, with few images) and the loss lower."""
    return (one.top1, -one.loss) > (other.top1, -other.loss)


def _facts(what: str, scores: Validation | None) -> dict[str, float | None]:
    """Returns scores for the artifact, under names that say which images they were counted on."""
    if scores is None:
        return {}
    values = {"top1": scores.top1, "top5": scores.top5, "loss": scores.loss, "images": scores.images}
    return {f"{what}_{name}": value for name, value in values.items()}
