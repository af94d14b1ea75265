"""Writes models as files of PyTorch itself, `.pt2`, which run without this package.

A program (`torch.export`) is the graph and its weights, for `torch.export.load` of the same or a later
version. A compiled one is machine code that AOTInductor made of the program for this kind of machine; C++
runs it without Python. Both hold the specification of the model: the program in the extra file
`coma.json`, the compiled one in its metadata.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from coma.errors import BadInput
from coma.library_errors import library_errors
from coma.runtimes.model_spec import METADATA, ExportableModel, ModelSpec, to_json
from coma.runtimes.names import TorchDevice
from coma.runtimes.shape_ranges import Shapes
from coma.runtimes.torch_program import SPEC_FILE
from export.onnx_export import tracing, tracing_errors

COMPILERS = ("c++", "g++", "clang++")


def write_program(
    exportable: ExportableModel, shapes: Shapes, path: Path, compile_for: TorchDevice | None = None
) -> ModelSpec:
    """Writes the `.pt2` file of a model whose weights already have their final precision.

    Args:
        exportable: The model and its specification.
        shapes: Shapes that the file must take; axes that differ between them are dynamic.
        path: The file.
        compile_for: Device to compile the program for; None keeps it as it is.

    Returns:
        The specification in the file, with the sizes of fixed axes.

    Raises:
        BadInput: images smaller than a mask unit.
        CheckFailed: the model cannot be traced, compiled or written.
    """
    spec, inputs, dynamic = tracing(exportable, shapes)
    if compile_for:
        exportable.module.to(compile_for)
        inputs = tuple(each.to(compile_for) for each in inputs)
    with tracing_errors():
        program = _export(exportable.module, inputs, dynamic)
    if compile_for:
        with library_errors("the program cannot be compiled"), tracing_errors():
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={"aot_inductor.metadata": {METADATA: to_json(spec)}},
            )
        return spec
    program.example_inputs = None  # random values, the largest part of a small file
    with library_errors("the program cannot be written"):
        torch.export.save(program, path, extra_files={SPEC_FILE: to_json(spec)})
    return spec


def require_compiler() -> None:
    """Checks that AOTInductor finds a C++ compiler.

    Raises:
        BadInput: there is none.
    """
    if not any(map(shutil.which, COMPILERS)):
        raise BadInput("--to aoti: needs a C++ compiler; install g++ or clang++, or use --to pt2")


def _export(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], dynamic: Any) -> ExportedProgram:
    """Exports a module whose dynamic axes may have any size, 1 included.

    torch otherwise takes sizes of 0 and 1 for constants, and batches of one image would be refused.
    """
    from torch.fx.experimental import _config
    from torch.utils._pytree import tree_map

    shape_rules: Any = _config  # it has `patch` only at run time
    axes = dynamic and tree_map(lambda _: torch.export.Dim.DYNAMIC, dynamic)
    with shape_rules.patch(backed_size_oblivious=True):
        return torch.export.export(module, inputs, dynamic_shapes=axes, strict=False)
