"""The caption of a comparison's table: budget, clock, settings, teachers, uncertainty."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from coma.artifact import library_versions
from coma.config.compare import RANDOM_BASELINE, SEARCH_SHARE, CompareConfig, Protocol
from coma.data import open_labelled
from coma.devices import processor
from pretrain.sweep.plan import TRIAL_STEPS, Cost
from pretrain.sweep.results import TITLES, standard_error

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


def probed_on(comparison: CompareConfig) -> tuple[int, int]:
    """Returns the number of labelled training and test images of probes during training."""
    counts = [len(open_labelled(comparison.test, split)) for split in ("train", "test")]
    train, test = (
        min(limit or count, count)
        for limit, count in zip((comparison.probe_train, comparison.probe_test), counts, strict=True)
    )
    return train, test


def caption(comparison: CompareConfig, costs: Mapping[str, Cost], missing: Sequence[str]) -> str:
    """Returns the paragraphs under the table."""
    unit = {
        "images": f"{comparison.amount:,.0f} images seen in training",
        "views": f"{comparison.amount:,.0f} encoded views",
        "seconds": f"{comparison.amount:,g} seconds of training steps ({_clock_words(comparison)})",
        "flops": f"{comparison.amount:.3g} FLOPs, forward and backward, counted on the model's shapes",
    }[comparison.unit]
    size = comparison.entries[0].config.data.image_size
    planned = "to the nearest step"
    if comparison.unit == "seconds":
        planned += f", by a trial run of {TRIAL_STEPS} steps of each; the table shows what the runs took"
    train, test = (len(open_labelled(comparison.test, split)) for split in ("train", "test"))
    about = [
        f"**Budget of every run: {unit}**, {planned}; learning-rate schedules end there.",
        *_search(comparison),
        f"Training time is that of the steps alone ({_clock_words(comparison)}), without start-up, probes, "
        "pictures and saving.",
        f"Images {comparison.images.name}, {size} px; evaluated on {train:,} training and {test:,} test "
        f"images of {comparison.test.name}, where the standard error of counting is up to "
        f"{standard_error(50, test):.1f} points. Accuracies are means ± sample standard deviation over n "
        "seeds; n = 1 is a single run, which says nothing about differences as small as those between seeds.",
        "Batch size, optimizer, learning rate and crops: " + "; ".join(_settings(comparison)) + ".",
    ]
    counts = dict.fromkeys(f"{entry.method}: {costs[entry.name].views}" for entry in comparison.entries)
    about.append(f"Views that the trained encoder sees of an image in a step: {', '.join(counts)}.")
    about += [*_zooms(comparison), *_teachers(comparison)]
    if comparison.finetune_protocols:
        about.append(
            "Fine-tuned accuracy is that on the test images, used once, of the checkpoint that did best on "
            "validation images: a val split, or else a part of the training images (--hold-out). Flags: "
            + "; ".join(
                f"{TITLES[each]}: {_flags(comparison, each)}" for each in comparison.finetune_protocols
            )
            + "."
        )
    if "finetune-10" in comparison.protocols:
        about.append("The 10 % of the labels are drawn class by class with the seed of the run.")
    if comparison.random_baseline:
        about.append(f"`{RANDOM_BASELINE}` is the same backbone before training.")
    if comparison.probes:
        on = probed_on(comparison)
        about.append(
            f"The last columns: images and time until a probe matched {comparison.reference}'s last one (in "
            f"its own row: until it first did), by {comparison.probes} probes on {on[0]:,} training and "
            f"{on[1]:,} test images, which cannot be compared with the accuracies beside them. They are "
            "upper bounds (≤), since probes are far apart, and tend to be early, since one of several probes "
            "is above the target by chance. A run that is probed has not finished its learning-rate "
            "schedule: a run planned for so few images might do better."
        )
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    about.append(f"{_machine(comparison)}; {versions}.")
    about += [f"**Missing:** {line}" for line in missing]
    return "\n\n".join(about)


def _flags(comparison: CompareConfig, protocol: Protocol) -> str:
    flags = comparison.finetune_flags_of(protocol)
    return f"`{shlex.join(flags)}`" if flags else "none"


def _search(comparison: CompareConfig) -> list[str]:
    """Returns how learning rates were chosen, what that cost, and where the best one may lie outside."""
    rates = comparison.lr_search
    if not rates:
        return []
    tried = ", ".join(f"{rate:g}" for rate in rates)
    text = (
        f"Learning rates: of {tried} per 256 images (--lr-search) each method on each backbone took the one "
        f"whose training loss ended lowest in a trial with the first seed and {SEARCH_SHARE:.0%} of the "
        f"budget. The trials count: runs had the other {comparison.run_amount / comparison.amount:.0%}."
    )
    ends = [
        f"{entry.method} on {entry.model}"
        for entry in comparison.entries
        if entry.config.optimizer.base_lr in (min(rates), max(rates))
    ]
    if ends:
        text += f" It is the least or the largest of them, so others may be better, for {', '.join(ends)}."
    return [text]


def _settings(comparison: CompareConfig) -> list[str]:
    """Returns the settings that methods and backbones share, and which ones differ."""
    found: dict[str, list[str]] = {}
    for entry in comparison.entries:
        optimizer, (low, high) = entry.config.optimizer, entry.config.data.crop_scale
        how = f"{optimizer.batch_size}, {_OPTIMIZERS[optimizer.optimizer]}, {optimizer.lr:.3g}"
        text = f"{how}, {low:g} to {high:g} of the area"
        found.setdefault(text, []).append(f"{entry.method} on {entry.model}")
    if len(found) == 1:
        return [f"{next(iter(found))} (all)"]
    return [f"{text} ({', '.join(who)})" for text, who in found.items()]


def _zooms(comparison: CompareConfig) -> list[str]:
    """Returns the share of a crop that the encoder sees, for methods that take larger crops."""
    seen = {
        f"{prod(size) / prod(entry.config.view_size):.0%} ({entry.method}, {entry.model})"
        for entry in comparison.entries
        if (size := entry.config.data.image_size) != entry.config.view_size
    }
    if not seen:
        return []
    return [
        f"Methods that zoom in show the encoder the centre of a crop: {', '.join(sorted(seen))} of its area."
    ]


def _teachers(comparison: CompareConfig) -> list[str]:
    """Returns the teacher of every taught method."""
    names = {
        entry.method: teacher.name
        for entry in comparison.entries
        if (teacher := entry.config.objective.teacher) is not None
    }
    if not names:
        return []
    taught = ", ".join(f"{method} by {Path(name).name}" for method, name in names.items())
    return [f"Taught: {taught}. No column includes the training of the teacher."]


def clock_name(comparison: CompareConfig) -> str:
    """Returns the device whose seconds are counted."""
    return "CPU" if comparison.device == "cpu" else "GPU"


def _clock_words(comparison: CompareConfig) -> str:
    if comparison.device == "cpu":
        return f"CPU clock: computing time of {comparison.threads or 1} thread(s), added up"
    return "GPU clock: wall-clock time of the steps, including the wait for images"


def _machine(comparison: CompareConfig) -> str:
    import torch

    if comparison.device == "cuda" and torch.cuda.is_available():
        gpus = len(comparison.gpus)
        return f"{torch.cuda.get_device_name()}, {comparison.jobs or 1} run(s) at a time on {gpus} GPU(s)"
    return f"{processor()}, {comparison.jobs or 1} run(s) at a time"
