"""The run directory of a classifier: it is validated during training, and the best weights are kept.

The best weights are part of the resumable state as well as of the artifact, so that a run that is killed
between two validations loses neither them nor their score.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from coma.amp import choose_attention, choose_precision
from coma.artifact import LINEAR_HEAD, MULTI_LABEL, ArtifactConfig, library_versions
from coma.config import FinetuneConfig
from coma.data import Source
from coma.errors import BadInput
from coma.models.classifiers import build_classifier
from downstream.classify.plan import FinetunePlan
from downstream.classify.validation import Validation, validate
from pretrain.training.console import TrainingConsole
from pretrain.training.run_directory import RunDirectory, first_images

_PREFIX = "classifier."
"""Prefix of the classifier's tensors in the state of `Classification`."""


class ClassifierRunDirectory(RunDirectory[FinetuneConfig]):
    """Validates, publishes the best classifier (the earliest of equals), and tests it at the end.

    Args:
        plan: The run.
        console: Prints scores, and what could not be written.

    Raises:
        BadInput: no training, validation or test image can be read.
    """

    def __init__(self, plan: FinetunePlan, console: TrainingConsole) -> None:
        super().__init__(plan, console)
        self._finetuning = plan
        self.best: Validation | None = None
        self.last: Validation | None = None
        self.test: Validation | None = None
        self._chosen = 0  # the step of the weights that are kept
        self._weights: dict[str, Tensor] = {}
        self._reported: set[str] = set()
        for source in (plan.source, plan.val, plan.test):
            if source is not None:
                first_images(source, plan.config.model, plan.config.data.image_size)
        for note in plan.notes:
            console.say(note)

    def resume(self) -> dict[str, Any] | None:
        """Returns the state to resume from, if there is one.

        Raises:
            BadInput: the number of validation or test images differs, so that scores cannot be compared.
        """
        state = super().resume()
        if state is None:
            return None
        kept, plan = state["validation"], self._finetuning
        now, before = self._counts(), kept["images"]
        for what in () if self.may_change else now:
            if now[what] != before[what]:
                raise BadInput(
                    f"{plan.folder}: there are {now[what]} {what} images, but the run was started with "
                    f"{before[what]}; give the same, or start a new run"
                )
        if self.changed or before != now:
            if plan.held_out:
                self._console.warn("the held-out images were drawn anew; some of them were trained on before")
            return state  # scores on other images cannot be compared
        self._weights, self._chosen, self._evaluated = kept["weights"], kept["chosen"], kept["evaluated"]
        self.best, self.last, self.test = (
            Validation(**kept[name]) if kept[name] else None for name in ("best", "last", "test")
        )
        if self.test and state["step"] < plan.steps:
            self._console.say(
                "the test images were used already; they are used again if later weights do better"
            )
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Writes the resumable state and the artifact."""
        scores = {"best": self.best, "last": self.last, "test": self.test}
        kept = {
            **{name: each and asdict(each) for name, each in scores.items()},
            "weights": self._weights,
            "chosen": self._chosen,
            "evaluated": self._evaluated,
            "images": self._counts(),
        }
        super().save(state | {"validation": kept})

    def evaluate(self, weights: dict[str, Tensor], step: int, device: torch.device) -> None:
        """Validates these weights and, at the end, tests the best ones, unless done before resuming."""
        if self._evaluated == step:
            return
        plan = self._finetuning
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
        if plan.val is not None:
            self.last = self._score(own, plan.val, plan.val_labels, step, device, "validation")
        if self.last is None or self.best is None or _is_better(self.last, self.best):
            self.best, self._chosen, self.test = self.last, step, None
            self._weights = {name: tensor.clone() for name, tensor in own.items()}
        if self.last and self.best:
            self._log_scores("val", self.last, {"step": step})
            scores = f"{self.last}, best {self.best.score:.2%} at step {self._chosen}"
            self._console.say(f"step {step}/{plan.steps}  validation: {scores}")
        if step == plan.steps and self.test is None:
            self.test = self._score(self._weights, plan.test, plan.test_labels, self._chosen, device, "test")
            self._log_scores("test", self.test, {"step": step, "chosen_step": self._chosen})
            self._console.say(
                f"step {step}/{plan.steps}  test, with the weights of step {self._chosen}: "
                f"{self.test} on {self.test.images:,} images"
            )
        self._evaluated = step

    def _counts(self) -> dict[str, int]:
        plan = self._finetuning
        return {"test": len(plan.test), "validation": 0 if plan.val is None else len(plan.val)}

    def _log_scores(self, split: str, scores: Validation, row: dict[str, Any]) -> None:
        named = named_scores(split, scores)
        del named[f"{split}_images"]
        self.log(row | named)

    def _score(
        self,
        weights: dict[str, Tensor],
        source: Source,
        labels: Tensor,
        step: int,
        device: torch.device,
        what: str,
    ) -> Validation:
        """Returns the scores of a classifier with these weights; an unreadable image is reported once."""
        plan, config = self._finetuning, self._finetuning.config
        with torch.device("meta"):
            classifier = build_classifier(config.model, len(plan.class_names))
        classifier.load_state_dict(weights, assign=True)
        classifier.to(device)
        precision = choose_precision(config.run.precision, device)
        choose_attention(classifier, precision, device)
        with self.at_once():
            scores, failures = validate(
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
        for failure in failures:
            if failure not in self._reported:
                self._console.warn(f"left out of the {what} images: {failure}")
        self._reported |= set(failures)
        return scores

    def artifact_payload(self, state: dict[str, Any]) -> tuple[dict[str, Tensor], ArtifactConfig] | None:
        """Returns the best classifier so far, or None before the first validation."""
        plan = self._finetuning
        if not self._weights:
            return None
        trained = {
            "method": "finetune",
            "steps": self._chosen,
            "steps_planned": plan.steps,
            "images_seen": self._chosen * plan.slices.global_batch,
            "ema": plan.config.optimizer.ema_decay,
        }
        return self._weights, classifier_config(plan, trained, self.best, self.test)


def classifier_config(
    plan: FinetunePlan, trained: dict[str, Any], val: Validation | None, test: Validation | None
) -> ArtifactConfig:
    """Returns the description of a run's classifier.

    Args:
        plan: The run.
        trained: How the weights were trained; the images and scores are added.
        val: Scores on the validation images.
        test: Scores on the test images.
    """
    config, (mean, std) = plan.config, plan.statistics
    return ArtifactConfig(
        kind="classifier",
        model=config.model,
        objective=None if config.from_scratch else plan.pretrained.objective,
        image_size=config.data.image_size,
        mean=mean,
        std=std,
        class_names=plan.class_names,
        trained={
            **trained,
            **named_scores("val", val),
            **named_scores("test", test),
            "data": plan.source.location.name,
            "images": len(plan.source),
            "val": None if plan.val is None else plan.val.location.name,
            "val_held_out_of_training": plan.held_out,
            "test": plan.test.location.name,
            "pretrained": None if config.from_scratch else plan.pretrained.trained,
        },
        versions=library_versions(),
        head=LINEAR_HEAD | ({MULTI_LABEL: True} if plan.multi_label else {}),
    )


def named_scores(split: str, scores: Validation | None) -> dict[str, Any]:
    """Returns scores that are defined, by names that say which images they were computed on."""
    if scores is None:
        return {}
    return {f"{split}_{n}": v for n, v in asdict(scores).items() if n != "step" and v is not None}


def _is_better(one: Validation, other: Validation) -> bool:
    """Returns whether the score is higher, or equal (frequent with few images) with a lower loss."""
    return (one.score, -one.loss) > (other.score, -other.loss)
