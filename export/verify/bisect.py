"""Locates the error of a rejected file: finds the first module whose output differs from PyTorch's.

torch's exporter records in every node the modules that it came from, so the values that a module computes
can be read from the graph. They become outputs of a copy of it, and one run gives all of them. A detector's
steps start from the file's own proposals in PyTorch too, because other proposals would shift all that
follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coma.models.view_sequences import computed_as_exported
from export.graphs.detector import Detector
from export.onnx_export import RECORDED
from export.verify.errors import relative_error
from export.verify.inner_values import module_values, recorded_steps, runtime_with

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Finding:
    """Module where an error starts.

    Attributes:
        module: First module, in the order of computation, whose output exceeds the tolerance.
        relative: Relative error of its output.
        before: Last module within the tolerance, or None.
    """

    module: str
    relative: float
    before: str | None

    def __str__(self) -> str:
        after = f"; {self.before} is correct" if self.before else "; the first module that can be compared"
        return f"the error starts in {self.module} (relative error {self.relative:.2g}{after})"


def locate(
    module: nn.Module,
    model: onnx.ModelProto,
    inputs: Sequence[Tensor],
    limit: float,
    *,
    exported: Sequence[Tensor] | None = None,
    folder: Path | None = None,
) -> Finding | None:
    """Finds the first module whose output in the file differs from PyTorch's.

    Modules that contain others are not compared, nor are outputs that the exporter fused away.

    Args:
        module: The model in fp32.
        model: The graph, whose nodes name the modules that they belong to.
        inputs: Inputs of the module.
        limit: Maximum relative error.
        exported: Inputs of the file if they differ (uint8 pixels).
        folder: Folder of the graph's weights file, if it has one.

    Returns:
        None if no module can be identified.
    """
    leaves = [name for name, part in module.named_modules() if name and not any(part.children())]
    values = module_values(model, leaves)
    wanted_names = [name for names in values.values() for name in names]
    runtime = runtime_with(model, [*wanted_names, *recorded_steps(model)], folder=folder)
    takes = [each.name for each in runtime.spec.inputs]
    found = runtime(**dict(zip(takes, exported or inputs, strict=True)))
    steps = {name.removeprefix(RECORDED): value for name, value in found.items()}
    wanted = module_outputs(module, leaves, inputs, steps)
    calls = {name: sum(each == name for each, _ in wanted) for name in leaves}
    seen = dict.fromkeys(leaves, 0)
    before = None
    for name, expected in wanted:  # in the order of computation
        number, seen[name] = seen[name], seen[name] + 1
        actual = _output_of_call([found[each] for each in values[name] if each in found], number, calls[name])
        if actual is None or actual.numel() != expected.numel():
            continue  # the output was changed or fused away
        expected, actual = expected.double().flatten(), actual.double().flatten()
        relative = relative_error(expected, expected - actual)
        if not relative <= limit:
            return Finding(name, relative, before)
        before = name
    return None


def module_outputs(
    module: nn.Module, leaves: Sequence[str], inputs: Sequence[Tensor], steps: Mapping[str, Tensor]
) -> list[tuple[str, Tensor]]:
    """Returns the outputs of every call of the given modules in the order of computation.

    Args:
        module: The model.
        leaves: Paths of modules.
        inputs: Inputs of the model.
        steps: Values that the steps of a detector start from.
    """
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str):
        def hook(_: nn.Module, __: object, out: object) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                outputs.append((name, out.detach().clone()))  # an activation may work in place

        return hook

    hooks = [module.get_submodule(name).register_forward_hook(keep(name)) for name in leaves]
    try:
        with torch.no_grad(), computed_as_exported():
            if isinstance(module, Detector):
                module.steps(inputs[0], steps)
            else:
                module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _output_of_call(values: Sequence[Tensor], number: int, calls: int) -> Tensor | None:
    """Returns the last value of one of several calls of a module, which all compute equally many values."""
    if not values or len(values) % calls:
        return None
    return values[len(values) // calls * (number + 1) - 1]
