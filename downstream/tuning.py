"""Fine-tuning from configuration to artifact, and measuring an artifact: the same for both libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from downstream import runs
from downstream.finetuned import LIBRARIES, Kind, load_finetuned, save_finetuned, tuples
from downstream.options import is_main
from pretrain.artifact import ArtifactConfig
from pretrain.config import EncoderConfig
from pretrain.errors import BadInput


def check_new(out: Path) -> None:
    """Refuse a run directory that holds something.

    Raises:
        BadInput: saying how to go on with what is there.
    """
    if not is_main():
        return  # the first process may have begun to write
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        way = f"go on with --resume {out}, or " if (out / runs.CONFIG).is_file() else ""
        raise BadInput(f"--out {out}: is not empty; {way}choose another")


def finetune(kind: Kind, config: Any, out: Path, *, resume: bool = False) -> Path | None:
    """Train, then make an artifact of the best checkpoint.

    Args:
        kind: What it becomes.
        config: A whole mmengine configuration of that library.
        out: The run directory.
        resume: Go on from its last checkpoint.

    Returns:
        The artifact; None where the model's backbone is none of ours, so that no artifact describes it.

    Raises:
        BadInput: a configuration of another library, or as `runs.train`.
    """
    scope = config.get("default_scope")
    if scope != LIBRARIES[kind]:
        raise BadInput(f"the configuration is one of {scope!r}; a {kind} needs one of {LIBRARIES[kind]!r}")
    if is_main() and not resume:
        out.mkdir(parents=True, exist_ok=True)
        config.dump(out / runs.CONFIG)
    runner = runs.train(config, out, resume=resume)
    model = getattr(runner.model, "module", runner.model)
    encoder = getattr(model.backbone, "encoder", None)
    if encoder is None:
        return None
    if is_main():
        _publish(kind, config, out, runner, encoder.config)
    return out / "artifact"


def _publish(kind: Kind, config: Any, out: Path, runner: Any, encoder: EncoderConfig) -> None:
    dataset: Any = runner.train_dataloader.dataset
    best = runs.best_checkpoint(out)
    trained = {
        "steps": runner.max_iters,
        "checkpoint": best.name,
        "scores": {name: round(value, 5) for name, value in runs.latest_scores(runner).items()},
        "pretrained": config.model.backbone.get("artifact", "none: random weights"),
    }
    save_finetuned(
        out / "artifact",
        kind,
        config,
        runs.checkpoint_weights(best),
        encoder,
        tuple(dataset.metainfo["classes"]),
        trained,
        category_ids(dataset),
    )


def category_ids(dataset: Any) -> list[int] | None:
    """The dataset's own numbers of its classes, where it has any (COCO)."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    ids = getattr(dataset, "cat_ids", None)
    return None if ids is None else [int(i) for i in ids]


def measure(
    artifact: Path, kind: Kind, loader: dict[str, Any], metric: dict[str, Any], folder: Path
) -> dict[str, float]:
    """Scores of an artifact on labelled images.

    Args:
        artifact: Directory.
        kind: What it must be.
        loader: `dataset` settings without their pipeline, and `labels`, the step that reads labels.
        metric: Settings of the metric.
        folder: For logs.

    Raises:
        BadArtifact: not an artifact of this kind.
    """
    from mmengine.config import Config

    model, about = load_finetuned(artifact, kind)
    head = about.head or {}
    *before, pack = tuples(head["pipeline"])
    config = Config(
        {
            "default_scope": LIBRARIES[kind],
            "model": head["model"],
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
    return runs.test(config, folder, model.state_dict())


def check_classes(about: ArtifactConfig, names: tuple[str, ...], data: Path) -> None:
    """Refuse to measure on images of other classes.

    Raises:
        BadInput: naming both lists.
    """
    if about.class_names != names:
        raise BadInput(
            f"{data}: has classes {', '.join(names[:5])}{'...' if len(names) > 5 else ''}; the artifact has "
            f"{', '.join((about.class_names or ())[:5])}"
        )
