"""A model ready to be exported."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from coma.runtimes.model_spec import Description


@dataclass(frozen=True)
class Deployable:
    """A model and what will be written about it.

    Attributes:
        module: In evaluation mode, on the CPU, fp32; takes the description's inputs in order, gives a
            tuple of its outputs in order.
        description: Of the fp32 file.
    """

    module: nn.Module
    description: Description
