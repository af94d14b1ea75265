"""The interface of all runtimes: a specification, and a call from named tensors to named tensors."""

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
        title: Library, version and device for tables, such as "ONNX Runtime 1.31 CPU".
        spec: Specification of the model.
    """

    title: str
    spec: ModelSpec

    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Runs the model on `images` and, for a reconstructor, `visible`.

        Inputs may be on any device; outputs are on the runtime's device, with the names and types of
        `spec.outputs`.

        Raises:
            BadInput: an input has the wrong name, type or shape; the message says what the model takes.
        """
        ...


DTYPES = {"float32": torch.float32, "uint8": torch.uint8, "bool": torch.bool, "int64": torch.int64}


def check_inputs(spec: ModelSpec, images: Tensor, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checks the inputs against the specification and returns them by name.

    Raises:
        BadInput: an input is missing or unknown, or has another type or shape.
    """
    given = {"images": images, **others}
    names = [each.name for each in spec.inputs]
    if set(given) != set(names):
        raise BadInput(f"the {spec.graph} takes {' and '.join(names)}, given were {', '.join(given)}")
    known: dict[str, int] = {}
    for tensor_spec in spec.inputs:
        tensor = given[tensor_spec.name]
        takes = f"the {spec.graph} takes {tensor_spec.name} {tensor_spec.dtype} {list(tensor_spec.axes)}"
        if tensor.dtype != DTYPES[tensor_spec.dtype]:
            raise BadInput(f"{takes}, given was {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.ndim != len(tensor_spec.axes):
            raise BadInput(f"{takes}, given was {list(tensor.shape)}")
        for size, axis in zip(tensor.shape, tensor_spec.axes, strict=True):
            if isinstance(axis, int) and size != axis:
                raise BadInput(f"{takes}, given was {list(tensor.shape)}")
            if isinstance(axis, str) and known.setdefault(axis, size) != size:
                raise BadInput(f"{takes}, given was {list(tensor.shape)}: {axis} is {known[axis]} elsewhere")
    if min(images.shape[2:]) < spec.unit:
        raise BadInput(
            f"images of {images.shape[2]} x {images.shape[3]} px are smaller than the mask unit of "
            f"{spec.unit} px"
        )
    return {name: given[name] for name in names}
