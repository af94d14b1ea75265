"""The interface of all runtimes: a specification, and a call from named tensors to named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from coma.errors import BadInput
from coma.masking.patchify import unit_grid
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
        """Runs the model on `images` and, where it has this input, `visible`: a mask, or a list of units.

        Inputs may be on any device; outputs are on the runtime's device, with the names and types of
        `spec.outputs`.

        Raises:
            BadInput: an input has the wrong name, type or shape, or the list names a unit that the images do
                not have, or one twice; the message says what the model takes.
        """
        ...


DTYPES = {"float32": torch.float32, "uint8": torch.uint8, "bool": torch.bool, "int64": torch.int64}


def check_inputs(spec: ModelSpec, images: Tensor, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checks the inputs against the specification and returns them by name.

    Raises:
        BadInput: an input is missing or unknown, or has another type or shape; units that are listed twice,
            or that the images do not have.
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
    if spec.visible_units:
        check_listed(given["visible"], *unit_grid(images.shape[2], images.shape[3], spec.unit))
    return {name: given[name] for name in names}


def check_listed(listed: Tensor, rows: int, cols: int) -> None:
    """Checks lists of visible units, int64 `[b, s]`.

    Raises:
        BadInput: a list names a unit that images of `rows` x `cols` units do not have, or one twice.
    """
    units = rows * cols
    ordered = listed.detach().cpu().sort(dim=1).values
    wrong = ordered[(ordered < 0) | (ordered >= units)]
    if len(wrong):
        raise BadInput(
            f"visible lists unit {int(wrong[0])}; images of {rows} x {cols} units have 0 to {units - 1}"
        )
    image, place = (ordered[:, 1:] == ordered[:, :-1]).nonzero(as_tuple=True)
    if len(image):
        unit = int(ordered[image[0], place[0]])
        raise BadInput(f"visible lists unit {unit} of image {int(image[0])} twice; list every unit once")
