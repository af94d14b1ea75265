"""What a model must know of the graph that is being made of it."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether a graph for other programs is made (`torch.export`, not strict), as `torch.onnx.export` does.

    Inside `torch.compile`, torch's function of this name is always true (seen in 2.11).
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def has_known_size(h: int, w: int) -> bool:
    """Whether the sides of a map are numbers: not so in a graph that is exported for any size."""
    return isinstance(h, int) and isinstance(w, int)
