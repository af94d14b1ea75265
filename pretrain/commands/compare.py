"""Compare methods and backbones under an equal budget: pre-train, evaluate, one table and one picture.

Every method runs on every backbone with every seed, as a `coma pretrain` of its own, and is then measured by
`coma evaluate`. What is done is not done again: after Ctrl-C, a crash or `kill -9` the same command goes on,
and with more methods, models or seeds it adds them. What stands behind `--` goes to every `coma pretrain`.

Examples:
  coma compare PHOTOS --methods mae coma coma-independent --models tiny vit-tiny --seeds 0 1 2
      --budget images 200000 --test CLASSES --out compare -- --image-size 64 --batch-size 64
  coma compare PHOTOS --methods mae coma "beyond --degrade zoom-in" --models "vit-tiny --model.depth 7"
      --budget seconds 3600 --test CLASSES --protocols knn linear finetune --probes 20 --out compare
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from coma.arguments import parse_arguments
from coma.devices import cores
from coma.errors import BadInput, CheckFailed
from coma.preflight import require_folder, require_packages
from coma.ranges import BUDGET, IMAGES, JOBS, SEED, Range, Ranged
from pretrain.commands import evaluate as evaluate_command
from pretrain.commands import pretrain as pretrain_command

if TYPE_CHECKING:
    from pretrain.sweep import Compared, Comparison, Entry

_OURS = {
    *("--out", "--seed", "--steps", "--epochs", "--resume", "--from", "--method", "--model", "--device"),
    *("--probe", "--probe-steps", "--probe-epochs", "--probe-protocols", "--probe-train", "--probe-test"),
    *("--reconstruction-every", "--allow-changed-data", "--no-allow-changed-data"),
}
"""Flags of `coma pretrain` that a comparison sets itself."""
_OURS_TUNING = {
    *("--data", "--train", "--test", "--run", "--out", "--resume", "--seed", "--device", "--workers"),
    *("--protocol", "--from-scratch", "--allow-changed-data", "--no-allow-changed-data"),
}
"""Likewise, of `coma evaluate --protocol finetune`."""


@dataclass(frozen=True)
class CompareConfig(Ranged):
    """Which runs, for how long, and how they are measured."""

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """What to pre-train on, as `coma pretrain` takes it."""
    test: Path
    """Labelled images to measure on: a folder that holds train and test, as `coma evaluate --data` takes."""
    budget: Annotated[tuple[Literal["images", "views", "seconds", "flops"], float], BUDGET]
    """What every run gets, and how much. images: seen in training. views: encoded (two a step of CoMA's
    images, one of MAE's). seconds: of training steps alone, on a GPU by the clock (waiting for images
    included), on a CPU of computing time; a short run of each tells how many steps that makes. flops: of
    forward and backward."""
    methods: tuple[str, ...] = ("coma", "mae")
    """As in `coma pretrain --method`, flags of its own behind the name and another name for the table before
    it: "beyond --degrade zoom-in", "zoom: beyond --degrade zoom-in". They win over those behind --, so
    "mae --base-lr 2e-4" gives one method another rate."""
    models: tuple[str, ...] = ("tiny",)
    """As in `coma pretrain --model`, likewise: "vit-tiny --model.depth 7", "ViT: vit-tiny"."""
    seeds: Annotated[tuple[int, ...], SEED] = (0, 1, 2)
    protocols: tuple[Literal["knn", "linear", "finetune"], ...] = ("knn", "linear")
    """As in `coma evaluate --protocol`."""
    out: Path = Path("compare")
    """Folder for runs, scores, compare.md, compare.csv and compare.png."""
    reference: str | None = None
    """Method that times and accuracies are put in relation to (default: mae, else the first)."""
    probes: Annotated[int, Range(0, 10**6)] = 0
    """Measure every run so many times on its way (knn, linear): curves in the picture, and how many images it
    took each method to do as well as the reference in the end."""
    probe_train: Annotated[int, IMAGES] = 2000
    """Labelled training images of such a probe; 0: all."""
    probe_test: Annotated[int, IMAGES] = 1000
    """Test images of it; 0: all."""
    random_baseline: bool = True
    """Measure random weights, too."""
    finetune: str = ""
    """Flags of `coma evaluate --protocol finetune`, in quotes: "--epochs 20 --batch-size 64"."""
    allow_changed_data: bool = False
    """Go on with a comparison although images were added, removed, renamed or changed in size since it was
    begun; runs that are finished stay as they are."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    jobs: Annotated[int | None, JOBS] = None
    """Runs at a time (default: one on every GPU, one on a CPU)."""
    threads: Annotated[int | None, JOBS] = None
    """Of every run, on a CPU (default: the cores shared out over the jobs)."""


def run(argv: list[str]) -> None:
    """Parse, run, print the table.

    Raises:
        BadInput: settings, images or a directory that cannot be used.
        CheckFailed: runs failed; the others are in the table.
        Interrupted: Ctrl-C or SIGTERM; the same command goes on.
    """
    comparison = parse(argv)
    require_packages("tensorboard", "matplotlib")
    require_folder(comparison.out)

    from pretrain.sweep import compare

    compared = compare(comparison)
    print(_summary(compared))
    if compared.failures:
        raise CheckFailed("not everything ran: " + "; ".join(compared.failures))


