"""Faults that are planted in the graphs of exported files, or in their descriptions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from coma.runtimes.base import Runtime
from coma.runtimes.model_spec import METADATA, read_model_spec, to_json
from export.onnx_export import modules_of

Change = Callable[[ModelProto], None]


def described(**changes: Any) -> Change:
    """Changes fields of the description; those of `preprocessing` by their own names."""

    def change(model: ModelProto) -> None:
        spec = read_model_spec(model, "the graph")
        ours = {name: value for name, value in changes.items() if hasattr(spec, name)}
        rule = {name: value for name, value in changes.items() if name not in ours}
        spec = replace(spec, **ours, preprocessing=replace(spec.preprocessing, **rule))
        helper.set_model_props(model, {METADATA: to_json(spec)})

    return change


def constant(model: ModelProto, value: Any) -> str:
    """Adds a constant and returns its name."""
    name = f"planted/{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


class Patch:
    """Nodes that are put in place of a value: what computed `name` now computes `source`."""

    def __init__(self, model: ModelProto, name: str) -> None:
        self.model, self.name, self.source = model, name, f"{name}/before"
        self.nodes: list[NodeProto] = []
        made = [node for node in model.graph.node if name in node.output]
        if made:  # otherwise it is an input of the graph
            made[0].output[list(made[0].output).index(name)] = self.source
        self.place = list(model.graph.node).index(made[0]) + 1 if made else 0

    def add(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Adds a node and returns its output; inputs are names or constants."""
        names = [each if isinstance(each, str) else constant(self.model, each) for each in inputs]
        out = f"{self.name}/planted{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [out], **attributes))
        return out

    def close(self, value: str) -> None:
        """Makes `value` the result."""
        self.nodes.append(helper.make_node("Identity", [value], [self.name]))
        nodes = list(self.model.graph.node)
        del self.model.graph.node[:]
        self.model.graph.node.extend([*nodes[: self.place], *self.nodes, *nodes[self.place :]])


def f32(value: float | Sequence[float]) -> np.ndarray:
    """Returns a float32 constant."""
    return np.asarray(value, np.float32)


def scaled(name: str, factor: float, where: str | None = None) -> Change:
    """Multiplies a value by a factor.

    `where` is a condition on the sides of the input: odd-batch, wide, tall, smallest, largest or odd-size.
    """

    def change(model: ModelProto) -> None:
        patch = Patch(model, name)
        times: Any = f32(factor)
        if where:
            shape = patch.add("Shape", "images")
            batch, height, width = (patch.add("Gather", shape, np.int64(axis), axis=0) for axis in (0, 2, 3))
            holds = {
                "odd-batch": lambda: patch.add("Equal", batch, np.int64(3)),
                "wide": lambda: patch.add("Greater", width, patch.add("Mul", height, np.int64(2))),
                "tall": lambda: patch.add("Greater", height, patch.add("Mul", width, np.int64(2))),
                "smallest": lambda: patch.add("Less", patch.add("Mul", height, width), np.int64(17 * 17)),
                "largest": lambda: patch.add("Greater", height, np.int64(127)),
                "odd-size": lambda: patch.add("Equal", patch.add("Mod", height, np.int64(2)), np.int64(1)),
            }[where]()
            times = patch.add("Where", holds, f32(factor), f32(1.0))
        patch.close(patch.add("Mul", patch.source, times))

    return change


def replaced(name: str, kind: str, *inputs: Any, **attributes: Any) -> Change:
    """Puts an operator behind a value, which comes first among its inputs."""

    def change(model: ModelProto) -> None:
        patch = Patch(model, name)
        patch.close(patch.add(kind, patch.source, *inputs, **attributes))

    return change


def clipped_inputs(least: float, most: float) -> Change:
    """Clips the input images."""

    def change(model: ModelProto) -> None:
        name = constant(model, f32(least)), constant(model, f32(most))
        for node in model.graph.node:
            for place, each in enumerate(node.input):
                if each == "images" and node.op_type != "Shape":
                    node.input[place] = "images/clipped"
        model.graph.node.insert(0, helper.make_node("Clip", ["images", *name], ["images/clipped"]))

    return change


def swapped_channels() -> Change:
    """Reverses the channels of the input."""

    def change(model: ModelProto) -> None:
        index = constant(model, np.array([2, 1, 0]))
        for node in model.graph.node:
            for place, each in enumerate(node.input):
                if each == "images" and node.op_type != "Shape":
                    node.input[place] = "images/swapped"
        model.graph.node.insert(0, helper.make_node("Gather", ["images", index], ["images/swapped"], axis=1))

    return change


def other_units(*steps: tuple[str, Any]) -> Change:
    """Changes the input `visible`, one operator after the other, each with its second input."""

    def change(model: ModelProto) -> None:
        values = ["visible", *(f"visible/planted{number}" for number in range(len(steps)))]
        for node in model.graph.node:
            for place, each in enumerate(node.input):
                if each == "visible" and node.op_type != "Shape":
                    node.input[place] = values[-1]
        for place, (kind, value) in enumerate(steps):
            inputs = [values[place], constant(model, np.asarray(value, np.int64))]
            node = helper.make_node(kind, inputs, [values[place + 1]])
            if kind == "Gather":
                node.attribute.append(helper.make_attribute("axis", 1))
            model.graph.node.insert(place, node)

    return change


