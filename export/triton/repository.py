"""Writes exported files as a model repository for Triton Inference Server and checks it.

    triton/encoder/config.pbtxt        names, types and free axes, the largest batch, dynamic batching
    triton/encoder/1/model.onnx        hard link to encoder.onnx (a copy where the disk has no hard links)
    triton/classifier/labels.txt       class names, one a line
    triton/encoder-preprocess/         with --triton-preprocess: decoded images of any size to `images`
    triton/encoder-ensemble/           both in a row

The format is that of Triton's protobuf `inference.ModelConfig`, which the package tritonclient holds.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coma.atomic_io import sync
from coma.errors import BadInput, CheckFailed
from coma.runtimes.model_spec import METADATA, ModelSpec, read_model_spec, to_json
from coma.runtimes.onnx_file import read_graph, weights_file
from coma.runtimes.shape_ranges import Shapes
from coma.signals import signals_deferred
from export.onnx_export import save_onnx
from export.triton.preprocessing_check import compare_preprocessing
from export.triton.preprocessing_graph import preprocessing_graph

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, ValueInfoProto

FOLDER = "triton"
LABELS = "labels.txt"
_LABELLED = {"classifier": "logits", "segmentor": "classes", "detector": "labels"}
"""Output of each kind of graph whose numbers are classes."""
_BATCH = "batch"


def write_repository(path: Path, shapes: Shapes, pictures: Sequence[np.ndarray] | None = None) -> list[str]:
    """Writes the entries of an exported file into the folder `triton` beside it, and checks them.

    Args:
        path: An ONNX file of coma export.
        shapes: Shapes that it was exported for.
        pictures: Images to check a preprocessing model on, which is added with an ensemble of both; None adds
            none.

    Returns:
        One line for each entry, for people.

    Raises:
        BadInput: the file cannot be served in this way.
        CheckFailed: what was written does not fit the file.
        OSError: the disk is full or not writable; earlier entries stay as they were.
    """
    spec, repository = read_model_spec(read_graph(path), path.name), path.parent / FOLDER
    repository.mkdir(exist_ok=True)
    largest = shapes.max.batch if spec.inputs[0].axes[0] == _BATCH else 0
    entries = {path.stem: _Entry(model_config(path.stem, spec, read_graph(path), largest), path)}
    said = {path.stem: "parsed, and equal to the ONNX file"}
    if pictures is not None:
        graph, first, both = preprocessing_graph(spec), f"{path.stem}-preprocess", f"{path.stem}-ensemble"
        entries[first] = _Entry(model_config(first, None, graph, largest), graph)
        entries[both] = _Entry(_ensemble(both, entries[first].config, entries[path.stem].config), None)
        said[both] = str(compare_preprocessing(graph, path, pictures))
    written = []
    try:
        for name, entry in entries.items():
            written.append(repository / f".{name}.part")
            entry.write(written[-1], spec)
            check_entry(written[-1], name, largest)
        with signals_deferred():
            for staged, name in zip(written, entries, strict=True):
                shutil.rmtree(repository / name, ignore_errors=True)
                staged.rename(repository / name)
    finally:
        for staged in written:
            shutil.rmtree(staged, ignore_errors=True)
    sync(repository)
    return [f"{FOLDER}/{name}  {text}" for name, text in said.items()]


def model_config(name: str, spec: ModelSpec | None, model: ModelProto, largest: int) -> Any:
    """Returns the configuration of an ONNX model as Triton's protobuf.

    Args:
        name: Name of the entry.
        spec: Specification of an exported file; None for a preprocessing graph.
        model: Its graph.
        largest: Largest batch; 0 for a graph of one batch size, which Triton then sees as a usual axis.
    """
    config = _protobuf().ModelConfig(name=name, backend="onnxruntime", max_batch_size=largest)
    config.default_model_filename = "model.onnx"
    for tensors, values in ((config.input, model.graph.input), (config.output, model.graph.output)):
        for value in values:
            tensors.add(name=value.name, data_type=_triton_type(value), dims=_dims(value, largest))
    if largest > 1:
        config.dynamic_batching.SetInParent()
    if spec is not None:
        config.parameters[METADATA].string_value = to_json(spec)
        for output in config.output:
            if spec.class_names and output.name == _LABELLED.get(spec.graph):
                output.label_filename = LABELS
    return config


def check_entry(folder: Path, name: str, largest: int) -> None:
    """Compares an entry of a repository with the ONNX file in it, field by field.

    Args:
        folder: The entry.
        name: Name that it is served under.
        largest: Largest batch of the model.

    Raises:
        CheckFailed: the configuration cannot be parsed, or a field or the labels do not fit.
    """
    found = read_config(folder / "config.pbtxt")
    if found.WhichOneof("scheduling_choice") == "ensemble_scheduling":
        return _check_ensemble(folder, found)
    model = read_graph(folder / "1" / "model.onnx")
    said = {each.key: each.value for each in model.metadata_props}.get(METADATA)
    spec = read_model_spec(model, name) if said else None
    weights_file(model, folder / "1", name)
    faults = _differences(model_config(name, spec, model, largest), found)
    names = list(spec.class_names or ()) if spec and any(each.label_filename for each in found.output) else []
    if names and (folder / LABELS).read_text(encoding="utf-8").splitlines() != names:
        faults.append(f"{LABELS} does not hold the class names in their order")
    if faults:
        raise CheckFailed(f"{folder / 'config.pbtxt'}: does not fit its model: {'; '.join(faults)}")


def read_config(path: Path) -> Any:
    """Parses a `config.pbtxt`.

    Raises:
        CheckFailed: it is not one.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), _protobuf().ModelConfig())
    except (text_format.ParseError, OSError, UnicodeDecodeError) as error:
        raise CheckFailed(f"{path}: is not a configuration of Triton: {error}") from None


