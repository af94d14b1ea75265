"""The verbs test, predict and check of `coma detect` and `coma segment`, and what all verbs share."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coma.atomic_io import write_json
from coma.errors import BadInput, Interrupted
from coma.messages import parse_names
from coma.preflight import require_folder, require_packages
from downstream.cli_options import (
    CheckOptions,
    PredictOptions,
    TestOptions,
    is_main,
)

if TYPE_CHECKING:
    import torch

    from coma.artifact import ArtifactConfig
    from downstream.artifacts import Kind
    from downstream.label_check import ClassRow

log = logging.getLogger(__name__)
COMMANDS = {"detector": "detect", "segmentor": "segment"}


def run_verb(
    argv: Sequence[str], verbs: dict[str, Callable[[list[str]], None]], usage: str, package: str | None = None
) -> None:
    """Runs the verb that the first argument names; its --help needs no package.

    Raises:
        BadInput: the first argument names no verb.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage.strip())
        if argv:
            return
        raise BadInput(f"give one of {', '.join(verbs)}")
    if argv[0] not in verbs:
        raise BadInput(f"no verb {argv[0]!r}; choose one of {', '.join(verbs)}")
    if package is None:
        verbs[argv[0]](list(argv[1:]))
        return
    if os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None):
        warn(
            ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored: checkpoints are loaded without unpickling objects"]
        )
    if not is_main():
        logging.getLogger("downstream").setLevel(logging.WARNING)
    if argv[0] != "check" and not {"-h", "--help"} & set(argv):
        require_packages("mmengine", "mmcv", package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OpenMMLab's packages warn about each other and about torch
        verbs[argv[0]](list(argv[1:]))


def require_option(value: Path | None, flag: str, what: str) -> Path:
    """Returns the path.

    Raises:
        BadInput: the flag was not given.
    """
    if value is None:
        raise BadInput(f"give {flag}: {what}")
    return value


def given_flags(argv: Sequence[str], names: Collection[str]) -> str:
    """Returns the flags of the settings `names` that are in `argv`, for a message."""
    return ", ".join("--" + name.replace("_", "-") for name in given_options(argv, names))


def given_options(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Returns those of the settings `names` whose flags are in `argv`."""
    given = {
        word[2:].partition("=")[0].removeprefix("no-").replace("-", "_") for word in argv if word[:2] == "--"
    }
    return [name for name in names if name in given]


def test(kind: Kind, options: TestOptions, open_split: Callable[..., Any], test_settings: Any) -> None:
    """Measures an artifact on a split of a dataset, prints the scores and writes them to --out.

    Args:
        kind: Kind of the artifact.
        options: Options of the command.
        open_split: Opens and checks the split, given a callback for progress.
        test_settings: `test_settings` of the task.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from downstream.artifacts import read_finetuned
    from downstream.finetune import evaluate
    from downstream.openmmlab.runner import scratch_folder

    if options.out:
        require_folder(options.out)
    device, about = device_of(options.device).type, read_finetuned(options.artifact, kind).config
    with progress_bar(f"checking {options.split}") as progress:
        split = open_split(progress)
    loader, metric = test_settings(about, split)
    with scratch_folder() as folder:
        scores = evaluate(options.artifact, kind, loader, metric, folder, device)
    hint = "; training chose the checkpoint by this split, so --split test is the fairer measure"
    print(f"{options.split} split: {options.data}{hint if options.split == 'val' else ''}")
    table = Table("metric", "value")
    for name, value in scores.items():
        if not name.endswith("time"):
            table.add_row(Text(name), f"{value:.4g}")
    Console().print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "scores.json", scores)


def predict(
    kind: Kind, options: PredictOptions, threshold: float, annotations: Path | None
) -> tuple[int, int]:
    """Predicts on images and videos and writes the predictions to --out.

    Args:
        kind: Kind of the artifact.
        options: Options of the command.
        threshold: Least score or probability.
        annotations: COCO file that holds the ids of the images; None counts images from 1.

    Returns:
        The numbers of images and frames, and of objects.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; what was done is written.
    """
    from coma.progress import Progress
    from coma.signals import StopRequest
    from downstream.frames import count_frames, list_images
    from downstream.predict import Choice, assign_image_ids, predict, write_predictions
    from downstream.prediction_files import FORMATS, read_image_ids

    device = device_of(options.device)
    check_empty(options.out)
    formats = parse_names(options.format, FORMATS, "--format")
    paths = list_images(options.images)
    ids = assign_image_ids(paths, read_image_ids(annotations) if annotations else None)
    model, about = _model(kind, options)
    names = about.class_names or ()
    wanted = parse_names(options.classes, names, "--classes") if options.classes else None
    classes = frozenset(names.index(name) for name in wanted) if wanted else None
    choice = Choice(threshold, classes, options.tile_size, options.overlap)
    options.out.mkdir(parents=True, exist_ok=True)
    total = sum(map(count_frames, paths))
    folder = options.images if options.images.is_dir() else None
    with Progress() as progress, StopRequest() as stop:
        bar = progress.bar("predicting", total, lines=20)
        predictions = predict(
            model, about, paths, device, ids, choice, lambda text: warn([f"skipped {text}"]), folder
        )
        found = write_predictions(
            options.out, predictions, about, choice, formats, bar.update, lambda: stop.asked
        )
        if stop.asked:
            raise Interrupted(
                f"stopped after {found[0]} of {total} images; {options.out} holds their predictions"
            )
    return found


def _model(kind: Kind, options: PredictOptions) -> tuple[Any, ArtifactConfig]:
    """Returns the model of an artifact, or of an exported file beside it, and the artifact's configuration.

    Raises:
        BadInput: an exported file in place of the artifact, or no exported file beside it.
    """
    from downstream.artifacts import load_finetuned, read_finetuned

    exported = options.artifact / "manifest.json"
    if options.artifact.suffix in (".onnx", ".engine") or exported.is_file():
        raise BadInput(
            f"{options.artifact}: is exported; give the artifact, and --runtime onnxruntime, openvino or "
            "tensorrt, which take the files in the folder export beside it"
        )
    if options.runtime in ("auto", "pytorch"):
        model = load_finetuned(options.artifact, kind)
        return model, model.artifact
    from coma.runtimes.find import open_model
    from downstream.evaluate_runtime import runtime_model

    about = read_finetuned(options.artifact, kind).config
    runtime = open_model(options.artifact, kind, options.runtime, options.device)
    return runtime_model(about, runtime), about


def print_files(out: Path) -> None:
    """Prints the files and folders that predictions were written to."""
    for path in sorted(out.iterdir()):
        print(f"  {path}")


def open_all_splits(options: CheckOptions, open_split: Callable[..., Any]) -> dict[str, Any]:
    """Opens and checks train and val, and test if there is one, and prints their warnings.

    Args:
        options: Options of the command.
        open_split: Opens a split by its name, given a callback for progress.

    Raises:
        BadInput: a split with errors, no train or no val split, or splits with other classes.
    """
    from downstream.datasets.files import NoSplit

    if options.out:
        check_empty(options.out)
    splits = {}
    with progress_bar("checking train, val and test") as progress:
        for name in ("train", "val", "test"):
            try:
                splits[name] = open_split(name, progress)
            except NoSplit:
                if name != "test":
                    raise
    for name, split in splits.items():
        warn([f"{options.data}, {name} split: {warning}" for warning in split.warnings])
        if split.class_names != splits["train"].class_names:
            raise BadInput(f"{options.data}: train and {name} have different classes")
    return splits


def print_classes(names: Sequence[str], rows: dict[str, list[ClassRow]], amount: str) -> None:
    """Prints a table of the classes: images, objects or pixels, smallest and largest, in every split."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("class", "split", "images", amount, "smallest", "largest")
    for number, name in enumerate(names):
        for split, listed in rows.items():
            table.add_row(Text(name if split == next(iter(rows)) else ""), split, *listed[number])
    Console().print(table)


def print_check(
    rows: Sequence[tuple[str, Sequence[str]]], splits: Sequence[str], errors: Sequence[str] = ()
) -> None:
    """Prints what a checked dataset holds, a row per fact, a column per split; and that it has no errors."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", *splits)
    for name, values in rows:
        table.add_row(*map(Text, (name, *values)))
    Console().print(table)
    if not errors:
        print("no errors found")


def warn(warnings: Sequence[str]) -> None:
    """Prints each warning on a line of stderr."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, quiet=not is_main())
    for warning in warnings:
        console.print(Text.assemble(("warning:", "bold yellow"), f" {warning}"), soft_wrap=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on a terminal; yields a function for the items done and in total."""
    from coma.progress import Progress

    with Progress() as progress:
        bar = progress.bar(title)
        yield lambda done, total: bar.update(done, total=total)
        bar.remove()


def device_of(name: str) -> torch.device:
    """Returns the device; `auto` is the GPU or the CPU, since mmcv's operators run nowhere else.

    Raises:
        BadInput: the device is not available.
    """
    import torch

    from coma.devices import pick_device

    return pick_device("cpu" if name == "auto" and not torch.cuda.is_available() else name)


def check_empty(out: Path, hint: str = "") -> None:
    """Refuses a folder that is not empty or cannot be written to.

    Raises:
        BadInput: naming the folder, with `hint` on what else to do.
    """
    require_folder(out)
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: is not empty; {hint}choose another")
