"""Locates the error of a rejected file: finds the first module whose output differs from PyTorch's.

torch's exporter records in every node the modules that it came from. The last node of a module computes the
module's output, which a hook captures in PyTorch. All of them become outputs of the graph and are compared in
one run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coma.runtimes.onnxruntime import OnnxRuntime
from export.onnx_export import modules_of
from export.verify.errors import cosine

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Finding:
    """Module where an error starts.

    Attributes:
        module: First module, in the order of computation, whose output exceeds the tolerance.
        cosine: Cosine similarity of its output.
        before: Last module within the tolerance, or None.
    """

    module: str
    cosine: float
    before: str | None

    def __str__(self) -> str:
        after = f"; {self.before} is correct" if self.before else "; the first module that can be compared"
        return f"the error starts in {self.module} (cosine {self.cosine:.4f}{after})"


def locate(
    module: nn.Module,
    model: onnx.ModelProto,
    inputs: Sequence[Tensor],
    limit: float,
    *,
    exported: Sequence[Tensor] | None = None,
) -> Finding | None:
    """Finds the first module whose output in the file differs from PyTorch's.

    Args:
        module: The model in fp32.
        model: The graph, whose nodes name the modules that they belong to.
        inputs: Inputs of the module.
        limit: Minimum cosine similarity.
        exported: Inputs of the file if they differ (uint8 pixels).

    Returns:
        None if no module can be identified.
    """
    wanted = module_outputs(module, inputs)
    values = {name: value for name, value in module_values(model).items() if name in wanted}
    found = _run(model, values, exported or inputs)
    before = None
    for name, expected in wanted.items():  # in the order of computation
        if name not in found or found[name].numel() != expected.numel():
            continue  # the output was changed or fused away
        similarity = cosine(expected.double().flatten(), found[name].double().flatten())
        if not similarity >= limit:
            return Finding(name, similarity, before)
        before = name
    return None


def module_outputs(module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns the outputs of all modules that run once, by name, in the order of computation."""
    outputs: dict[str, Tensor] = {}
    runs: dict[str, int] = {}

    def keep(name: str):
        def hook(_: nn.Module, __: object, out: object) -> None:
            runs[name] = runs.get(name, 0) + 1
            if isinstance(out, Tensor) and out.is_floating_point():
                outputs[name] = out.detach()

        return hook

    hooks = [part.register_forward_hook(keep(name)) for name, part in module.named_modules() if name]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: out for name, out in outputs.items() if runs[name] == 1}


def module_values(model: onnx.ModelProto) -> dict[str, str]:
    """Returns the value in the graph that each module computes: the output of its last node."""
    values: dict[str, str] = {}
    for node in model.graph.node:
        values |= dict.fromkeys(modules_of(node), node.output[0])
    return values


def _run(model: onnx.ModelProto, values: dict[str, str], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    import onnx

    marked = copy.deepcopy(model)
    there = {out.name for out in marked.graph.output}
    types = {info.name: info for info in onnx.shape_inference.infer_shapes(marked).graph.value_info}
    for value in dict.fromkeys(values.values()):
        if value not in there and value in types:
            marked.graph.output.append(types[value])
    session = OnnxRuntime(marked.SerializeToString(), extra_outputs=True)
    names = [each.name for each in session.spec.inputs]
    outputs = session(**dict(zip(names, inputs, strict=True)))
    return {name: outputs[value].float() for name, value in values.items() if value in outputs}
