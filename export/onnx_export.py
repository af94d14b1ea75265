"""Exports a model to one ONNX file that holds its specification, and checks the dynamic axes.

Files use opset 18 and standard operators, which both ONNX Runtime and NVIDIA's parser support. 16-bit files
are traced from a 16-bit model, not converted; their inputs and outputs stay float32.
"""

from __future__ import annotations

import ast
import logging
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coma.atomic_io import write_whole
from coma.errors import BadInput, CheckFailed
from coma.library_errors import library_errors
from coma.runtimes.model_spec import (
    METADATA,
    ExportableModel,
    ModelSpec,
    Precision,
    TensorSpec,
    read_model_spec,
    to_json,
)
from coma.runtimes.onnx_file import read_graph
from coma.runtimes.shape_ranges import Shapes
from export.custom_ops import translations
from export.external_data import place_weights, without_weights
from export.gelu import reorder_gelus
from export.graphs.detector import recording
from export.graphs.load import example_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

OPSET = 18
RECORDED = "step/"
"""Prefix of the steps of a detector inside its graph, which the verification reads; see `Detector.steps`."""
_SCOPES = "pkg.torch.onnx.name_scopes"
_VERBOSE_LOGGERS = (
    *("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes"),
    *("onnxscript", "onnx_ir"),
)
_DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


class NormalizedInput(nn.Module):
    """A model that takes uint8 pixels and normalises them itself; a reconstructor also returns pixels.

    Args:
        model: The model, which takes normalised images.
        spec: Its specification.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.model = model
        self.returns_pixels = spec.graph == "reconstructor"
        for name in ("mean", "std"):
            values = torch.tensor(getattr(spec.preprocessing, name)) * 255
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Takes images `[b, c, H, W]` uint8; a reconstruction is float32 in 0..255."""
        outputs = self.model((images.float() - self.mean) / self.std, *others)
        return tuple(o * self.std + self.mean for o in outputs) if self.returns_pixels else outputs


def with_normalization(exportable: ExportableModel) -> ExportableModel:
    """Returns the model with normalisation in its graph: it takes uint8 pixels."""
    module = NormalizedInput(exportable.module, exportable.spec)
    return ExportableModel(module, normalized(exportable.spec))


def normalized(spec: ModelSpec) -> ModelSpec:
    """Returns the specification of a file that takes uint8 pixels and normalises them."""
    images = replace(spec.inputs[0], dtype="uint8")
    rule = replace(spec.preprocessing, normalize_in_graph=True)
    return replace(spec, inputs=(images, *spec.inputs[1:]), preprocessing=rule)


def cast_weights(exportable: ExportableModel, precision: Precision) -> ExportableModel:
    """Returns the model with its weights cast in place to a 16-bit precision; normalisation stays in fp32."""
    module, dtype = exportable.module, _DTYPES.get(precision)
    if dtype:
        (module.model if isinstance(module, NormalizedInput) else module).to(dtype)
    return ExportableModel(module, replace(exportable.spec, precision=precision))


def write_onnx(
    exportable: ExportableModel, shapes: Shapes, path: Path, plugin_free: bool = False
) -> ModelSpec:
    """Writes the ONNX file of a model whose weights already have their final precision.

    Args:
        exportable: The model and its specification.
        shapes: Shapes that the file must take; axes that differ between them are dynamic.
        path: The file; it is written atomically.
        plugin_free: Whether a detector does without NonMaxSuppression and RoiAlign.

    Returns:
        The specification in the file, with the sizes of fixed axes.

    Raises:
        BadInput: images smaller than a mask unit.
        CheckFailed: the model cannot be traced, the graph is invalid, or an axis is fixed that should be
            dynamic.
    """
    import onnx

    spec, inputs, dynamic = tracing(exportable, shapes)
    module, outputs = exportable.module, [each.name for each in spec.outputs]
    with tracing_errors(), recording(module) as steps:
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            input_names=[each.name for each in spec.inputs],
            output_names=[*outputs, *(RECORDED + name for name in steps)],
            custom_translation_table=translations(plugin_free) if spec.graph == "detector" else None,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise CheckFailed("torch returned no graph")
    model = program.model_proto
    if spec.precision == "bf16" and any(node.op_type == "Conv" for node in model.graph.node):
        raise CheckFailed(f"ONNX has no bf16 convolution in opset {OPSET}; use fp16")
    del model.graph.output[len(outputs) :]  # the steps of a detector keep their names inside the graph
    _drop_source_notes(model)
    reorder_gelus(model)
    if plugin_free:
        from export.plugin_free import declare_loop_types

        declare_loop_types(model)
    onnx.helper.set_model_props(model, {METADATA: to_json(spec)})
    place_weights(model, path)
    check_graph(model)
    check_axes(model, spec)
    save_onnx(model, path)
    return spec


def tracing(exportable: ExportableModel, shapes: Shapes) -> tuple[ModelSpec, tuple[Tensor, ...], Any]:
    """Returns the specification of a file for these shapes, inputs to trace with, and their dynamic axes.

    The axes are in the form that `torch.export.export` takes as `dynamic_shapes`; None if all are fixed.

    Raises:
        BadInput: images smaller than a mask unit.
    """
    shapes.check(exportable.spec.unit)
    spec = with_sizes(exportable.spec, shapes)
    dynamic: Any = tuple(
        {i: axis for i, axis in enumerate(each.axes) if isinstance(axis, str)} for each in spec.inputs
    )
    if isinstance(exportable.module, NormalizedInput) and len(dynamic) > 1:
        dynamic = (dynamic[0], dynamic[1:])  # follows the signature, where *others is one argument
    return spec, _trace_inputs(spec, shapes), dynamic if shapes.dynamic else None