def attribute(kind: str, name: str, value: Any, *, only: int | None = None) -> Change:
    """Sets an attribute of all nodes of a kind, or of the one with the number `only`."""

    def change(model: ModelProto) -> None:
        nodes = [node for node in model.graph.node if node.op_type == kind]
        for node in nodes if only is None else [nodes[only]]:
            kept = [each for each in node.attribute if each.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def tanh_gelu(only: int | None = None) -> Change:
    """Approximates the GELUs by tanh (Hendrycks and Gimpel 2016, arXiv 1606.08415, sec. 2)."""

    def change(model: ModelProto) -> None:
        outputs = [node.output[0] for node in model.graph.node if node.op_type == "Erf"]
        for name in outputs if only is None else [outputs[only]]:
            argument = next(node.input[0] for node in model.graph.node if name in node.output)
            patch = Patch(model, name)
            x = patch.add("Mul", argument, f32(2**0.5))
            cube = patch.add("Mul", patch.add("Mul", x, x), x)
            total = patch.add("Add", x, patch.add("Mul", cube, f32(0.044715)))
            patch.close(patch.add("Tanh", patch.add("Mul", total, f32((2 / np.pi) ** 0.5))))

    return change


def weights_of(model: ModelProto, module: str) -> list[tuple[NodeProto, int, TensorProto]]:
    """Returns the node, the place and the value of every stored tensor that a module computes with."""
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    stored = {each.name: each for each in model.graph.initializer if each.data_type in floats}
    return [
        (node, place, stored[name])
        for node in model.graph.node
        if modules_of(node)[-1:] == [module]
        for place, name in enumerate(node.input)
        if name in stored and len(stored[name].dims)
    ]


def weight(module: str, change_values: Callable[[np.ndarray], np.ndarray], place: int = 0) -> Change:
    """Changes a weight of one module (0) or its bias (1), also if other modules share the tensor."""

    def change(model: ModelProto) -> None:
        found = weights_of(model, module)
        if len(found) <= place:
            raise AssertionError(f"{module} has no such weight")
        node, argument, tensor = found[place]
        values = numpy_helper.to_array(tensor)
        node.input[argument] = constant(model, change_values(values.copy()).astype(values.dtype))

    return change


def some_percent(values: np.ndarray) -> np.ndarray:
    """A third of the values one percent larger."""
    values.flat[::3] *= 1.01
    return values


def suppression(number: int, place: int, value: float) -> Change:
    """Changes the overlap (place 3) or the minimum score (4) of a non-maximum suppression."""

    def change(model: ModelProto) -> None:
        nodes = [node for node in model.graph.node if node.op_type == "NonMaxSuppression"]
        nodes[number].input[place] = constant(model, f32([value]))

    return change


def labels_permuted(below: float) -> Change:
    """Exchanges the classes 0 and 1 of detections with a score below `below`."""

    def change(model: ModelProto) -> None:
        patch = Patch(model, "labels")
        faint = patch.add("Less", "scores", f32(below))
        low = patch.add("And", faint, patch.add("Less", patch.source, np.int64(2)))
        there = patch.add("And", low, patch.add("GreaterOrEqual", patch.source, np.int64(0)))
        other = patch.add("Sub", np.int64(1), patch.source)
        patch.close(patch.add("Where", there, other, patch.source))
        moved = [node for node in model.graph.node if node.name == "" and node.output[0].startswith("labels")]
        _move_to_end(model, moved)

    return change


def _move_to_end(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    names = {node.output[0] for node in nodes}
    others = [node for node in model.graph.node if node.output[0] not in names]
    last = [node for node in model.graph.node if node.output[0] in names]
    del model.graph.node[:]
    model.graph.node.extend([*others, *last])


def noise(name: str, size: float) -> Change:
    """Adds noise that differs from run to run."""

    def change(model: ModelProto) -> None:
        patch = Patch(model, name)
        drawn = patch.add("RandomNormalLike", patch.source, scale=size)
        patch.close(patch.add("Add", patch.source, drawn))

    return change


class Stateful:
    """A runtime whose outputs keep a trace of the shape that ran before."""

    def __init__(self, runtime: Runtime) -> None:
        self.title, self.spec, self.runtime, self.before = runtime.title, runtime.spec, runtime, 0

    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Runs the model."""
        outputs = self.runtime(images, **others)
        size = images.shape[2] * images.shape[3]
        if self.before not in (0, size):
            outputs = {name: each * (1 + 1e-6) for name, each in outputs.items()}
        self.before = size
        return outputs


def all_leaves(module: torch.nn.Module) -> Iterator[str]:
    """Yields the paths of modules without children."""
    return (name for name, part in module.named_modules() if name and not any(part.children()))
