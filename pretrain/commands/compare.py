"""Compare methods and backbones under an equal budget: pre-train, evaluate, one table and one picture.

Every method runs on every backbone with every seed, as a `coma pretrain` process, and is then evaluated by
`coma evaluate` and, for --protocols finetune and finetune-10, `coma classify train`. After Ctrl-C, a crash or
`kill -9` the same command resumes; with more methods, models or seeds it adds them. Flags behind `--` go to
every `coma pretrain`.

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
from dataclasses import replace
from pathlib import Path
from typing import Literal

from coma.arguments import parse_arguments
from coma.config.compare import CompareConfig, Entry, finetune_config
from coma.devices import cores
from coma.errors import BadInput, CheckFailed
from coma.preflight import require_folder, require_packages
from pretrain.commands import pretrain as pretrain_command

_RESERVED = {
    *("--out", "--seed", "--steps", "--epochs", "--resume", "--from", "--method", "--model", "--device"),
    *("--probe", "--probe-steps", "--probe-epochs", "--probe-protocols", "--probe-train", "--probe-test"),
    *("--reconstruction-every", "--allow-changed-data", "--no-allow-changed-data", "--dry-run"),
}
"""Flags of `coma pretrain` that a comparison sets itself."""
_RESERVED_FINETUNING = {
    *("--data", "--test", "--out", "--resume", "--seed", "--device", "--workers", "--from-scratch"),
    *("--allow-changed-data", "--no-allow-changed-data", "--dry-run", "--label-share"),
}
"""Flags of `coma classify train` that a comparison sets itself."""


def run(argv: list[str]) -> None:
    """Parses the command line, runs the comparison, prints the table.

    Raises:
        BadInput: settings, images or a directory that cannot be used.
        CheckFailed: runs failed; the others are in the table.
        Interrupted: Ctrl-C or SIGTERM; the same command resumes.
    """
    comparison = parse(argv)
    require_packages("tensorboard", "matplotlib")
    require_folder(comparison.out)

    from pretrain.sweep import compare

    result = compare(comparison)
    out = comparison.out
    print(
        f"{result.table.read_text()}\n"
        f"  table    {out / 'compare.md'}\n"
        f"  runs     {out / 'compare.csv'} (one row each), {out / 'runs'}\n"
        f"  picture  {out / 'compare.png'}"
    )
    if result.failures:
        raise CheckFailed("some runs failed: " + "; ".join(result.failures))


def parse(argv: list[str]) -> CompareConfig:
    """Returns the comparison that `argv` asks for, with everything filled in.

    Raises:
        BadInput: flags that do not fit, here or in `coma pretrain` or `coma classify train`.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    own, shared = argv[:cut], argv[cut + 1 :]
    for place, flag in enumerate(own[:-1]):
        if flag in ("--finetune", "--finetune-10"):  # the value that follows looks like a flag
            own[place + 1] = f" {own[place + 1]}"
    config = parse_arguments(CompareConfig, own, prog="coma compare", description=__doc__)
    if not (config.methods and config.models and config.seeds and config.protocols):
        raise BadInput("give at least one of each: --methods, --models, --seeds, --protocols")
    _refuse(shared, _RESERVED, "behind --")
    _refuse(_words(config.finetune), _RESERVED_FINETUNING, "in --finetune")
    _refuse(_words(config.finetune_10), _RESERVED_FINETUNING, "in --finetune-10")
    for protocol in config.finetune_protocols:
        finetune_config(config.finetune_flags_of(protocol))

    from coma.data.worker_pool import default_workers

    if config.lr_search:
        own = [word for text in (*config.methods, *config.models) for word in _named(text)[1]]
        _refuse([*shared, *own], {"--base-lr"}, "beside --lr-search")
    device, gpus = _device(config.device)
    jobs = config.jobs or max(len(gpus), 1)
    workers = config.workers
    if workers is None:
        workers = default_workers(jobs) if gpus else 0
    entries = tuple(
        entry(config.images, method, model, shared, config.seeds)
        for model in config.models
        for method in config.methods
    )
    return replace(
        config,
        entries=entries,
        protocols=tuple(dict.fromkeys(config.protocols)),
        reference=config.reference or ("mae" if "mae" in config.methods else entries[0].method),
        device=device,
        gpus=gpus,
        jobs=jobs,
        threads=config.threads or _threads_before(config.out) or max(1, cores() // jobs),
        workers=workers,
    )


def entry(images: Path, method: str, model: str, flags: list[str], seeds: tuple[int, ...]) -> Entry:
    """Returns a method on a backbone.

    Args:
        images: Images to pre-train on.
        method: Value of `coma pretrain --method`, perhaps followed by flags, and preceded by a name.
        model: Value of `coma pretrain --model`, likewise.
        flags: Flags of `coma pretrain` that all entries share.
        seeds: Seeds of the runs.

    Raises:
        BadInput: `coma pretrain` does not take this.
    """
    (method, method_flags), (model, model_flags) = _named(method), _named(model)
    _refuse(method_flags, _RESERVED, f"in --methods {method!r}")
    _refuse(model_flags, _RESERVED, f"in --models {model!r}")
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
    """Splits `NAME: PRESET FLAGS`, or `PRESET FLAGS`, into the table's name and the arguments."""
    name, colon, rest = text.partition(": ")
    return (name, _words(rest)) if colon else (text, _words(text))


def _words(text: str) -> list[str]:
    """Splits arguments as a shell does."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{text!r}: {str(error).lower()}; close it, or leave the other one out") from None


def _refuse(flags: Sequence[str], reserved: set[str], where: str) -> None:
    """Refuses flags that would be overridden, or would make runs incomparable."""
    for flag in flags:
        if flag.partition("=")[0].replace("_", "-") in reserved:
            raise BadInput(f"{flag} {where}: a comparison sets it itself; leave it out")


def _threads_before(out: Path) -> int | None:
    """Returns the thread count of the resumed comparison, which may now run another number of jobs."""
    try:
        return json.loads((out / "compare.json").read_text())["threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _device(wanted: Literal["auto", "cuda", "cpu"]) -> tuple[Literal["cpu", "cuda"], tuple[str, ...]]:
    """Returns the device to run on, and the GPUs by their names for CUDA_VISIBLE_DEVICES."""
    if wanted == "cpu":
        return "cpu", ()
    import torch

    count = torch.cuda.device_count()
    if not count and wanted == "cuda":
        raise BadInput("--device cuda: this machine has no GPU; leave the flag out to run on the CPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return ("cuda", tuple(names[:count])) if count else ("cpu", ())
