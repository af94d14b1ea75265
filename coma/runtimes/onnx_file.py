"""What an ONNX file says of itself, checked before a runtime loads it."""

from __future__ import annotations

from pathlib import Path

from coma.errors import BadInput
from coma.library_errors import library_errors, load_packages
from coma.preflight import check_regular_file
from coma.runtimes.model_spec import ModelSpec, read_model_spec

EMULATED = "coma.emulated"
"""Metadata key of a graph that emulates a precision; the value is "fp16" or "bf16"."""


def name_of(file: Path | bytes) -> str:
    """Returns the name of a file for messages."""
    return file.name if isinstance(file, Path) else "the graph"


def read_onnx_file(file: Path | bytes) -> tuple[ModelSpec, str | None]:
    """Returns the specification of a file, or of its content, and the precision that it emulates.

    Raises:
        BadInput: the package onnx is missing, or the file is not one that coma export wrote.
    """
    load_packages("onnx")
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    name = name_of(file)
    if isinstance(file, Path):
        check_regular_file(file)
    with library_errors(f"{name}: not a readable ONNX file", BadInput):
        content = file.read_bytes() if isinstance(file, Path) else file
        model = onnx.load_model_from_string(content)
        outside = any(map(uses_external_data, _get_all_tensors(model)))
    if outside:
        raise BadInput(f"{name}: keeps weights in other files, which coma export never does; export it again")
    emulated = {each.key: each.value for each in model.metadata_props}.get(EMULATED)
    return read_model_spec(model, name), emulated
