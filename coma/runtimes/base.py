"""What every runtime is: a description, and tensors by name to tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from coma.errors import BadInput
from coma.runtimes.model_spec import ModelSpec


class Runtime(Protocol):
    """A loaded model.

    Attributes:
        title: Library, version and device, for tables: "ONNX Runtime 1.31 CPU".
        description: What the file says of itself.
    """

    title: str
    description: ModelSpec

    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Run on `images` (and, for a reconstructor, `visible`).

        Inputs may lie anywhere; outputs lie on the runtime's device, by the names of
        `description.outputs`, in the types of their ports.

        Raises:
            BadInput: a tensor that the model cannot take; the message says what it takes.
        """
        ...


DTYPES = {"float32": torch.float32, "uint8": torch.uint8, "bool": torch.bool, "int64": torch.int64}


def check_inputs(description: ModelSpec, images: Tensor, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs by name, if the file takes them.

    Raises:
        BadInput: an input is missing or unknown, or of another type, rank, size or number of images.
    """
    given = {"images": images, **others}
    names = [port.name for port in description.inputs]
    if set(given) != set(names):
        raise BadInput(f"the {description.form} takes {' and '.join(names)}, given were {', '.join(given)}")
    known: dict[str, int] = {}
    for port in description.inputs:
        tensor = given[port.name]
        takes = f"the {description.form} takes {port.name} {port.dtype} {list(port.axes)}"
        if tensor.dtype != DTYPES[port.dtype]:
            raise BadInput(f"{takes}, given was {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.ndim != len(port.axes):
            raise BadInput(f"{takes}, given was {list(tensor.shape)}")
        for size, axis in zip(tensor.shape, port.axes, strict=True):
            if isinstance(axis, int) and size != axis:
                raise BadInput(f"{takes}, given was {list(tensor.shape)}")
            if isinstance(axis, str) and known.setdefault(axis, size) != size:
                raise BadInput(f"{takes}, given was {list(tensor.shape)}: {axis} is {known[axis]} elsewhere")
    if min(images.shape[2:]) < description.unit:
        raise BadInput(
            f"images of {images.shape[2]} x {images.shape[3]} px are smaller than the mask unit of "
            f"{description.unit} px"
        )
    return {name: given[name] for name in names}
