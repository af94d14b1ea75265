"""A linear head on frozen features: features are computed once, and the head is fitted to the optimum.

The fit is that of `coma evaluate --protocols linear` (`pretrain.evaluate.linear_probe`), except that the
validation images choose its penalty. The standardisation of the features is folded into the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coma.amp import choose_precision
from coma.artifact import load_strict, save_artifact
from coma.atomic_io import write_json
from coma.data import Source
from coma.models.classifiers import build_classifier
from coma.progress import Progress
from downstream.classify.plan import FinetunePlan
from downstream.classify.run_directory import classifier_config, named_scores
from downstream.classify.validation import Validation, score, validate
from pretrain.evaluate.features import Features, extract_features
from pretrain.evaluate.linear_probe import LinearClassifier, fit_linear
from pretrain.training.console import TrainingConsole
from pretrain.training.run_plan import write_config


def fit_head(
    plan: FinetunePlan, device: torch.device, console: TrainingConsole
) -> tuple[Validation | None, Validation]:
    """Fits a linear head on frozen features, and writes config.json, metrics.jsonl and the artifact.

    Returns:
        Scores on the validation images (None without any) and on the test images.

    Raises:
        BadInput: no image could be read, or no images can choose the penalty.
        CheckFailed: features that are not finite.
        OSError: the results cannot be written.
    """
    config, classes = plan.config, len(plan.class_names)
    for note in plan.notes:
        console.say(note)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        classifier = build_classifier(config.model, classes)
    if not config.from_scratch:
        load_strict(classifier, classifier.state_dict() | plan.encoder, source=str(config.artifact))
    classifier.to(device)
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
    weights = plan.class_weights()
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


def folded(fitted: LinearClassifier) -> dict[str, Tensor]:
    """Returns the head of a classifier that computes what `fitted` does of standardised features."""
    weight = fitted.weight / fitted.std[:, None]
    return {
        "head.weight": weight.T.contiguous().cpu(),
        "head.bias": (fitted.bias - fitted.mean @ weight).cpu(),
    }
