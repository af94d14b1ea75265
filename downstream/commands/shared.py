"""What `coma detect` and `coma segment` have in common: their three actions, and what they print."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from downstream.options import is_main
from pretrain.errors import BadInput

if TYPE_CHECKING:
    import torch

    from downstream.finetuned import Kind

Device = Literal["auto", "cuda", "cpu"]


def choose_action(argv: Sequence[str], actions: dict[str, Callable[[list[str]], None]], usage: str) -> None:
    """Run the action that the first argument names.

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
    if not is_main():
        logging.getLogger("downstream").setLevel(logging.WARNING)
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


def resume(kind: Kind, folder: Path) -> Path | None:
    """Go on with the run in `folder`.

    Raises:
        BadInput: there is none.
    """
    from downstream.runs import CONFIG
    from downstream.settings import load_config
    from downstream.tuning import finetune

    if not (folder / CONFIG).is_file():
        raise BadInput(
            f"--resume {folder}: holds no {CONFIG}; give a run directory of coma detect or segment"
        )
    return finetune(kind, load_config(folder / CONFIG), folder, resume=True)


def warn(warnings: Sequence[str]) -> None:
    """A line for each, on stderr."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, quiet=not is_main())
    for warning in warnings:
        console.print(f"[bold yellow]warning:[/] {warning}", soft_wrap=True)


@contextmanager
def checking(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for reading a dataset through; gives what is told how far it is."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def device_of(name: Device) -> torch.device:
    """The device asked for.

    Raises:
        BadInput: there is no GPU.
    """
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise BadInput("--device cuda: not available here; leave it out to take what there is")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def new_folder(out: Path) -> Path:
    """The same folder, made.

    Raises:
        BadInput: it holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out {out}: is not empty; choose another")
    out.mkdir(parents=True, exist_ok=True)
    return out


def say_trained(command: str, out: Path, artifact: Path | None) -> None:
    """Where everything is, and what can be done with it."""
    import json

    if not is_main():
        return
    if artifact is None:
        print(f"\n{out}: trained; its backbone is none of ours, so there are checkpoints but no artifact")
        return
    about = json.loads((artifact / "config.json").read_text())
    scores, last = (
        "  ".join(f"{k} {v:.4g}" for k, v in about["trained"][which].items() if _shown(k)) or "nothing found"
        for which in ("scores", "last_scores")
    )
    print(
        f"\n{about['trained']['steps']} steps; last validation: {last}\n"
        f"kept: {about['trained']['checkpoint']}, {scores}\n\n"
        f"  artifact     {artifact}\n"
        f"  curves       tensorboard --logdir {out}\n\n"
        f"next:\n"
        f"  coma {command} predict {artifact} IMAGES --out PREDICTIONS\n"
        f"  coma {command} test {artifact} --data DATASET"
    )


def _shown(name: str) -> bool:
    return name.rpartition("/")[2] in ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50", "mIoU", "aAcc")


def say_scores(scores: dict[str, float], out: Path | None) -> None:
    """A table of scores, and a file of them where one was asked for."""
    import json

    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    for name, value in scores.items():
        if not name.endswith("time"):
            table.add_row(name, f"{value:.4g}")
    Console().print(table)
    if out:
        out.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def predicting(total: int) -> Any:
    """A bar over images; enter it, then call `advance(count, found)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(True))
    progress = Progress(*columns, console=Console(stderr=True))
    progress.add_task("predicting", total=total)
    return progress
