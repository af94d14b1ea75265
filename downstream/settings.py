"""mmengine configurations: ours, which lie in `downstream/configs`, or any of mmdet's and mmseg's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.errors import BadInput

PRESETS = Path(__file__).parent / "configs"


def load_config(path: Path) -> Any:
    """An mmengine configuration.

    Raises:
        BadInput: it cannot be read.
    """
    from mmengine.config import Config

    if not path.is_file():
        raise BadInput(f"--config {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of third parties about each other
            return Config.fromfile(path)
    except Exception as error:  # a configuration is a program: anything may go wrong in it
        raise BadInput(f"--config {path}: cannot be read ({type(error).__name__}: {error})") from error


def change(config: Any, options: tuple[str, ...]) -> None:
    """Apply changes given as `name=value`, as OpenMMLab's tools do.

    Raises:
        BadInput: one is not of that form, or does not fit the configuration.
    """
    from mmengine.config import DictAction

    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise BadInput(f"--cfg-options {option}: must be name=value")
        try:
            config.merge_from_dict({name: DictAction._parse_iterable(value)})
        except (KeyError, TypeError, AssertionError, ValueError) as error:
            raise BadInput(f"--cfg-options {option}: does not fit ({error})") from None


def replace_dataset(loader: Any, make: Callable[[list[Any]], dict[str, Any]]) -> None:
    """Put `make(pipeline)` in the place of a loader's dataset, or of the several that it joins.

    What repeats or mixes it stays around it.
    """
    holder = loader
    while "dataset" in holder["dataset"]:
        holder = holder["dataset"]
    holder["dataset"] = make(pipeline_of(holder["dataset"]))


def pipeline_of(dataset: Any) -> list[Any]:
    """How a dataset is read; inside wrappers that repeat, join or mix some, the first one."""
    while "pipeline" not in dataset or "dataset" in dataset or "datasets" in dataset:
        inner = dataset.get("dataset") or next(iter(dataset.get("datasets") or ()), None)
        if inner is None:
            return []
        dataset = inner
    return dataset["pipeline"]
