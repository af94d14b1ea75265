"""A model to one ONNX file, with what it is written into it and its dynamic axes asserted.

Opset 18 and standard operators only: what both ONNX Runtime and NVIDIA's parser take. 16-bit files are made
of a 16-bit model, not converted; their inputs and outputs stay float32.
"""

from __future__ import annotations

import ast
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coma.atomic_io import write_whole
from coma.errors import CheckFailed
from coma.library_errors import library_errors
from coma.runtimes.model_spec import (
    METADATA,
    ExportableModel,
    ModelSpec,
    Precision,
    TensorSpec,
    as_json,
)
from coma.runtimes.shape_ranges import Shapes
from export.graphs.load import example_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

OPSET = 18
_SCOPES = "pkg.torch.onnx.name_scopes"
_TALKATIVE = (
    *("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes"),
    *("onnxscript", "onnx_ir"),
)
_TYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Preprocess(nn.Module):
    """Mean and deviation inside the graph: pixels in, and of a reconstructor pixels out.

    Args:
        form: The model.
        description: Its own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, form: nn.Module, description: ModelSpec) -> None:
        super().__init__()
        self.form = form
        self.pixels_out = description.form == "reconstructor"
        for name in ("mean", "std"):
            values = torch.tensor(getattr(description.preprocessing, name)) * 255
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Images `[b, c, H, W]` uint8; a reconstruction is float32 in 0..255."""
        outputs = self.form((images.float() - self.mean) / self.std, *others)
        return tuple(o * self.std + self.mean for o in outputs) if self.pixels_out else outputs


def with_preprocessing(deployable: ExportableModel) -> ExportableModel:
    """The same model, taking uint8 pixels."""
    about = deployable.description
    images = replace(about.inputs[0], dtype="uint8")
    description = replace(
        about,
        inputs=(images, *about.inputs[1:]),
        preprocessing=replace(about.preprocessing, inside=True),
    )
    return ExportableModel(Preprocess(deployable.module, about), description)


def in_precision(module: nn.Module, precision: Precision) -> nn.Module:
    """The model with 16-bit weights, in place; preprocessing stays in float32."""
    dtype = _TYPES.get(precision)
    if dtype:
        (module.form if isinstance(module, Preprocess) else module).to(dtype)
    return module


