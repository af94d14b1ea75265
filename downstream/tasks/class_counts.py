"""Sets the number of classes in the settings of any detector or segmentor."""

from __future__ import annotations

import logging
from typing import Any

from downstream.configs.load import nodes

log = logging.getLogger(__name__)
_NAMES = ("num_classes", "num_things_classes")


def set_classes(model: Any, classes: int) -> None:
    """Sets the number of classes of every head that has as many as the model distinguishes now.

    Others stay, such as the one class of a boundary head. Weights of classes are taken over where all are
    equal, but for a last one more, of "no object"; others are dropped, which is logged.

    Args:
        model: Settings of a model, changed in place.
        classes: New number of classes.
    """
    counts = [node[name] for node in nodes(model) for name in _NAMES if isinstance(node.get(name), int)]
    before = max(counts, default=0)
    for node in nodes(model):
        for name in _NAMES:
            if node.get(name) == before:
                node[name] = classes
    for node in nodes(model):
        weights = node.get("class_weight")
        if not isinstance(weights, list | tuple) or len(weights) not in (before, before + 1):
            continue
        same, last = set(weights[:before]), list(weights[before:])
        if len(same) == 1:
            node["class_weight"] = [*same] * classes + last
        else:
            log.info("class_weight of %d classes is dropped: the data have %d", before, classes)
            node["class_weight"] = None
