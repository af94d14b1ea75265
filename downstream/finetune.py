"""Fine-tunes a configuration to an artifact and evaluates artifacts, for detectors and segmentors."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from coma.artifact import ArtifactConfig, load_strict, save_artifact
from coma.config import DyViTConfig, EncoderConfig
from coma.errors import BadInput
from coma.locks import lock_run
from downstream.artifacts import (
    LIBRARIES,
    Kind,
    finetuned_config,
    lists_to_tuples,
    model_settings,
    read_finetuned,
    register_modules,
)
from downstream.cli_options import is_main
from downstream.configs.load import OURS
from downstream.configs.schedule import split_batch
from downstream.openmmlab import runner
from downstream.openmmlab.checkpoint import best_checkpoint, checkpoint_weights


def finetune(
    kind: Kind, config: Any, out: Path, *, device: str, source: Path | None = None, resume: bool = False
) -> Path | None:
    """Trains a model and saves its best checkpoint as an artifact.

    Args:
        kind: Kind of the artifact.
        config: Complete mmengine configuration of the kind's library.
        out: The run directory.
        device: cuda or cpu.
        source: File of the configuration, for error messages.
        resume: Resume from the last checkpoint.

    Returns:
        The artifact; None if the backbone is not one of ours.

    Raises:
        BadInput: a configuration of another library, one that cannot be trained, or another process that
            trains in the directory.
    """
    check_library(kind, config, source)
    if config.model.get("backbone", {}).get("type") in OURS:
        channels = len(config.model.data_preprocessor.get("mean") or (0, 0, 0))
        finetuned_config(kind, config, DyViTConfig(channels=channels))  # to fail before training, not after
    if resume:
        split_batch(config)
    with lock_run(out) if is_main() else nullcontext():
        trained = runner.train(config, out, device=device, source=source, resume=resume)
        model = getattr(trained.model, "module", trained.model)
        encoder = getattr(model.backbone, "encoder", None)
        if encoder is None:
            return None
        if is_main():
            _publish(kind, config, out, trained, encoder.config)
    return out / "artifact"


def check_library(kind: Kind, config: Any, source: Path | None) -> None:
    """Checks that a configuration holds a model of the kind's library.

    Raises:
        BadInput: naming the file.
    """
    path, scope, model = source or "the configuration", config.get("default_scope"), config.get("model")
    if scope != LIBRARIES[kind]:
        said = f"its default_scope is {scope}" if scope else "has no default_scope"
        raise BadInput(f"{path}: {said}; a {kind} needs a configuration of {LIBRARIES[kind]}")
    if not isinstance(model, dict) or not isinstance(model.get("backbone"), dict):
        raise BadInput(f"{path}: has no model with a backbone")


def _publish(kind: Kind, config: Any, out: Path, trainer: Any, encoder: EncoderConfig) -> None:
    dataset: Any = trainer.train_dataloader.dataset
    best = best_checkpoint(out)
    scores = runner.scores_by_step(trainer)
    kept = re.search(r"_(\d+)\.pth$", best.name)
    trained = {
        "steps": trainer.max_iters,
        "checkpoint": best.name,
        "scores": scores.get(kept[1] if kept else "", {}),
        "last_scores": scores[max(scores, key=int)] if scores else {},
        "pretrained": config.model.backbone.get("artifact", "none: random weights"),
    }
    names = tuple(dataset.metainfo["classes"])
    about = finetuned_config(kind, config, encoder, names, trained, category_ids(dataset))
    save_artifact(out / "artifact", tensors=checkpoint_weights(best), config=about)


def category_ids(dataset: Any) -> list[int] | None:
    """Returns the category ids of a COCO dataset; None for other datasets."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    ids = getattr(dataset, "cat_ids", None)
    return None if ids is None else [int(i) for i in ids]


def evaluate(
    artifact: Path, kind: Kind, loader: dict[str, Any], metric: dict[str, Any], folder: Path, device: str
) -> dict[str, float]:
    """Measures an artifact on labelled images and returns its scores.

    Args:
        artifact: Directory of the artifact.
        kind: Kind of the artifact.
        loader: `dataset`, settings without a pipeline, and `labels`, the pipeline step that loads labels.
        metric: Settings of the metric.
        folder: Folder for logs.
        device: cuda or cpu.

    Raises:
        BadArtifact: an artifact of another kind.
    """
    found = read_finetuned(artifact, kind)
    config = test_config(found.config, model_settings(found.config.head or {}), loader, metric)
    prepare = partial(load_strict, tensors=found.tensors, source=str(artifact))
    return runner.test(config, folder, prepare, device=device)


def test_config(
    about: ArtifactConfig, model: dict[str, Any], loader: dict[str, Any], metric: dict[str, Any]
) -> Any:
    """Returns the mmengine configuration that measures a model with the preprocessing of an artifact.

    Args:
        about: Configuration of the artifact.
        model: Settings of the model: the artifact's own, or a replacement.
        loader: As for `evaluate`.
        metric: As for `evaluate`.
    """
    from mmengine.config import Config

    register_modules(about)
    head = about.head or {}
    *before, pack = lists_to_tuples(head["pipeline"])
    return Config(
        {
            "default_scope": head["library"],
            "model": model,
            "test_dataloader": {
                "batch_size": 1,
                "num_workers": 0,
                "sampler": {"type": "DefaultSampler", "shuffle": False},
                "dataset": {**loader["dataset"], "pipeline": [*before, loader["labels"], pack]},
            },
            "test_evaluator": metric,
            "test_cfg": {"type": "TestLoop"},
        }
    )
