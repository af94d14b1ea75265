"""Fine-tuning: the whole encoder and a linear head learn the classes of labelled images.

The same loop as in pre-training (`loop`), so that stopping, resuming and everything else about a run is the
same; its own are the recipe (`objectives.classification`, `optimizer.layer_groups`), the labels
(`finetune_plan`), and what is kept: the classifier that did best on the validation images (`validation`).

Validation images choose the checkpoint: those of the val split, or else a part of every class's training
images, which is then not trained on. The test images are used once, at the end, with the checkpoint that was
chosen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from coma.artifact import load_strict
from coma.atomic_io import lies_among
from coma.config import FinetuneConfig
from coma.data import Batch, labelled_batches
from coma.errors import BadInput
from coma.models.classifiers import build_classifier
from coma.objectives.classification import Classification
from pretrain.finetune.plan import FinetunePlan, prepare_finetuning
from pretrain.finetune.validation import ClassifierRunDirectory, Validation
from pretrain.training.console import Report
from pretrain.training.distributed import processes
from pretrain.training.trainer import Task, train


@dataclass(frozen=True)
class Finetuned:
    """What came out of a run."""

    config: FinetuneConfig
    """As its directory has it."""
    best: Validation | None
    """Scores of the chosen checkpoint on the validation images; None where nothing chose it."""
    last: Validation | None
    """Scores on the validation images at the last step; None where there are none."""
    test: Validation
    """Scores of the chosen checkpoint on the test images."""
    steps: int
    """Optimizer steps of the whole run."""
    train_images: int
    seconds: float
    """That this call took."""

    @property
    def artifact(self) -> Path:
        """The classifier that was chosen."""
        return self.config.run.out / "artifact"


def finetune(config: FinetuneConfig, *, resume: bool = False, allow_changed_data: bool = False) -> Finetuned:
    """Fine-tune an artifact's encoder, from beginning to end or from the last saved state on.

    Args:
        config: The run. `model`, `class_names`, mean, deviation and layer decay are filled in from the
            artifact and the images. Resuming takes the directory `config.run.out`, and refuses settings that
            would change what is learned.
        resume: Go on with a run that was interrupted.
        allow_changed_data: Go on although the images are not those that the run was started with.

    Raises:
        BadInput: settings, artifact, data or directory that cannot be used, or several processes.
        CheckFailed: a loss or gradient that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    began = time.monotonic()
    with processes(config.run.device) as group, closing(Report()) as report:
        if group.world > 1:
            raise BadInput("fine-tuning runs in one process, on one GPU or a CPU; start it without torchrun")
        plan = prepare_finetuning(config, resume=resume)
        for images in dict.fromkeys((config.data.images, config.test)):
            if not resume and (note := lies_among(config.run.out, images, "--run")):
                report.say(note)
        keeper = ClassifierRunDirectory(plan, report)
        task = _finetuning(plan, keeper)
        train(plan, task, group, report, resume=resume, allow_changed_data=allow_changed_data)
    if keeper.test is None:
        raise AssertionError("every run ends with a test")
    seconds = time.monotonic() - began
    return Finetuned(
        plan.config, keeper.best, keeper.last, keeper.test, plan.steps, len(plan.source), seconds
    )


def _finetuning(plan: FinetunePlan, keeper: ClassifierRunDirectory) -> Task:
    config = plan.config

    def build() -> Classification:
        classifier = build_classifier(config.model, len(plan.class_names))
        if not config.from_scratch:
            tensors = classifier.state_dict() | plan.encoder  # the head stays as it was drawn
            load_strict(classifier, tensors, source=str(config.artifact))
        return Classification(config.optimizer, classifier, len(plan.class_names))

    def batches(start: int, device: torch.device) -> Iterator[Batch]:
        return labelled_batches(
            plan.source,
            config.data,
            plan.labels,
            channels=config.model.channels,
            seed=config.run.seed,
            batch=plan.slices,
            rand_augment=config.optimizer.rand_augment,
            start=start,
            device=device,
        )

    return Task(build, batches, lambda _: keeper)