def parse(argv: list[str]) -> Comparison:
    """What `argv` asks for.

    Raises:
        BadInput: flags that do not fit, here or of `coma pretrain`.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    own, shared = argv[:cut], argv[cut + 1 :]
    for place, flag in enumerate(own[:-1]):
        if flag == "--finetune":  # what follows looks like a flag, and is a value
            own[place + 1] = f" {own[place + 1]}"
    config = parse_arguments(CompareConfig, own, prog="coma compare", description=__doc__)
    if not (config.methods and config.models and config.seeds and config.protocols):
        raise BadInput("give at least one of each: --methods, --models, --seeds, --protocols")
    _refuse(shared, _OURS, "behind --")

    from coma.data.worker_pool import default_workers
    from pretrain.sweep import Comparison

    device, gpus = _device(config.device)
    jobs = config.jobs or max(len(gpus), 1)
    flags = tuple(_words(config.finetune))
    _refuse(flags, _OURS_TUNING, "in --finetune")
    first = [
        entry(config.images, method, model, shared, config.seeds)
        for model in config.models
        for method in config.methods
    ]
    return Comparison(
        entries=tuple(first),
        unit=config.budget[0],
        amount=config.budget[1],
        test=config.test,
        protocols=tuple(dict.fromkeys(config.protocols)),
        out=config.out,
        reference=config.reference or ("mae" if "mae" in config.methods else first[0].method),
        device=device,
        jobs=jobs,
        threads=config.threads or _threads_before(config.out) or max(1, cores() // jobs),
        gpus=gpus,
        workers=default_workers(jobs) if gpus else 0,
        probes=config.probes,
        probe_limits=(config.probe_train, config.probe_test),
        random_baseline=config.random_baseline,
        finetune_flags=flags,
        allow_changed_data=config.allow_changed_data,
        finetune_epochs=_finetune_epochs(flags) if "finetune" in config.protocols else 1.0,
    )


def entry(images: Path, method: str, model: str, flags: list[str], seeds: tuple[int, ...]) -> Entry:
    """A method on a backbone, as the strings describe them.

    Args:
        images: To train on.
        method: Name of `coma pretrain --method`, perhaps with flags behind it.
        model: Name of `coma pretrain --model`, likewise.
        flags: Of `coma pretrain`, for all alike.
        seeds: To run with.

    Raises:
        BadInput: `coma pretrain` does not take this.
    """
    from pretrain.sweep import Entry

    (method, method_flags), (model, model_flags) = _named(method), _named(model)
    _refuse(method_flags, _OURS, f"in --methods {method!r}")
    _refuse(model_flags, _OURS, f"in --models {model!r}")
    own = ["--method", *method_flags, "--model", *model_flags]
    try:
        config, *_ = pretrain_command.parse([str(images), *flags, *own])  # the last of two counts
    except BadInput as error:
        raise BadInput(f"coma pretrain does not take {shlex.join([*flags, *own])}: {error}") from None
    except SystemExit:
        raise BadInput(f"coma pretrain does not take: {shlex.join([*flags, *own])}") from None
    return Entry(
        method, model, replace(config, run=replace(config.run, reconstruction_every=0)), tuple(seeds)
    )


def _named(text: str) -> tuple[str, list[str]]:
    """`NAME: PRESET FLAGS`, or without a name, to what the table calls it and the arguments."""
    name, colon, rest = text.partition(": ")
    return (name, _words(rest)) if colon else (text, _words(text))


def _words(text: str) -> list[str]:
    """The arguments in a string, as a shell would split it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{text!r}: {str(error).lower()}; close it, or leave the other one out") from None


def _refuse(flags: Sequence[str], ours: set[str], where: str) -> None:
    """Flags that would be overridden, or override what makes runs comparable."""
    for flag in flags:
        if flag.partition("=")[0].replace("_", "-") in ours:
            raise BadInput(f"{flag} {where}: a comparison sets it itself; leave it out")


def _threads_before(out: Path) -> int | None:
    """Of a comparison that is gone on with, perhaps with another number of jobs."""
    try:
        return json.loads((out / "compare.json").read_text())["threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finetune_epochs(flags: tuple[str, ...]) -> float:
    needed = ["artifact", "--data", "data", "--run", "run", "--protocol", "finetune"]
    try:
        return evaluate_command.parse([*needed, *flags]).finetune.epochs
    except BadInput as error:
        raise BadInput(f"--finetune {shlex.join(flags)!r}: {error}") from None
    except SystemExit:
        raise BadInput(f"--finetune: coma evaluate does not take {shlex.join(flags)!r}") from None


def _device(wanted: Literal["auto", "cuda", "cpu"]) -> tuple[Literal["cpu", "cuda"], tuple[str, ...]]:
    """Where to run, and the GPUs that there are."""
    if wanted == "cpu":
        return "cpu", ()
    import torch

    count = torch.cuda.device_count()
    if not count and wanted == "cuda":
        raise BadInput("--device cuda: no GPU here; leave it out to take what there is")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return ("cuda", tuple(names[:count])) if count else ("cpu", ())


def _summary(compared: Compared) -> str:
    out = compared.comparison.out
    return f"""{compared.table.read_text()}
  table    {out / "compare.md"}
  runs     {out / "compare.csv"} (one row each), {out / "runs"}
  picture  {out / "compare.png"}"""
