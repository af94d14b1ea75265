"""Fine-tuning from configuration to artifact, and measuring an artifact: the same for both libraries."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from coma.artifact import ArtifactConfig, save_artifact
from coma.config import DyViTConfig, EncoderConfig
from coma.errors import BadInput
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
from downstream.configs.schedule import split_batch
from downstream.openmmlab import runner
from downstream.openmmlab.checkpoint import best_checkpoint, checkpoint_weights


def finetune(
    kind: Kind, config: Any, out: Path, *, device: str, source: Path | None = None, resume: bool = False
) -> Path | None:
    """Train, then make an artifact of the best checkpoint.

    Args:
        kind: What it becomes.
        config: A whole mmengine configuration of that library.
        out: The run directory.
        device: cuda or cpu.
        source: The user's file that the configuration comes from, which errors name.
        resume: Go on from its last checkpoint.

    Returns:
        The artifact; None where the model's backbone is none of ours, so that no artifact describes it.

    Raises:
        BadInput: a configuration of another library, or as `runner.train`.
    """
    check_library(kind, config, source)
    if config.model.get("backbone", {}).get("type") in ("DyViT", "PlainViT"):
        channels = len(config.model.data_preprocessor.get("mean") or (0, 0, 0))
        finetuned_config(kind, config, DyViTConfig(channels=channels))  # to fail before training, not after
    if resume:
        split_batch(config)
    trained = runner.train(config, out, device=device, source=source, resume=resume)
    model = getattr(trained.model, "module", trained.model)
    encoder = getattr(model.backbone, "encoder", None)
    if encoder is None:
        return None
    if is_main():
        _publish(kind, config, out, trained, encoder.config)
    return out / "artifact"


def check_library(kind: Kind, config: Any, source: Path | None) -> None:
    """Refuse what is no configuration of a model, or one of another library.

    Raises:
        BadInput: naming the file.
    """
    path, scope, model = source or "the configuration", config.get("default_scope"), config.get("model")
    if scope != LIBRARIES[kind]:
        said = f"is one of {scope}" if scope else "has no default_scope"
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
    """The dataset's own numbers of its classes, where it has any (COCO)."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    ids = getattr(dataset, "cat_ids", None)
    return None if ids is None else [int(i) for i in ids]


def evaluate(
    artifact: Path, kind: Kind, loader: dict[str, Any], metric: dict[str, Any], folder: Path, device: str
) -> dict[str, float]:
    """Scores of an artifact on labelled images.

    Args:
        artifact: Directory.
        kind: What it must be.
        loader: `dataset` settings without their pipeline, and `labels`, the step that reads labels.
        metric: Settings of the metric.
        folder: Folder for logs.
        device: cuda or cpu.

    Raises:
        BadArtifact: not an artifact of this kind.
    """
    found = read_finetuned(artifact, kind)
    config = test_config(found.config, model_settings(found.config.head or {}), loader, metric)
    return runner.test(config, folder, partial(runner.load_weights, tensors=found.tensors), device=device)


def test_config(
    about: ArtifactConfig, model: dict[str, Any], loader: dict[str, Any], metric: dict[str, Any]
) -> Any:
    """What mmengine needs to measure a model on images prepared as the artifact says.

    Args:
        about: Of a detector or segmentor.
        model: Settings of the model; the artifact's own, or of one in its place.
        loader: As of `evaluate`.
        metric: As of `evaluate`.
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