def write_onnx(deployable: ExportableModel, shapes: Shapes, path: Path) -> ModelSpec:
    """Write the ONNX file of a model whose weights already have the precision wanted.

    Args:
        deployable: The model and its description, precision included.
        shapes: What it must take; axes that differ are dynamic.
        path: The file; it appears at once and whole.

    Returns:
        The description in the file: the model's with those axes as numbers that are fixed.

    Raises:
        BadInput: images smaller than a mask unit.
        CheckFailed: the model cannot be traced or is too large for one file, the graph is not valid, or an
            axis that was asked to be dynamic is not.
    """
    import onnx

    about = deployable.description
    shapes.check(about.unit)
    state = deployable.module.state_dict(keep_vars=True).values()
    _check_size(sum(each.numel() * each.element_size() for each in state))
    description = replace(
        about,
        inputs=tuple(_fixed(port, shapes, about.unit) for port in about.inputs),
        outputs=tuple(_fixed(port, shapes, about.unit) for port in about.outputs),
    )
    with library_errors("the graph cannot be traced"):
        model = _trace(deployable, description, shapes)
    if about.precision == "bf16" and any(node.op_type == "Conv" for node in model.graph.node):
        raise CheckFailed(f"ONNX files of opset {OPSET} hold no bf16 convolutions; take fp16")
    _drop_unused(model)
    onnx.helper.set_model_props(model, {METADATA: as_json(description)})
    check_graph(model)
    check_axes(model, description)
    save(model, path)
    return description


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes a file that appears at once and whole.

    Raises:
        CheckFailed: it would be larger than 2 GB, which is more than one ONNX file holds.
        OSError: the disk is full, or not to be written.
    """
    with library_errors("the graph cannot be written"):
        _check_size(model.ByteSize())
        content = model.SerializeToString()
    write_whole(path, lambda file: file.write(content))


def check_graph(model: onnx.ModelProto) -> None:
    """Runs the checker of the onnx package.

    Raises:
        CheckFailed: it refuses the graph.
    """
    import onnx

    with library_errors("the graph is not valid ONNX"):
        onnx.checker.check_model(model, full_check=True)


def _check_size(size: int) -> None:
    import onnx

    if size >= onnx.checker.MAXIMUM_PROTOBUF:
        raise CheckFailed(f"would be {size / 1e9:.1f} GB, more than the 2 GB of an ONNX file; try fp16")


def modules_of(node: onnx.NodeProto) -> list[str]:
    """Paths of the torch modules that a node was exported from, from outer to inner."""
    text = {prop.key: prop.value for prop in node.metadata_props}.get(_SCOPES)
    return [path for path in ast.literal_eval(text)[:-1] if path] if text else []  # the last is the node's


def check_axes(model: onnx.ModelProto, description: ModelSpec) -> None:
    """Compare the axes of the file's inputs and outputs with the description.

    Raises:
        CheckFailed: naming those that are fixed but should be dynamic, or the other way round.
    """
    faults = []
    values = [*model.graph.input, *model.graph.output]
    ports = [*description.inputs, *description.outputs]
    if [value.name for value in values] != [port.name for port in ports]:
        raise CheckFailed(f"the graph has {[v.name for v in values]}, not {[p.name for p in ports]}")
    for value, port in zip(values, ports, strict=True):
        dims = value.type.tensor_type.shape.dim
        if len(dims) != len(port.axes):
            faults.append(f"{port.name} has {len(dims)} axes, not {len(port.axes)}")
            continue
        for dim, axis in zip(dims, port.axes, strict=True):
            fixed = dim.dim_value if dim.HasField("dim_value") else None
            if isinstance(axis, int) and fixed not in (axis, None):
                faults.append(f"{port.name}: {axis} became {fixed}")
            if isinstance(axis, str) and fixed is not None:
                faults.append(f"{port.name}: {axis} should be dynamic and is fixed at {fixed}")
    if faults:
        raise CheckFailed("the exported graph is not as asked: " + "; ".join(faults))


def _fixed(port: TensorSpec, shapes: Shapes, unit: int) -> TensorSpec:
    """The port with those axes as numbers that are the same in all shapes."""
    fixed = {
        "batch": shapes.usual.batch,
        "height": shapes.usual.height,
        "width": shapes.usual.width,
        "rows": -(-shapes.usual.height // unit),
        "cols": -(-shapes.usual.width // unit),
    }
    of_sides = {"rows": "height", "cols": "width"}

    def fix(axis: str | int) -> str | int:
        if isinstance(axis, int):
            return axis
        name, _, stride = axis.partition("/")
        if of_sides.get(name, name) in shapes.dynamic:
            return axis
        return -(-fixed[name] // int(stride or 1))

    return replace(port, axes=tuple(fix(axis) for axis in port.axes))


def _trace(deployable: ExportableModel, description: ModelSpec, shapes: Shapes) -> onnx.ModelProto:
    # the example has another height than width and two images, so that no two axes are taken for one
    usual, unit = shapes.usual, description.unit
    batch = max(usual.batch, 2) if "batch" in shapes.dynamic else usual.batch
    widths = (usual.width + unit, usual.width - unit, usual.width)
    width = next(w for w in widths if shapes.least.width <= w <= shapes.most.width)
    inputs = list(example_inputs(description, batch, usual.height, width))
    if description.preprocessing.inside:
        inputs[0] = (inputs[0] * 40 + 128).clamp(0, 255).to(torch.uint8)
    dynamic = tuple(
        {i: axis for i, axis in enumerate(port.axes) if isinstance(axis, str)} for port in description.inputs
    )
    table = None
    if description.form == "detector":
        from export.custom_ops import translations

        table = translations()
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            deployable.module,
            tuple(inputs),
            dynamo=True,
            dynamic_shapes=_matching(deployable.module, dynamic) if any(dynamic) else None,
            opset_version=OPSET,
            input_names=[port.name for port in description.inputs],
            output_names=[port.name for port in description.outputs],
            custom_translation_table=table,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise CheckFailed("torch gave no graph")
    return program.model_proto


def _matching(module: nn.Module, dynamic: tuple[dict[int, str], ...]) -> Any:
    # `dynamic_shapes` follows the signature: what comes in as *others is one entry
    return (dynamic[0], dynamic[1:]) if isinstance(module, Preprocess) else dynamic


def _drop_unused(model: onnx.ModelProto) -> None:
    """Take out the note of torch's source lines in every node: a third of a small file, and paths in it."""
    for node in model.graph.node:
        kept = [prop for prop in node.metadata_props if prop.key == _SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