def _protobuf() -> Any:
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2


class _Entry:
    """An entry to write: its configuration, and its model: a file to link, a graph, or none (an ensemble)."""

    def __init__(self, config: Any, model: Path | ModelProto | None) -> None:
        self.config, self.model = config, model

    def write(self, folder: Path, spec: ModelSpec) -> None:
        from google.protobuf import text_format

        shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(text_format.MessageToString(self.config), encoding="utf-8")
        if isinstance(self.model, Path):
            _link(self.model, folder / "1" / "model.onnx")
            weights = weights_file(read_graph(self.model), self.model.parent, self.model.name)
            if weights:
                _link(weights, folder / "1" / weights.name)
        elif self.model is not None:
            save_onnx(self.model, folder / "1" / "model.onnx")
        if any(each.label_filename for each in self.config.output):
            (folder / LABELS).write_text("".join(f"{each}\n" for each in _labels(spec)), encoding="utf-8")


def _labels(spec: ModelSpec) -> tuple[str, ...]:
    names = spec.class_names or ()
    for name in names:
        if len(name.splitlines()) != 1:
            raise BadInput(f"--to triton: the class name {name!r} is not one line, as {LABELS} needs it")
    return names


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def _ensemble(name: str, first: Any, second: Any) -> Any:
    """Returns the configuration of a preprocessing model and a model in a row."""
    config = _protobuf().ModelConfig(name=name, platform="ensemble", max_batch_size=second.max_batch_size)
    made = {each.name for each in first.output}
    config.input.extend([*first.input, *(each for each in second.input if each.name not in made)])
    config.output.extend(second.output)
    for output in config.output:
        output.ClearField("label_filename")  # the model's own entry has it
    steps = config.ensemble_scheduling.step
    for each in (first, second):
        step = steps.add(model_name=each.name, model_version=-1)
        for tensors, places in ((each.input, step.input_map), (each.output, step.output_map)):
            for tensor in tensors:
                places[tensor.name] = tensor.name
    return config


def _check_ensemble(folder: Path, found: Any) -> None:
    parts = [step.model_name for step in found.ensemble_scheduling.step]
    if len(parts) != 2 or not all(_entry_beside(folder, part).is_dir() for part in parts):
        raise CheckFailed(f"{folder}: its steps {', '.join(parts)} are not in the repository")
    first, second = (read_config(_entry_beside(folder, part) / "config.pbtxt") for part in parts)
    if faults := _differences(_ensemble(found.name, first, second), found):
        raise CheckFailed(f"{folder / 'config.pbtxt'}: does not fit its steps: {'; '.join(faults)}")


def _entry_beside(folder: Path, name: str) -> Path:
    """Returns another entry of a repository, as it is being written or as it was."""
    staged = folder.with_name(f".{name}.part")
    return staged if staged.is_dir() else folder.with_name(name)


def _differences(wanted: Any, found: Any) -> list[str]:
    """Returns the fields in which two configurations differ."""
    faults = []
    for field in wanted.DESCRIPTOR.fields:
        ours, theirs = (getattr(each, field.name) for each in (wanted, found))
        set_in = [each.HasField(field.name) for each in (wanted, found)] if field.has_presence else [True]
        if ours != theirs or len(set(set_in)) > 1:
            faults.append(f"{field.name} is {_short(theirs)}, not {_short(ours)}")
    return faults


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        value = dict(value)
    text = " ".join(str(value).split())
    return f"{text[:200]}..." if len(text) > 200 else text


def _triton_type(value: ValueInfoProto) -> int:
    from onnx import TensorProto

    types = {"FLOAT": "FP32"}
    name = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    return _protobuf().DataType.Value(f"TYPE_{types.get(name, name)}")


def _dims(value: ValueInfoProto, largest: int) -> list[int]:
    """Returns the axes of a value, -1 for free ones, without that of the batch if Triton makes batches."""
    dims = value.type.tensor_type.shape.dim
    sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims]
    return sizes[1:] if largest else sizes
