"""What `coma classify` prints: the end of a training run, and scores."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from downstream.classify.finetune import FinetuneResult

METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "balanced_accuracy": "balanced accuracy",
    "mean_ap": "mAP",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
}
"""Scores that are printed, by their name in scores.json."""
SHOWN = 40
"""Most classes that are printed."""


def summary(result: FinetuneResult) -> str:
    """Returns what a training run says at its end."""
    scores, out, artifact = result.test, result.config.run.out, shlex.quote(str(result.artifact))
    weights = f"weights of step {scores.step} of {result.steps}"
    if result.config.optimizer.frozen:
        chosen = f"linear head on frozen features; validation: {result.best or 'none'}"
    elif result.best and result.last:
        chosen = (
            f"{weights}: chosen on {result.best.images:,} validation images ({result.best} there, "
            f"{result.last.score:.2%} at the last step)"
        )
    else:
        chosen = f"{weights}: the last step, since there are no validation images"
    files = {"classifier": str(result.artifact)}
    if result.steps:
        files["curves"] = str(out / "loss_curve.png")
        files["metrics"] = f"{out / 'metrics.jsonl'}, or: tensorboard --logdir {out / 'tensorboard'}"
    top5 = "" if scores.top5 is None else f", top-5 {scores.top5:.2%}"
    return "\n".join(
        [
            "",
            f"trained on {result.train_images:,} images of {len(result.config.class_names or ())} classes",
            chosen,
            f"{scores}{top5} on {scores.images:,} test images, used once, at the end",
            "",
            *(f"  {name:15}  {place}" for name, place in files.items()),
            "",
            "next:",
            f"  coma classify test {artifact} --data CLASSES --out REPORT",
            f"  coma classify predict {artifact} IMAGES --out PREDICTIONS",
            f"  coma export {artifact}",
            "      write ONNX files and verify them against PyTorch on real images",
        ]
    )


def print_scores(scores: dict[str, Any]) -> None:
    """Prints the scores of a classifier, and those of each class."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    split = f"{scores['split']} split" if scores["split"] else "all images"
    console.print(f"{split}: {scores['images']:,} images of {scores['data']}", soft_wrap=True, markup=False)
    table = Table("metric", "value")
    for key, name in METRICS.items():
        if scores.get(key) is not None:
            table.add_row(name, f"{scores[key]:.2%}")
    table.add_row("expected calibration error", f"{scores['calibration']['error']:.2%}")
    console.print(table)
    columns = [name for name in scores["classes"][0] if name not in ("name", "support")]
    table = Table("class", *columns, "images")
    for row in scores["classes"][:SHOWN]:
        values = ["-" if row[name] is None else f"{row[name]:.1%}" for name in columns]
        table.add_row(Text(row["name"]), *values, f"{row['support']:,}")
    console.print(table)
    if len(scores["classes"]) > SHOWN:
        print(f"and {len(scores['classes']) - SHOWN} more classes, which scores.json of --out has")
