"""Starts a model from the weights of another: backbone, neck and all layers of the heads that fit.

Layers whose size follows the number of classes are new if the classes are not the same ones, also where there
are as many of them.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from torch import Tensor, nn

from downstream.cli_options import is_main
from downstream.configs.load import nodes

log = logging.getLogger(__name__)
SHOWN = 3
"""Most names of tensors in a message."""


class OtherClassesHook(Hook):
    """Removes the layers of other classes from a checkpoint before it is loaded."""

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Compares the classes of the checkpoint with those of the training images."""
        meta = checkpoint.get("meta", {})
        before = (meta.get("dataset_meta") or {}).get("classes")
        now = runner.train_dataloader.dataset.metainfo.get("classes")
        if before is None or now is None or tuple(before) == tuple(now):
            return
        meta["other_classes"] = True
        tensors = checkpoint.get("state_dict", checkpoint)
        if len(before) == len(now):  # otherwise they do not fit anyway
            for name in class_tensors(runner.cfg.model):
                tensors.pop(name, None)


def class_tensors(settings: Any) -> set[str]:
    """Returns the names of a model's tensors whose shape follows the number of classes.

    Args:
        settings: Settings of the model, as mmengine builds it. It is built twice, on the CPU. If it cannot be
            built with one class more, no name is returned, and a warning is logged.
    """
    shapes = []
    logging.disable(logging.INFO)  # what was loaded was said when the model itself was built
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for more in (0, 1):
                model = MODELS.build(_with_classes(settings, more))
                shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    except Exception as error:  # of any library
        log.warning(
            "all layers that fit are loaded, also those of other classes: %s", " ".join(str(error).split())
        )
        return set()
    finally:
        logging.disable(logging.NOTSET)
    return {name for name, shape in shapes[0].items() if shapes[1].get(name) != shape}


def _with_classes(settings: Any, more: int) -> Any:
    """Returns a copy of settings in which every `num_classes` is larger by `more`."""
    settings = copy.deepcopy(settings)
    for node in nodes(settings):
        if isinstance(node.get("num_classes"), int):
            node["num_classes"] += more
    return settings


def report_loaded(source: str, model: nn.Module, checkpoint: Mapping[str, Any], *, resumes: bool) -> int:
    """Logs in one line how many tensors of each part of a model were loaded, and what is new.

    Args:
        source: Name of the checkpoint.
        model: The model that was loaded.
        checkpoint: What was loaded.
        resumes: Whether the run goes on from it; then nothing is logged if all tensors were loaded.

    Returns:
        Number of tensors that were loaded.
    """
    theirs: Mapping[str, Tensor] = checkpoint.get("state_dict", checkpoint)
    theirs = {name.removeprefix("module."): tensor for name, tensor in theirs.items()}
    ours = model.state_dict()
    new = [name for name, t in ours.items() if getattr(theirs.get(name), "shape", None) != t.shape]
    loaded, unused = len(ours) - len(new), len(theirs.keys() - ours.keys())
    if not is_main() or not loaded or (resumes and not new and not unused):
        return loaded
    parts: dict[str, list[bool]] = {}
    for name in ours:
        part = name.partition(".")[0]
        parts.setdefault(part if part in ("backbone", "neck") else "heads", []).append(name not in new)
    counts = ", ".join(f"{part} {sum(each)} of {len(each)}" for part, each in parts.items())
    text = f"{source}: loaded {loaded} of the model's {len(ours)} tensors ({counts})"
    text += f"; {unused} tensors of the file are unused" if unused else ""
    others = checkpoint.get("meta", {}).get("other_classes", False)
    if new:
        reason = "new, since the classes are others" if others else "not loaded"
        text += f"; {reason}: {', '.join(new[:SHOWN])}{' ...' if new[SHOWN:] else ''}"
    whole = all(all(each) for part, each in parts.items() if part != "heads")
    log.log(logging.INFO if (others and whole) or not (new or unused) else logging.WARNING, "%s", text)
    return loaded
