"""A linear head on frozen features: features are computed once, and the head is fitted to the optimum.

The fit is that of `coma evaluate --protocols linear` (`pretrain.evaluate.linear_probe`), except that the
validation images choose its penalty. The standardisation of the features is folded into the head.
"""

from __future__ import annotations

import time
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from coma.amp import choose_precision
from coma.artifact import load_strict, save_artifact
from coma.atomic_io import write_json
from coma.data import Source, Subset
from coma.models.classifiers import Classifier, build_classifier
from coma.progress import Progress
from downstream.classify.plan import FinetunePlan
from downstream.classify.run_directory import classifier_config, named_scores
from downstream.classify.validation import Validation, score, validate
from pretrain.evaluate.features import Features, extract_features, feature_batches
from pretrain.evaluate.linear_probe import LinearClassifier, fit_linear
from pretrain.training.console import TrainingConsole
from pretrain.training.distributed import Processes
from pretrain.training.run_settings import write_config
from pretrain.training.run_summary import Measurement, summary
from pretrain.training.throughput import peak_memory

_MEASURED = 3
"""Batches of a dry run."""


def fit_head(
    plan: FinetunePlan, group: Processes, console: TrainingConsole
) -> tuple[Validation | None, Validation]:
    """Fits a linear head on frozen features, and writes config.json, metrics.jsonl and the artifact.

    Returns:
        Scores on the validation images (None without any) and on the test images.

    Raises:
        BadInput: no image could be read, or no images can choose the penalty.
        CheckFailed: features that are not finite.
        OSError: the results cannot be written.
    """
    config, classes, device = plan.config, len(plan.class_names), group.device
    for line in (*plan.notes, *head_summary(plan, group)):
        console.say(line)
    classifier = _classifier(plan).to(device)
    write_config(config)
    with Progress() as progress:

        def features(source: Source, labels: Tensor, title: str) -> Features:
            return extract_features(
                classifier,
                plan.pretrained,
                source,
                labels=labels,
                image_size=config.data.image_size,
                batch_size=plan.slices.micro_batch,
                workers=config.data.workers,
                progress=progress,
                title=title,
            )

        train = features(plan.source, plan.labels, "features of training images")
        val = features(plan.val, plan.val_labels, "features of validation images") if plan.val else None
    weights = plan.class_weights
    fitted = fit_linear(
        train.values,
        train.labels,
        classes,
        seed=config.run.seed,
        class_weights=None if weights is None else weights.to(train.values.device),
        chosen_on=val and (val.values, val.labels),
    )
    load_strict(classifier, classifier.state_dict() | folded(fitted), source="the fitted head")
    best = None if val is None else score(fitted(val.values).cpu(), val.labels.cpu(), 0)
    test, failures = validate(
        classifier,
        plan.test,
        plan.test_labels,
        *plan.statistics,
        step=0,
        image_size=config.data.image_size,
        batch_size=plan.slices.micro_batch,
        precision=choose_precision("auto", device),
        workers=config.data.workers,
    )
    for failure in failures:
        console.warn(f"left out of the test images: {failure}")
    console.say(f"penalty {fitted.penalty:g}; validation: {best or 'none'}; test: {test}")
    trained = {"method": "linear", "penalty": fitted.penalty, "images_seen": len(train.labels)}
    row = {"step": 0, **named_scores("val", best), **named_scores("test", test)}
    write_json(config.run.out / "metrics.jsonl", row, indent=None)
    save_artifact(
        config.run.out / "artifact",
        tensors=classifier.state_dict(),
        config=classifier_config(plan, trained, best, test),
    )
    return best, test


def head_summary(plan: FinetunePlan, group: Processes) -> list[str]:
    """Returns the lines that say what the run is going to do."""
    return summary(plan, group, choose_precision("auto", group.device))


def measure_head(plan: FinetunePlan, device: torch.device) -> Measurement:
    """Computes the features of the first images to estimate the run's time and memory; writes nothing.

    Raises:
        BadInput: no image could be read.
    """
    size = plan.slices.micro_batch
    some = Subset(plan.source, np.arange(min(_MEASURED * size, len(plan.source))))
    batches = feature_batches(
        _classifier(plan).to(device),
        plan.pretrained,
        some,
        image_size=plan.config.data.image_size,
        batch_size=size,
        workers=plan.config.data.workers,
    )
    seconds, began = [], time.perf_counter()
    with closing(batches):
        for features, _ in batches:
            features.cpu()  # waits for the GPU
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
    if len(seconds) > 1:
        del seconds[0]  # it also starts the workers and warms up the device
    return Measurement(
        steps=len(seconds),
        seconds=sum(seconds) / len(seconds),
        waited=None,
        left=sum(-(-len(source) // size) for source in plan.sources.values()),
        memory=peak_memory(device),
        device=device,
        unit=("batch", "batches"),
        without="the fit of the head",
    )


def _classifier(plan: FinetunePlan) -> Classifier:
    """Returns the encoder under a new head."""
    config = plan.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        classifier = build_classifier(config.model, len(plan.class_names))
    if not config.from_scratch:
        load_strict(classifier, classifier.state_dict() | plan.encoder, source=str(config.artifact))
    return classifier


def folded(fitted: LinearClassifier) -> dict[str, Tensor]:
    """Returns the head of a classifier that computes what `fitted` does of standardised features."""
    weight = fitted.weight / fitted.std[:, None]
    return {
        "head.weight": weight.T.contiguous().cpu(),
        "head.bias": (fitted.bias - fitted.mean @ weight).cpu(),
    }
