"""Weights of large ONNX files: protobuf holds up to 2 GB, what is larger goes to a file beside the ONNX file.

Graphs of such files stay small in memory too: their large tensors only say where the values are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from coma.atomic_io import Descriptor, write_whole
from coma.runtimes.manifest import Manifest
from coma.runtimes.onnx_file import WEIGHTS_FILE, external_place, external_tensors

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

_MOST_BYTES = 1_900_000_000
"""Weights that a file holds itself; protobuf's limit of 2 GB leaves 100 MB for nodes and metadata."""
_LEAST_BYTES = 1024
"""Size of the smallest tensor in a weights file; shapes and scales stay in the graph."""
_ALIGNMENT = 4096
"""Tensors start at multiples of this, so that runtimes can map the file into memory (ONNX specification,
"External tensor data")."""


def place_weights(model: ModelProto, path: Path) -> None:
    """Puts the weights of a graph where they belong, in place: all in the graph, or the large ones in a file.

    Args:
        model: The graph; weights that are in a file already are read from the folder of `path`.
        path: ONNX file that the graph will be written to; the weights file is written beside it.

    Raises:
        OSError: the disk is full or not writable.
    """
    tensors = list(model.graph.initializer)
    if sum(map(byte_count, tensors)) <= _MOST_BYTES:
        read_weights(model, path.parent)
        return
    large = [each for each in tensors if byte_count(each) >= _LEAST_BYTES]
    if not all(each.external_data for each in large):
        _write_weights(large, path)


def read_weights(model: ModelProto, folder: Path) -> None:
    """Reads the weights that are in a file of `folder` into the graph, in place."""
    for tensor in external_tensors(model):
        _set_values(tensor, _values(tensor, folder))


def without_weights(model: ModelProto) -> ModelProto:
    """Returns a graph that takes the weights that are in a file as inputs, for tools that look for the file.

    A graph that holds its weights is returned as it is.
    """
    from onnx import ModelProto, helper

    outside = [each for each in model.graph.initializer if each.external_data]
    if not outside:
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    kept = [each for each in copy.graph.initializer if not each.external_data]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    for each in outside:
        copy.graph.input.append(helper.make_tensor_value_info(each.name, each.data_type, each.dims))
    return copy


def remove_unlisted_weights(folder: Path, manifest: Manifest) -> None:
    """Removes the weights files of a folder that no listed file needs; no other export may write there."""
    needed = {name for entry in (*manifest.files, *manifest.rejected) for name in entry.weights}
    for path in folder.iterdir():
        written_as = path.name.removeprefix(".").removesuffix(".part")
        if WEIGHTS_FILE.fullmatch(written_as) and path.name not in needed:
            path.unlink()


def byte_count(tensor: TensorProto) -> int:
    """Returns the number of bytes of a tensor's values."""
    from onnx import helper

    return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _write_weights(tensors: list[TensorProto], path: Path) -> None:
    digest = hashlib.sha256()
    for piece in _pieces(tensors, path.parent):
        digest.update(piece)
    name = f"{path.name.partition('.')[0]}.{digest.hexdigest()[:16]}.data"

    def write(file: Descriptor) -> None:
        for piece in _pieces(tensors, path.parent):
            file.write(piece)

    write_whole(path.with_name(name), write)
    offset = 0
    for tensor in tensors:
        length = byte_count(tensor)
        _set_values(tensor, None)
        tensor.data_location = tensor.EXTERNAL
        for key, value in (("location", name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        offset += length + -length % _ALIGNMENT


def _pieces(tensors: list[TensorProto], folder: Path) -> Iterator[bytes]:
    for tensor in tensors:
        values = _values(tensor, folder)
        yield values
        yield bytes(-len(values) % _ALIGNMENT)


def _values(tensor: TensorProto, folder: Path) -> bytes:
    from onnx import numpy_helper

    if not tensor.external_data:
        return tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
    location, offset, length = external_place(tensor)
    with (folder / location).open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _set_values(tensor: TensorProto, values: bytes | None) -> None:
    """Replaces the values of a tensor by these bytes, or by none."""
    kept = type(tensor)(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    if values is not None:
        kept.raw_data = values
    tensor.CopyFrom(kept)
