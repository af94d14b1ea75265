"""What a comparison's numbers are of, in sentences: budget, clock, settings, teachers, uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from coma.artifact import library_versions
from coma.data import open_source
from coma.devices import processor
from pretrain.sweep.plan import RANDOM_BASELINE, TRIAL_STEPS, Comparison, Cost
from pretrain.sweep.results import standard_error, tuned_by_earlier_version


def probed_on(comparison: Comparison) -> tuple[int, int]:
    """How many labelled images probes on the way train and test on."""
    counts = [len(open_source(comparison.test, split)) for split in ("train", "test")]
    train, test = (
        min(limit or count, count) for limit, count in zip(comparison.probe_limits, counts, strict=True)
    )
    return train, test


def caption(comparison: Comparison, costs: Mapping[str, Cost], missing: Sequence[str]) -> str:
    """What the numbers are of, in sentences."""
    unit = {
        "images": f"{comparison.amount:,.0f} images seen in training",
        "views": f"{comparison.amount:,.0f} encoded views",
        "seconds": f"{comparison.amount:,g} seconds of training steps ({_clock_words(comparison)})",
        "flops": f"{comparison.amount:.3g} FLOPs, forward and backward, counted on the model's shapes",
    }[comparison.unit]
    data = comparison.entries[0].config.data
    where = data.images.name if data.images else ""
    planned = "to the nearest step"
    if comparison.unit == "seconds":
        planned += f", as {TRIAL_STEPS} steps of each took before; what the runs really took is in the table"
    train, test = (len(open_source(comparison.test, split)) for split in ("train", "test"))
    about = [
        f"**Budget of every run: {unit}**, {planned}; learning-rate schedules end there.",
        f"Training time is that of the steps alone ({_clock_words(comparison)}); start-up, probes, pictures "
        "and saving are left out.",
        f"Images {where}, {data.image_size} px; measured on {train:,} training and {test:,} test images of "
        f"{comparison.test.name}, where counting alone has a standard error of up to "
        f"{standard_error(50, test):.1f} points. Accuracies are means ± sample deviation over n seeds; n = 1 "
        "is a single run, which says nothing about differences of the size that seeds make.",
        "Batch, learning rate and crops: " + "; ".join(_settings(comparison)) + ".",
    ]
    counts = dict.fromkeys(f"{entry.method}: {costs[entry.name].views}" for entry in comparison.entries)
    about.append(f"Views that the trained encoder sees of an image in a step: {', '.join(counts)}.")
    about += [*_zooms(comparison), *_teachers(comparison)]
    if "finetune" in comparison.protocols:
        about.append(
            "Fine-tuned accuracy is that on the test images, used once, of the checkpoint that did best on "
            "validation images: a val split, or else a part of the training images (--hold-out)."
        )
        earlier = tuned_by_earlier_version(comparison)
        if earlier:
            about.append(
                f"{earlier} of the fine-tuned accuracies are by an earlier version: of the last step, "
                "with no training images held out."
            )
    if comparison.random_baseline:
        about.append(f"`{RANDOM_BASELINE}` is the same backbone before training.")
    if comparison.probes:
        on = probed_on(comparison)
        about.append(
            "The last columns: what it took a method to be as good on the way as "
            f"{comparison.reference} was in the end (in its own row: when it first was), by "
            f"{comparison.probes} probes on {on[0]:,} training and {on[1]:,} test images, which are not to "
            "be compared with the accuracies beside them. Probes are far apart (≤), and the best of several "
            "is early by chance. A run that is probed on the way has not ended its learning-rate schedule: "
            "one that was planned for so few images might do better."
        )
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    about.append(f"{_machine(comparison)}; {versions}.")
    about += [f"**Missing:** {line}" for line in missing]
    return "\n\n".join(about)


def _settings(comparison: Comparison) -> list[str]:
    """What methods and backbones share, and who has others."""
    found: dict[str, list[str]] = {}
    for entry in comparison.entries:
        optimizer, (low, high) = entry.config.optimizer, entry.config.data.crop_scale
        text = f"{optimizer.batch_size}, {optimizer.lr:.3g}, {low:g} to {high:g} of the area"
        found.setdefault(text, []).append(f"{entry.method} on {entry.model}")
    if len(found) == 1:
        return [f"{next(iter(found))} (all)"]
    return [f"{text} ({', '.join(who)})" for text, who in found.items()]


def _zooms(comparison: Comparison) -> list[str]:
    """How much of a crop the encoder sees where the method takes larger ones."""
    seen = {
        f"{(entry.config.data.image_size / entry.config.view_size) ** 2:.0%} ({entry.method}, {entry.model})"
        for entry in comparison.entries
        if entry.config.view_size > entry.config.data.image_size
    }
    if not seen:
        return []
    return [
        f"Methods that zoom in show the encoder the centre of a crop: {', '.join(sorted(seen))} of its area."
    ]


def _teachers(comparison: Comparison) -> list[str]:
    """Who was taught by what."""
    names = {
        entry.method: teacher.name
        for entry in comparison.entries
        if (teacher := entry.config.objective.teacher) is not None
    }
    if not names:
        return []
    taught = ", ".join(f"{method} by {Path(name).name}" for method, name in names.items())
    return [f"Taught: {taught}. What training the teacher took is in no column."]


def clock(comparison: Comparison) -> str:
    """Whose seconds are counted."""
    return "CPU" if comparison.device == "cpu" else "GPU"


def _clock_words(comparison: Comparison) -> str:
    if comparison.device == "cpu":
        return f"CPU clock: computing time of {comparison.threads} thread(s), added up"
    return "GPU clock: wall-clock time of the steps, waiting for images included"


def _machine(comparison: Comparison) -> str:
    import torch

    if comparison.device == "cuda" and torch.cuda.is_available():
        gpus = len(comparison.gpus)
        return f"{torch.cuda.get_device_name()}, {comparison.jobs} run(s) at a time on {gpus} GPU(s)"
    return f"{processor()}, {comparison.jobs} run(s) at a time"
