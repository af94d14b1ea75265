"""Fine-tuning: an encoder and a linear head are trained on labelled images, or the head alone.

It runs in the training loop of pre-training, so that stopping, resuming and everything else about a run is
the same. Its own parts are the recipe (`coma.objectives.classification`, layer-wise learning rates), the
labels (`plan`), and the artifact: the classifier with the best validation accuracy (`run_directory`). With
`frozen`, `frozen` fits the head on features instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from coma.artifact import load_strict
from coma.atomic_io import lies_among
from coma.config import FinetuneConfig
from coma.data import Batch, labelled_batches
from coma.errors import BadInput
from coma.locks import lock_run
from coma.models.classifiers import build_classifier
from coma.objectives.classification import Classification
from downstream.classify.frozen import fit_head, head_summary, measure_head
from downstream.classify.plan import FinetunePlan, prepare_finetuning
from downstream.classify.run_directory import ClassifierRunDirectory
from downstream.classify.validation import Validation
from pretrain.training.console import TrainingConsole
from pretrain.training.distributed import Processes, processes
from pretrain.training.run_summary import estimate
from pretrain.training.trainer import Trainer


@dataclass(frozen=True)
class FinetuneResult:
    """Results of a fine-tuning run."""

    config: FinetuneConfig
    """Settings as the run directory has them."""
    best: Validation | None
    """Validation scores of the chosen checkpoint; None without validation images."""
    last: Validation | None
    """Validation scores of the last step; None without validation images."""
    test: Validation
    """Test scores of the chosen checkpoint."""
    steps: int
    """Optimizer steps of the whole run; 0 with `frozen`."""
    train_images: int
    seconds: float
    """Duration of this call."""

    @property
    def artifact(self) -> Path:
        """Directory of the chosen classifier."""
        return self.config.run.out / "artifact"


def finetune(
    config: FinetuneConfig, *, resume: bool = False, allow_changed_data: bool = False
) -> FinetuneResult:
    """Fine-tunes an artifact's encoder, from the beginning or from the last saved state to the end.

    Args:
        config: The run. Model, class names, mean, standard deviation, layer decay and an image size of 0 are
            filled in from the artifact and the images. Resuming uses the directory `config.run.out`, and
            refuses settings that would change what is learned.
        resume: Resume a run that was interrupted.
        allow_changed_data: Resume although the images are not those that the run was started with.

    Raises:
        BadInput: settings, artifact, data or directory that cannot be used, or several processes.
        CheckFailed: a loss or gradient that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    began = time.monotonic()
    with _prepared(config, resume=resume) as (plan, group, console):
        if plan.config.optimizer.frozen:
            with lock_run(plan.config.run.out):
                best, test = fit_head(plan, group, console)
            last, steps = best, 0
        else:
            trainer = _ClassifierTrainer(plan, group, console)
            trainer.train(resume=resume, allow_changed_data=allow_changed_data)
            best, last, test = trainer.directory.best, trainer.directory.last, trainer.directory.test
            steps = plan.steps
    if test is None:
        raise AssertionError("every run ends with a test")
    return FinetuneResult(plan.config, best, last, test, steps, len(plan.source), time.monotonic() - began)


def describe(config: FinetuneConfig, *, resume: bool = False, allow_changed_data: bool = False) -> list[str]:
    """Returns what a run is going to do, with its time and memory estimated; writes nothing.

    Raises:
        BadInput, CheckFailed, Interrupted: as `finetune`.
    """
    with _prepared(config, resume=resume) as (plan, group, console):
        if plan.config.optimizer.frozen:
            return [*head_summary(plan, group), *estimate(measure_head(plan, group.device))]
        trainer = _ClassifierTrainer(plan, group, console)
        measured = trainer.measure(resume=resume, allow_changed_data=allow_changed_data)
        return [*trainer.summary(), *estimate(measured)]


@contextmanager
def _prepared(
    config: FinetuneConfig, *, resume: bool
) -> Iterator[tuple[FinetunePlan, Processes, TrainingConsole]]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("fine-tuning runs in one process, on one GPU or a CPU; start it without torchrun")
    with processes(config.run.device) as group, closing(TrainingConsole()) as console:
        plan = prepare_finetuning(config, resume=resume)
        for images in dict.fromkeys((config.data.images, config.test)):
            if not resume and (note := lies_among(config.run.out, images)):
                console.say(note)
        yield plan, group, console


class _ClassifierTrainer(Trainer[FinetunePlan]):
    """Trains the whole encoder under a linear head."""

    def __init__(self, plan: FinetunePlan, group: Processes, console: TrainingConsole) -> None:
        super().__init__(plan, group, console)
        self.directory = ClassifierRunDirectory(plan, console)

    def objective(self) -> Classification:
        """See `Trainer`."""
        plan, config = self.plan, self.plan.config
        classifier = build_classifier(config.model, len(plan.class_names))
        if not config.from_scratch:
            tensors = classifier.state_dict() | plan.encoder | (plan.head or {})
            load_strict(classifier, tensors, source=str(config.artifact))
        return Classification(config.optimizer, classifier, len(plan.class_names), plan.class_weights)

    def batches(self, start: int) -> Iterator[Batch]:
        """See `Trainer`."""
        config = self.plan.config
        return labelled_batches(
            self.plan.source,
            config.data,
            self.plan.labels,
            channels=config.model.channels,
            seed=config.run.seed,
            batch=self.plan.slices,
            rand_augment=config.optimizer.rand_augment,
            sampler=self.plan.sampler,
            start=start,
            device=self.group.device,
        )

    def run_directory(self) -> ClassifierRunDirectory:
        """See `Trainer`."""
        return self.directory
