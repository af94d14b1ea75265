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
    to_json,
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
        model: The network.
        description: Its own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.model = model
        self.pixels_out = spec.graph == "reconstructor"
        for name in ("mean", "std"):
            values = torch.tensor(getattr(spec.preprocessing, name)) * 255
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Images `[b, c, H, W]` uint8; a reconstruction is float32 in 0..255."""
        outputs = self.model((images.float() - self.mean) / self.std, *others)
        return tuple(o * self.std + self.mean for o in outputs) if self.pixels_out else outputs


def with_preprocessing(exportable: ExportableModel) -> ExportableModel:
    """The same model, taking uint8 pixels."""
    spec = exportable.spec
    images = replace(spec.inputs[0], dtype="uint8")
    spec = replace(
        spec,
        inputs=(images, *spec.inputs[1:]),
        preprocessing=replace(spec.preprocessing, normalize_in_graph=True),
    )
    return ExportableModel(Preprocess(exportable.module, spec), spec)


def in_precision(module: nn.Module, precision: Precision) -> nn.Module:
    """The model with 16-bit weights, in place; preprocessing stays in float32."""
    dtype = _TYPES.get(precision)
    if dtype:
        (module.model if isinstance(module, Preprocess) else module).to(dtype)
    return module


def write_onnx(exportable: ExportableModel, shapes: Shapes, path: Path) -> ModelSpec:
    """Write the ONNX file of a model whose weights already have the precision wanted.

    Args:
        exportable: The model and its spec, precision included.
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

    spec = exportable.spec
    shapes.check(spec.unit)
    state = exportable.module.state_dict(keep_vars=True).values()
    _check_size(sum(each.numel() * each.element_size() for each in state))
    spec = replace(
        spec,
        inputs=tuple(_fixed(tensor_spec, shapes, spec.unit) for tensor_spec in spec.inputs),
        outputs=tuple(_fixed(tensor_spec, shapes, spec.unit) for tensor_spec in spec.outputs),
    )
    with library_errors("the graph cannot be traced"):
        model = _trace(exportable, spec, shapes)
    if spec.precision == "bf16" and any(node.op_type == "Conv" for node in model.graph.node):
        raise CheckFailed(f"ONNX files of opset {OPSET} hold no bf16 convolutions; take fp16")
    _drop_unused(model)
    onnx.helper.set_model_props(model, {METADATA: to_json(spec)})
    check_graph(model)
    check_axes(model, spec)
    save(model, path)
    return spec


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


def check_axes(model: onnx.ModelProto, spec: ModelSpec) -> None:
    """Compare the axes of the file's inputs and outputs with the spec.

    Raises:
        CheckFailed: naming those that are fixed but should be dynamic, or the other way round.
    """
    faults = []
    values = [*model.graph.input, *model.graph.output]
    tensor_specs = [*spec.inputs, *spec.outputs]
    if [value.name for value in values] != [each.name for each in tensor_specs]:
        raise CheckFailed(f"the graph has {[v.name for v in values]}, not {[p.name for p in tensor_specs]}")
    for value, tensor_spec in zip(values, tensor_specs, strict=True):
        dims = value.type.tensor_type.shape.dim
        if len(dims) != len(tensor_spec.axes):
            faults.append(f"{tensor_spec.name} has {len(dims)} axes, not {len(tensor_spec.axes)}")
            continue
        for dim, axis in zip(dims, tensor_spec.axes, strict=True):
            fixed = dim.dim_value if dim.HasField("dim_value") else None
            if isinstance(axis, int) and fixed not in (axis, None):
                faults.append(f"{tensor_spec.name}: {axis} became {fixed}")
            if isinstance(axis, str) and fixed is not None:
                faults.append(f"{tensor_spec.name}: {axis} should be dynamic and is fixed at {fixed}")
    if faults:
        raise CheckFailed("the exported graph is not as asked: " + "; ".join(faults))


def _fixed(tensor_spec: TensorSpec, shapes: Shapes, unit: int) -> TensorSpec:
    """The tensor_spec with those axes as numbers that are the same in all shapes."""
    fixed = {
        "batch": shapes.opt.batch,
        "height": shapes.opt.height,
        "width": shapes.opt.width,
        "rows": -(-shapes.opt.height // unit),
        "cols": -(-shapes.opt.width // unit),
    }
    of_sides = {"rows": "height", "cols": "width"}

    def fix(axis: str | int) -> str | int:
        if isinstance(axis, int):
            return axis
        name, _, stride = axis.partition("/")
        if of_sides.get(name, name) in shapes.dynamic:
            return axis
        return -(-fixed[name] // int(stride or 1))

    return replace(tensor_spec, axes=tuple(fix(axis) for axis in tensor_spec.axes))


def _trace(exportable: ExportableModel, spec: ModelSpec, shapes: Shapes) -> onnx.ModelProto:
    # the example has another height than width and two images, so that no two axes are taken for one
    opt, unit = shapes.opt, spec.unit
    batch = max(opt.batch, 2) if "batch" in shapes.dynamic else opt.batch
    widths = (opt.width + unit, opt.width - unit, opt.width)
    width = next(w for w in widths if shapes.min.width <= w <= shapes.max.width)
    inputs = list(example_inputs(spec, batch, opt.height, width))
    if spec.preprocessing.normalize_in_graph:
        inputs[0] = (inputs[0] * 40 + 128).clamp(0, 255).to(torch.uint8)
    dynamic = tuple(
        {i: axis for i, axis in enumerate(tensor_spec.axes) if isinstance(axis, str)}
        for tensor_spec in spec.inputs
    )
    table = None
    if spec.graph == "detector":
        from export.custom_ops import translations

        table = translations()
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            exportable.module,
            tuple(inputs),
            dynamo=True,
            dynamic_shapes=_matching(exportable.module, dynamic) if any(dynamic) else None,
            opset_version=OPSET,
            input_names=[each.name for each in spec.inputs],
            output_names=[each.name for each in spec.outputs],
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
