"""The model repository for Triton: parsed with Triton's own protobuf, and faults planted in it."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export_files import VIT, classifier, export
from google.protobuf import text_format
from skimage import data

from coma.errors import BadInput, CheckFailed
from coma.runtimes.model_spec import ModelSpec, Precision, Preprocessing, TensorSpec
from coma.runtimes.open import open_runtime
from coma.runtimes.shape_ranges import Shape, Shapes
from export import external_data
from export.triton import preprocessing_check, repository
from export.triton.preprocessing_check import compare_preprocessing
from export.triton.preprocessing_graph import preprocessing_graph
from export.triton.repository import check_entry, read_config, write_repository

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself
STATIC = Shapes(*[Shape(1, 48, 48)] * 3)
MEAN, STD = (0.45, 0.42, 0.39), (0.24, 0.23, 0.25)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An export with weights beside the file, a free batch, and an ensemble."""
    run = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_data, "_MOST_BYTES", 20_000)
        shapes = ("--shapes", "1x3x48x48:2x3x48x48:4x3x48x48")
        artifact = classifier(run / "artifact", VIT)
        assert export(artifact, *shapes, "--to", "onnx,triton", "--triton-preprocess") == 0
    return run


@pytest.fixture
def entry(made, tmp_path) -> Path:
    """The classifier's entry, in a copy of the repository."""
    return Path(shutil.copytree(made / "export" / "triton", tmp_path / "triton")) / "classifier"