@contextmanager
def tracing_errors() -> Iterator[None]:
    """Traces without gradients, notes and warnings of torch's exporter, and with its errors in one line.

    torch's cache of outputs is off: with free axes, filling it takes longer than what it saves.

    Raises:
        CheckFailed: the model cannot be traced.
    """
    import torch._dynamo.config  # takes a second

    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with library_errors("the graph cannot be traced"), _quiet(), torch.no_grad(), uncached:
        yield


def load_onnx(path: Path) -> onnx.ModelProto:
    """Loads an ONNX file; weights in a file beside it stay there.

    Raises:
        CheckFailed: the file is not readable as ONNX.
    """
    try:
        return read_graph(path)
    except BadInput as error:
        raise CheckFailed(str(error)) from None


def read_spec(path: Path) -> ModelSpec:
    """Reads the specification in an ONNX file."""
    return read_model_spec(load_onnx(path), path.name)


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Writes an ONNX file atomically; see `place_weights` for graphs above 2 GB.

    Raises:
        CheckFailed: the graph cannot be written.
        OSError: the disk is full or not writable.
    """
    with library_errors("the graph cannot be written"):
        content = model.SerializeToString()
    write_whole(path, lambda file: file.write(content))


def check_graph(model: onnx.ModelProto) -> None:
    """Runs the checker of the onnx package.

    Raises:
        CheckFailed: the graph is invalid.
    """
    import onnx

    with library_errors("the graph is not valid ONNX"):
        onnx.checker.check_model(without_weights(model), full_check=True)


def modules_of(node: onnx.NodeProto) -> list[str]:
    """Returns the paths of the torch modules that a node was exported from, outermost first."""
    text = {prop.key: prop.value for prop in node.metadata_props}.get(_SCOPES)
    return (
        [path for path in ast.literal_eval(text)[:-1] if path] if text else []
    )  # the last is the node's own


def check_axes(model: onnx.ModelProto, spec: ModelSpec) -> None:
    """Compares the axes of the graph's inputs and outputs with the specification.

    Raises:
        CheckFailed: an axis is fixed that should be dynamic, or has another size.
    """
    faults = []
    values = [*model.graph.input, *model.graph.output]
    tensors = [*spec.inputs, *spec.outputs]
    if [value.name for value in values] != [each.name for each in tensors]:
        raise CheckFailed(f"the graph has {[v.name for v in values]}, not {[p.name for p in tensors]}")
    for value, tensor in zip(values, tensors, strict=True):
        dims = value.type.tensor_type.shape.dim
        if len(dims) != len(tensor.axes):
            faults.append(f"{tensor.name} has {len(dims)} axes, not {len(tensor.axes)}")
            continue
        for dim, axis in zip(dims, tensor.axes, strict=True):
            fixed = dim.dim_value if dim.HasField("dim_value") else None
            if isinstance(axis, int) and fixed not in (axis, None):
                faults.append(f"{tensor.name}: {axis} became {fixed}")
            if isinstance(axis, str) and fixed is not None:
                faults.append(f"{tensor.name}: {axis} should be dynamic and is fixed at {fixed}")
    if faults:
        raise CheckFailed("the exported graph has wrong axes: " + "; ".join(faults))


def with_sizes(spec: ModelSpec, shapes: Shapes) -> ModelSpec:
    """Returns the specification of a file for these shapes, with the sizes of its fixed axes."""
    inputs, outputs = (
        tuple(_with_sizes(each, shapes, spec.unit) for each in tensors)
        for tensors in (spec.inputs, spec.outputs)
    )
    return replace(spec, inputs=inputs, outputs=outputs)


def _with_sizes(tensor: TensorSpec, shapes: Shapes, unit: int) -> TensorSpec:
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

    return replace(tensor, axes=tuple(fix(axis) for axis in tensor.axes))


def _trace_inputs(spec: ModelSpec, shapes: Shapes) -> tuple[Tensor, ...]:
    """Returns example inputs whose batch, height and width differ, so that no two axes are taken for one.

    Dynamic sides have at least four mask units where the largest shape allows it: coarser maps, such as a
    feature pyramid's, would otherwise be one position high or wide, which torch takes for a constant.
    """
    opt, most, unit = shapes.opt, shapes.max, spec.unit
    batch = max(opt.batch, 2) if "batch" in shapes.dynamic else opt.batch
    height, width = (
        max(side, min(4 * unit, top)) for side, top in ((opt.height, most.height), (opt.width, most.width))
    )
    widths = (width + unit, width - unit, width)
    fitting = [w for w in widths if shapes.min.width <= w <= most.width]
    width = next((w for w in fitting if w != height), width)
    images, *others = example_inputs(spec, batch, height, width)
    if spec.preprocessing.normalize_in_graph:
        images = (images * 40 + 128).clamp(0, 255).to(torch.uint8)
    return images, *others


def _drop_source_notes(model: onnx.ModelProto) -> None:
    """Removes torch's notes of source lines from all nodes: they hold paths and a third of a small file."""
    for node in model.graph.node:
        kept = [prop for prop in node.metadata_props if prop.key == _SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings and loggers of torch's exporter."""
    loggers = [logging.getLogger(name) for name in _VERBOSE_LOGGERS]
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
