"""Loads and changes mmengine configurations: ours in `downstream/configs`, or the user's."""

from __future__ import annotations

import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coma.errors import BadInput, ComaError, is_out_of_gpu_memory

log = logging.getLogger(__name__)
BACKBONES = "mmpretrain"
"""Package of OpenMMLab whose backbones configurations of mmdet and mmseg may use."""
MESSAGE = 300
"""Longest part of an error of OpenMMLab that is shown, in characters."""
_LIBRARY = re.compile(r"[/\\](?=(?:mmdet|mmseg|mmcv)[/\\])")
OURS = ("DyViT", "PlainViT")
"""Types of our backbones."""
PRESETS = Path(__file__).parent
REGISTER_MODULE = "downstream.openmmlab"
"""Module that registers our backbones with mmengine when it is imported."""


def load_config(path: Path) -> Any:
    """Loads an mmengine configuration.

    Raises:
        BadInput: a missing file, or one that cannot be loaded.
    """
    if not path.is_file():
        raise BadInput(f"--config {path}: no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties about each other
        from mmengine.config import Config

        import_module(REGISTER_MODULE)  # before mmdet and mmseg, which a configuration may import

        with config_errors(path, "cannot be read"):
            try:
                return Config.fromfile(path)
            except ImportError:
                if find_spec(BACKBONES):
                    raise
                return _without_backbones(Config.fromfile(path, import_custom_modules=False), path)


def _without_backbones(config: Any, path: Path) -> Any:
    """Imports what a configuration names, except for the package that only holds other backbones."""
    theirs = config.get("custom_imports") or {}
    imports = as_list(theirs.get("imports"))
    kept = [name for name in imports if name.partition(".")[0] != BACKBONES]
    for name in kept:
        import_module(name)
    if imports == kept:
        raise BadInput(f"{path}: cannot be read; run it with `python {path}` to see why")
    log.info("%s: %s is not installed and not imported; only its own backbone needs it", path, BACKBONES)
    config.custom_imports = {**theirs, "imports": kept}
    return config


def require_imports(config: Any, *modules: str) -> None:
    """Makes mmengine import these modules first wherever the configuration is used."""
    theirs = config.get("custom_imports") or {}
    imports = as_list(theirs.get("imports"))
    config.custom_imports = {  # a new value, since mmengine returns copies
        "imports": list(dict.fromkeys([*modules, *imports])),
        "allow_failed_imports": theirs.get("allow_failed_imports", False),
    }


@contextmanager
def config_errors(path: Path, what: str) -> Iterator[None]:
    """Turns errors inside into one line that names the user's configuration.

    Raises:
        BadInput: with `what`, and the file and line of OpenMMLab that raised the error.
    """
    try:
        yield
    except ComaError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_gpu_memory(error) or (isinstance(error, OSError) and error.errno == ENOSPC):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if _LIBRARY.search(f.filename)]
        where = f" at {_LIBRARY.split(frames[-1].filename)[-1]}:{frames[-1].lineno}" if frames else ""
        said = _line(str(error) or (frames[-1].line if frames else None) or "no message")
        raise BadInput(f"{path}: {what} ({type(error).__name__}{where}: {said})") from error


def worker_error(text: str) -> str:
    """Returns the message of an error without the traceback that worker processes add."""
    if "Original Traceback" not in text:
        return text
    return text.rstrip().rpartition("\n")[2].partition(": ")[2]


def _line(text: str) -> str:
    text = " ".join(worker_error(text).split())
    return text if len(text) <= MESSAGE else f"{text[:MESSAGE]} ..."


def apply_cfg_options(config: Any, options: tuple[str, ...]) -> None:
    """Applies changes given as `name=value`, as OpenMMLab's tools do.

    Raises:
        BadInput: a malformed change, or one that does not fit the configuration.
    """
    from downstream.private import parse_option_value

    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise BadInput(f"--cfg-options {option}: must be name=value")
        try:
            config.merge_from_dict({name: parse_option_value(value)})
        except (KeyError, TypeError, AssertionError, ValueError) as error:
            raise BadInput(f"--cfg-options {option}: does not fit ({error})") from None


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Returns the names of settings that differ; datasets, metrics and changed types count as one.

    Args:
        before: Settings as plain data; new settings are ignored.
        after: The same settings later.
        name: Name of these settings.
    """
    if before == after:
        return []
    same = isinstance(before, dict) and isinstance(after, dict) and before.get("type") == after.get("type")
    whole = name.endswith((".dataset", "_evaluator"))
    if same and not whole:
        names = {key: f"{name}.{key}" if name else key for key in (before if not name else [*before, *after])}
        return [each for key in names for each in differences(before.get(key), after.get(key), names[key])]
    if isinstance(before, list | tuple) and isinstance(after, list | tuple):
        if len(before) == len(after) and any(isinstance(each, dict) for each in before):
            pairs = enumerate(zip(before, after, strict=True))
            return [each for i, (old, new) in pairs for each in differences(old, new, f"{name}.{i}")]
        return [name] if list(before) != list(after) else []
    return [name] if same else [f"{name} ({_short(before)} -> {_short(after)})"]


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} entries"
    return "nothing" if value is None else str(value.get("type") if isinstance(value, dict) else value)


def replace_dataset(loader: Any, make: Callable[[list[Any]], dict[str, Any]]) -> None:
    """Replaces the dataset of a loader by `make(pipeline)`; wrappers that repeat or mix it stay."""
    holder = loader
    while "dataset" in holder["dataset"]:
        holder = holder["dataset"]
    holder["dataset"] = make(pipeline_of(holder["dataset"]))


def image_reader(channels: int) -> dict[str, Any]:
    """Returns the pipeline step that loads images of this number of channels.

    Three is left out as the default: for arrays, OpenMMLab's functions replace the type alone.
    """
    return {"type": "ReadImage", **({} if channels == 3 else {"channels": channels})}


def pipeline_of(dataset: Any) -> list[Any]:
    """Returns the pipeline of a dataset, or of the first one inside wrappers."""
    while "pipeline" not in dataset or "dataset" in dataset or "datasets" in dataset:
        inner = dataset.get("dataset") or next(iter(dataset.get("datasets") or ()), None)
        if inner is None:
            return []
        dataset = inner
    return dataset["pipeline"]


def nodes(settings: Any) -> Iterator[dict[str, Any]]:
    """Yields all dictionaries in settings, outer ones first; each may be changed before the next is taken."""
    if isinstance(settings, dict):
        yield settings
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for child in settings:
            yield from nodes(child)


def as_list(value: Any) -> list[Any]:
    """Returns one, several or no values as a list."""
    return [] if not value else list(value) if isinstance(value, list | tuple) else [value]