def test_the_entries_are_what_the_file_says(made):
    folder = made / "export"
    assert {path.name for path in (folder / "triton").iterdir()} == {
        "classifier", "classifier-preprocess", "classifier-ensemble"
    }  # fmt: skip
    entry = folder / "triton" / "classifier"
    config = read_config(entry / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("classifier", "onnxruntime", 4)
    assert config.HasField("dynamic_batching")
    (images,), (logits,) = config.input, config.output
    assert (images.name, list(images.dims), images.data_type) == ("images", [3, 48, 48], 11)  # TYPE_FP32
    assert (logits.name, list(logits.dims), logits.label_filename) == ("logits", [3], "labels.txt")
    assert (entry / "labels.txt").read_text() == "cat\ncup\nface\n"
    (weights,) = folder.glob("*.data")
    for source, linked in ((folder / "classifier.onnx", "model.onnx"), (weights, weights.name)):
        assert os.path.samefile(source, entry / "1" / linked)
    both = read_config(folder / "triton" / "classifier-ensemble" / "config.pbtxt")
    assert [step.model_name for step in both.ensemble_scheduling.step] == [
        "classifier-preprocess", "classifier"
    ]  # fmt: skip
    assert [(each.name, list(each.dims)) for each in both.input] == [("image", [-1, -1, 3])]
    assert (folder / "triton" / "classifier-ensemble" / "1").is_dir()
    open_runtime(folder / "classifier.onnx")


def edit(path: Path, change) -> None:
    config: Any = read_config(path)
    change(config)
    path.write_text(text_format.MessageToString(config))


FAULTS = {
    "a wrong name": lambda c: setattr(c, "name", "other"),
    "a wrong backend": lambda c: setattr(c, "backend", "tensorrt"),
    "a wrong axis": lambda c: c.input[0].dims.__setitem__(1, 49),
    "a fixed axis that is free": lambda c: c.input[0].dims.__setitem__(1, -1),
    "axes in another order": lambda c: c.input[0].dims.reverse(),
    "a wrong number of classes": lambda c: c.output[0].dims.__setitem__(0, 4),
    "a wrong type": lambda c: setattr(c.input[0], "data_type", 10),
    "a wrong name of an output": lambda c: setattr(c.output[0], "name", "scores"),
    "a missing output": lambda c: c.output.pop(),
    "a larger batch": lambda c: setattr(c, "max_batch_size", 8),
    "no batches": lambda c: c.ClearField("dynamic_batching"),
    "no labels": lambda c: c.output[0].ClearField("label_filename"),
    "another file": lambda c: setattr(c, "default_model_filename", "x.onnx"),
    "a foreign setting": lambda c: c.instance_group.add(count=2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_configuration_is_refused(entry, fault):
    check_entry(entry, "classifier", 4)
    edit(entry / "config.pbtxt", FAULTS[fault])
    with pytest.raises(CheckFailed, match=r"config\.pbtxt: does not fit its model: \w+ is "):
        check_entry(entry, "classifier", 4)


@pytest.mark.parametrize("labels", ["cup\ncat\nface\n", "cat\ncup\n", ""])
def test_labels_in_another_order_are_refused(entry, labels):
    (entry / "labels.txt").write_text(labels)
    with pytest.raises(CheckFailed, match=r"labels\.txt does not hold the class names in their order"):
        check_entry(entry, "classifier", 4)


def test_text_that_is_no_configuration_and_weights_that_are_missing_are_refused(entry):
    (entry / "config.pbtxt").write_text("name: 5 {")
    with pytest.raises(CheckFailed, match="is not a configuration of Triton"):
        check_entry(entry, "classifier", 4)
    shutil.copy(entry.parent / "classifier-ensemble" / "config.pbtxt", entry / "config.pbtxt")
    next((entry / "1").glob("*.data")).unlink()
    shutil.rmtree(entry.parent / "classifier-preprocess")
    with pytest.raises(CheckFailed, match="are not in the repository"):
        check_entry(entry, "classifier", 4)


def test_a_wrong_ensemble_is_refused(entry):
    folder = entry.parent / "classifier-ensemble"
    check_entry(folder, "classifier-ensemble", 4)
    edit(
        folder / "config.pbtxt", lambda c: c.ensemble_scheduling.step[1].input_map.update({"images": "image"})
    )
    with pytest.raises(CheckFailed, match="does not fit its steps: ensemble_scheduling is "):
        check_entry(folder, "classifier-ensemble", 4)


def test_a_repository_that_fails_its_check_leaves_the_former_one(made, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))
    before = (folder / "triton" / "classifier" / "config.pbtxt").read_text()
    config = repository.model_config

    written: list[Any] = []

    def wrong(name, spec, model, largest):
        written.append(config(name, spec, model, largest))
        if len(written) == 1:
            written[0].output[0].dims[0] += 1
        return written[-1]

    monkeypatch.setattr(repository, "model_config", wrong)
    shapes = Shapes(Shape(1, 48, 48), Shape(2, 48, 48), Shape(4, 48, 48))
    with pytest.raises(CheckFailed, match="output is "):
        write_repository(folder / "classifier.onnx", shapes)
    assert (folder / "triton" / "classifier" / "config.pbtxt").read_text() == before
    assert not list((folder / "triton").glob(".*"))


def test_graphs_of_one_batch_size_keep_that_axis(exported, tmp_path):
    folder = Path(shutil.copytree(exported / "export", tmp_path / "export"))
    write_repository(folder / "classifier.onnx", STATIC)
    config = read_config(folder / "triton" / "classifier" / "config.pbtxt")
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [1, 3, 48, 48]


def test_class_names_of_several_lines_are_refused(exported, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(exported / "export", tmp_path / "export"))
    read = repository.read_model_spec
    monkeypatch.setattr(
        repository, "read_model_spec", lambda *a: replace(read(*a), class_names=("cat\ncup", "a", "b"))
    )
    with pytest.raises(BadInput, match=r"the class name 'cat\\ncup' is not one line"):
        write_repository(folder / "classifier.onnx", STATIC)


def test_flags(exported, tmp_path, capsys):
    out = ("--out", str(tmp_path / "out"))
    assert export(exported / "artifact", "--triton-preprocess", *out) == 2
    assert "--triton-preprocess has an effect on Triton only; add --to onnx,triton" in capsys.readouterr().err
    assert export(exported / "artifact", "--to", "onnx,tritn", *out) == 2
    assert "--to 'onnx,tritn': give some of onnx, tensorrt" in capsys.readouterr().err


def specification(rule: Preprocessing, precision: Precision = "fp32") -> ModelSpec:
    images = TensorSpec("images", "float32", ("batch", 3, "height", "width"))
    return ModelSpec("encoder", precision, (images,), (), rule, 16, None, "", {})


@pytest.mark.parametrize(
    "rule",
    [
        Preprocessing("centre-square", (48, 48), MEAN, STD),
        Preprocessing("centre-crop", (64, 224), MEAN, STD),
        Preprocessing("centre-crop", (224, 96), MEAN, STD, normalize_in_graph=True),
        pytest.param(Preprocessing("centre-square", (600, 600), MEAN, STD), marks=pytest.mark.slow),
        Preprocessing("keep-ratio", (64, 256), MEAN, STD),
        pytest.param(Preprocessing("keep-ratio", (800, 1344), MEAN, STD), marks=pytest.mark.slow),
        Preprocessing("none", None, MEAN, STD),
    ],
    ids=lambda rule: f"{rule.resize}-{rule.size}",
)
def test_preprocessing_is_ours(rule, monkeypatch):
    graph = preprocessing_graph(specification(rule))
    runtime = type("Runtime", (), {"spec": replace(specification(rule), graph="detector")})()
    monkeypatch.setattr(preprocessing_check, "open_onnx", lambda path: runtime)
    odd = data.chelsea()[:37], data.rocket()[:, :101], data.coffee()[:48, :48], data.astronaut()[:1, :7]
    pictures = [data.astronaut(), data.coffee(), *odd]
    errors = compare_preprocessing(graph, Path("x.onnx"), pictures[: 2 if rule.size == (800, 1344) else 6])
    assert errors.largest <= 2.1 and errors.mean < 0.03
    enlarged = rule.size == (600, 600)  # which antialiasing does not change
    for fault in ("mean", "cubic_coeff_a", "rows", *["antialias"] * (not enlarged)):
        wrong = onnx.ModelProto()
        wrong.CopyFrom(graph)
        if not plant(wrong, fault):
            continue
        with pytest.raises(CheckFailed, match=r"levels|preprocessing gives"):
            compare_preprocessing(wrong, Path("x.onnx"), pictures[:3])
    with pytest.raises(BadInput, match="takes images of 8 bits"):
        compare_preprocessing(graph, Path("x.onnx"), [np.zeros((9, 9, 3), np.uint16)])


def plant(model: onnx.ModelProto, fault: str) -> bool:
    """Plants a fault; returns whether the graph has such a part."""
    found = False
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == fault == "cubic_coeff_a":
                attribute.f, found = -0.75, True
            elif attribute.name == fault == "antialias":
                attribute.i, found = 0, True
    for tensor in model.graph.initializer:
        if tensor.name == fault == "mean":
            tensor.float_data[0] += 0.05
            found = True
        elif tensor.name == fault == "rows":
            tensor.double_data[0] *= 1.5
            found = True
    return found


def test_models_of_one_size_that_keep_the_ratio_have_no_preprocessing():
    spec = specification(Preprocessing("keep-ratio", (64, 256), MEAN, STD))
    fixed = replace(spec, inputs=(replace(spec.inputs[0], axes=("batch", 3, 64, 96)),))
    with pytest.raises(BadInput, match="takes images of one size"):
        preprocessing_graph(fixed)
