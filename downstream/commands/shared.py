"""What `coma detect` and `coma segment` have in common: their three actions, and what they print."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coma.atomic_io import lies_among
from coma.errors import BadInput
from coma.preflight import require_folder, require_packages
from downstream.cli_options import is_main

if TYPE_CHECKING:
    import torch

    from downstream.artifacts import Kind
    from downstream.configs.adapt import Described

log = logging.getLogger(__name__)
COMMANDS = {"detector": "detect", "segmentor": "segment"}
Device = Literal["auto", "cuda", "cpu"]


def choose_action(
    argv: Sequence[str],
    actions: dict[str, Callable[[list[str]], None]],
    usage: str,
    package: str | None = None,
) -> None:
    """Runs the action that the first argument names.

    Args:
        argv: Arguments of the command.
        actions: Functions by name.
        usage: Help text without an action.
        package: OpenMMLab's package that the actions need, but not their --help; None: they need none.

    Raises:
        BadInput: it names none.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage.strip())
        if argv:
            return
        raise BadInput(f"give one of {', '.join(actions)}")
    if argv[0] not in actions:
        raise BadInput(f"no action {argv[0]!r}; there are: {', '.join(actions)}")
    if package is None:
        actions[argv[0]](list(argv[1:]))
        return
    if os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None):
        warn(
            ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored: nothing but tensors and numbers is unpickled here"]
        )
    if not is_main():
        logging.getLogger("downstream").setLevel(logging.WARNING)
    if not {"-h", "--help"} & set(argv):
        require_packages("mmengine", "mmcv", package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mm's packages warn of each other and of torch, for pages
        actions[argv[0]](list(argv[1:]))


def required(value: Path | None, flag: str, why: str) -> Path:
    """The same path.

    Raises:
        BadInput: it was not given.
    """
    if value is None:
        raise BadInput(f"give {flag}: {why}")
    return value


def train(
    kind: Kind,
    given: Any,
    own: Callable[[Any, Described], Any],
    fit_data: Callable[[Any, Any], None],
    others: Mapping[str, object],
) -> None:
    """Train what our settings, a configuration of the user's own, or the run to be resumed say.

    Args:
        kind: What it becomes.
        given: The command's `TrainConfig`.
        own: Our configuration, from what was given and the encoder.
        fit_data: Puts the dataset that was given into a configuration.
        others: The command's own options by name, which only ours take; None where they were not given.

    Raises:
        BadInput: settings that do not go together.
    """
    from downstream.cli_options import check_foreign
    from downstream.configs.adapt import describe, fit_encoder
    from downstream.configs.load import blaming, change, load_config
    from downstream.finetune import check_library, finetune
    from downstream.openmmlab.runner import CONFIG, settle

    command, source = COMMANDS[kind], given.source
    if given.resume:
        path = given.resume / CONFIG
        if not path.is_file():
            raise BadInput(f"--resume {given.resume}: holds no {CONFIG}; give a run of coma {command} train")
        config = load_config(path)
        say_trained(command, given.resume, finetune(kind, config, given.resume, source=path, resume=True))
        return
    out = required(given.out, "--out", f"a new run directory, for example runs/{kind}")
    if is_main():  # it may have begun to write when others look
        check_empty(out, f"go on with --resume {out}, or " if (out / CONFIG).is_file() else "")
        if note := lies_among(out, getattr(given, "data", None)):
            warn([note])
    encoder = None
    if source.artifact or source.preset or not source.config:
        encoder = describe(source.artifact, source.preset)
    if encoder and not source.config:
        config = own(given, encoder)
        change(config, source.cfg_options)
    else:
        check_foreign(source, given.training, others)
        config = load_config(source.config)
        check_library(kind, config, source.config)
        with blaming(source.config, "cannot be fitted"):
            if encoder:
                with noting(config, source.config, f"to fit {source.artifact or source.preset}"):
                    fit_encoder(config, encoder, given.training)
            if given.data:
                with noting(config, source.config, f"to read {given.data}"):
                    fit_data(config, given)
            change(config, source.cfg_options)
            with noting(config, source.config, "for this machine and --out", "--resume goes on with a run"):
                config.resume = False
                settle(config, out)
    try:
        trained = finetune(kind, config, out, source=source.config)
    except BadInput as error:
        if given.data or not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise BadInput(f"{error}; if that is of the dataset, name yours with --data") from error
    say_trained(command, out, trained)


@contextmanager
def noting(
    config: Any, path: Path, why: str, way: str = "--cfg-options NAME=VALUE changes it back"
) -> Iterator[None]:
    """Says in one line which settings of the user's configuration are other ones at the end, and why."""
    from downstream.configs.load import differences

    before = config.to_dict()
    yield
    changed = differences(before, config.to_dict())
    if changed:
        log.info("%s: changed %s: %s; %s", path, why, ", ".join(changed), way)


def warn(warnings: Sequence[str]) -> None:
    """A line for each, on stderr."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, quiet=not is_main())
    for warning in warnings:
        console.print(f"[bold yellow]warning:[/] {warning}", soft_wrap=True)


@contextmanager
def checking(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for reading a dataset through; gives what is told how far it is."""
    from coma.progress import Progress

    with Progress() as progress:
        bar = progress.bar(title)
        yield lambda done, total: bar.update(done, total=total)
        bar.remove()


def device_of(name: Device) -> torch.device:
    """The device asked for; `auto` is a GPU of CUDA's, or the CPU: mm's operators know no other.

    Raises:
        BadInput: there is no GPU.
    """
    import torch

    from coma.devices import pick_device

    return pick_device("cpu" if name == "auto" and not torch.cuda.is_available() else name)


def check_empty(out: Path, way: str = "") -> None:
    """Refuse a folder that holds something or cannot be written to; `way` says what else could be done.

    Raises:
        BadInput: it does.
    """
    require_folder(out)
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: is not empty; {way}choose another")


def new_folder(out: Path) -> Path:
    """The same folder, made.

    Raises:
        BadInput: it holds something.
    """
    check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def say_trained(command: str, out: Path, artifact: Path | None) -> None:
    """Where everything is, and what can be done with it."""
    import json

    from downstream.openmmlab.runner import is_headline

    if not is_main():
        return
    if artifact is None:
        print(f"\n{out}: trained; its backbone is none of ours, so there are checkpoints but no artifact")
        return
    about = json.loads((artifact / "config.json").read_text())
    scores, last = (
        "  ".join(f"{k} {v:.4g}" for k, v in about["trained"][which].items() if is_headline(k))
        or "nothing found"
        for which in ("scores", "last_scores")
    )
    print(
        f"\n{about['trained']['steps']} steps; val split, at the last step: {last}\n"
        f"kept: {about['trained']['checkpoint']}, chosen by the val split: {scores}\n\n"
        f"  artifact     {artifact}\n"
        f"  curves       tensorboard --logdir {out}\n\n"
        f"next:\n"
        f"  coma {command} predict {artifact} IMAGES --out PREDICTIONS\n"
        f"  coma {command} test {artifact} --data DATASET"
    )


def say_scores(scores: dict[str, float], out: Path | None, split: str, where: Path) -> None:
    """A table of scores on a split, and a file of them where one was asked for."""
    import json

    from rich.console import Console
    from rich.table import Table

    chosen = "; training chooses the checkpoint by this split, --split test counts on others"
    print(f"{split} split: {where}{chosen if split == 'val' else ''}")
    table = Table("metric", "value")
    for name, value in scores.items():
        if not name.endswith("time"):
            table.add_row(name, f"{value:.4g}")
    Console().print(table)
    if out:
        out.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


@contextmanager
def predicting(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over images; gives what is told how many are done."""
    from coma.progress import Progress

    with Progress() as progress:
        yield progress.bar("predicting", total).update
