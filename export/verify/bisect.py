"""Where a refused file begins to differ: the first module whose output is off.

torch's exporter writes into every node the modules it came from. The last node of a module gives the module's
output, which a hook gives on PyTorch's side; marked as outputs of the graph, all are compared in one run.
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
    """Where an error starts.

    Attributes:
        module: The first module, in the order of computing, whose output is beyond the limit.
        cosine: Of its output.
        before: The last module that was within it; None where there was none.
    """

    module: str
    cosine: float
    before: str | None

    def __str__(self) -> str:
        after = f", after {self.before} was right" if self.before else ", the first module that can be seen"
        return f"the error starts in {self.module} (cosine {self.cosine:.4f}{after})"


def locate(
    module: nn.Module,
    model: onnx.ModelProto,
    inputs: Sequence[Tensor],
    limit: float,
    *,
    exported: Sequence[Tensor] | None = None,
) -> Finding | None:
    """The first module whose output in the file is not PyTorch's.

    Args:
        module: In fp32.
        model: The file's graph; its node names say which modules they belong to.
        inputs: Of the module.
        limit: Least cosine similarity.
        exported: Inputs of the file, where they differ (uint8 pixels).

    Returns:
        None where no module can be told apart as wrong.
    """
    wanted = module_outputs(module, inputs)
    values = {name: value for name, value in module_values(model).items() if name in wanted}
    found = _run(model, values, exported or inputs)
    before = None
    for name, expected in wanted.items():  # in the order in which they were computed
        if name not in found or found[name].numel() != expected.numel():
            continue  # what a module gives was changed or fused away
        similarity = cosine(expected.double().flatten(), found[name].double().flatten())
        if not similarity >= limit:
            return Finding(name, similarity, before)
        before = name
    return None


def module_outputs(module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """What every part of a model gives, by its name, in the order of computing; parts that run once."""
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
    """The value in the graph that each module gives: the output of the last node that came from it."""
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
