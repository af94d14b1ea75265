"""What an ONNX file says of itself, checked before a runtime loads it.

Files above 2 GB keep their weights in one file beside them, `NAME.HASH.data`, whose name holds the start of
its SHA-256: the name does not change when the ONNX file gets another one, and a new export never writes over
the weights of an earlier one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from coma.errors import BadInput
from coma.library_errors import library_errors, load_packages
from coma.preflight import check_regular_file
from coma.runtimes.model_spec import ModelSpec, read_model_spec

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

EMULATED = "coma.emulated"
"""Metadata key of a graph that emulates a precision; the value is "fp16" or "bf16"."""
WEIGHTS_FILE = re.compile(r"[\w+-]+\.[0-9a-f]{16}\.data", re.ASCII)
"""Names of files with weights."""
ORT_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Session option of ONNX Runtime: the folder of the weights of a graph that is loaded from memory."""


def name_of(file: Path | bytes) -> str:
    """Returns the name of a file for messages."""
    return file.name if isinstance(file, Path) else "the graph"


def read_onnx_file(file: Path | bytes, folder: Path | None = None) -> tuple[ModelSpec, str | None]:
    """Returns the specification of a file, or of its content, and the precision that it emulates.

    Args:
        file: The file, or its content.
        folder: Folder of the weights file of a content.

    Raises:
        BadInput: the package onnx is missing, or the file is not one that coma export wrote.
    """
    name = name_of(file)
    model = read_graph(file)
    weights_file(model, file.parent if isinstance(file, Path) else folder, name)
    emulated = {each.key: each.value for each in model.metadata_props}.get(EMULATED)
    return read_model_spec(model, name), emulated


def read_graph(file: Path | bytes) -> ModelProto:
    """Reads an ONNX file, or its content, without the weights that are in another file.

    Raises:
        BadInput: the package onnx is missing, or the file is not readable.
    """
    load_packages("onnx")
    import onnx

    if isinstance(file, Path):
        check_regular_file(file)
    with library_errors(f"{name_of(file)}: not a readable ONNX file", BadInput):
        return onnx.load_model_from_string(file.read_bytes() if isinstance(file, Path) else file)


def weights_file(model: ModelProto, folder: Path | None, name: str) -> Path | None:
    """Returns the file with the weights of a graph, or None if the graph holds them itself.

    Args:
        model: The graph.
        folder: Folder of its ONNX file; None allows no other file.
        name: Name of the ONNX file for messages.

    Raises:
        BadInput: the graph refers to another file than one of coma export beside it, to a link, or to bytes
            that the file does not have.
    """
    outside = list(external_tensors(model))
    if not outside:
        return None
    places = [external_place(tensor) for tensor in outside]
    locations = {location for location, _, _ in places}
    location = locations.pop()
    if locations or folder is None or not WEIGHTS_FILE.fullmatch(location):
        raise BadInput(f"{name}: keeps weights in other files than coma export does; export it again")
    path = folder / location
    if path.is_symlink() or not path.is_file():
        what = "is a link" if path.is_symlink() else "is missing"
        raise BadInput(f"{name}: {path}, which holds its weights, {what}; copy both files together")
    size = path.stat().st_size
    if any(min(offset, length) < 0 or offset + length > size for _, offset, length in places):
        raise BadInput(f"{name}: {path}, which holds its weights, is too short; export it again")
    return path


def external_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yields all tensors of a model, wherever they are, whose values are in another file."""
    graphs = [model.graph]
    graphs += [graph for each in model.training_info for graph in (each.initialization, each.algorithm)]
    tensors = chain(
        chain.from_iterable(map(_tensors, graphs)),
        *(_node_tensors(function.node) for function in model.functions),
    )
    return (each for each in tensors if each.data_location or each.external_data)


def external_place(tensor: TensorProto) -> tuple[str, int, int]:
    """Returns file, offset and length of the values of a tensor; a length of -1 where they are not valid."""
    said = {each.key: each.value for each in tensor.external_data}
    location, offset, length = (said.get(key, "") for key in ("location", "offset", "length"))
    valid = all(each.isascii() and each.isdecimal() and len(each) < 19 for each in (offset, length))
    return (location, int(offset), int(length)) if valid else (location, 0, -1)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors(graph)
