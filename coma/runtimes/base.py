"""What every runtime is: a description, and tensors by name to tensors by name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from coma.runtimes.model_spec import Description


class Runtime(Protocol):
    """A loaded model.

    Attributes:
        title: Library, version and device, for tables: "ONNX Runtime 1.31 CPU".
        description: What the file says of itself.
    """

    title: str
    description: Description

    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Run on `images` (and, for a reconstructor, `visible`).

        Inputs may lie anywhere; outputs lie on the runtime's device, by the names of
        `description.outputs`, in the types of their ports.

        Raises:
            BadInput: a tensor that the model cannot take; the message says what it takes.
        """
        ...
