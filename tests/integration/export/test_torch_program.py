"""`--to pt2` and `--to aoti`: programs of PyTorch itself, behind the same gate as all files."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from export_files import VIT, backbone, classifier, export, pretrained, segmentor
from gate_cases import FREE

import coma
from coma.cli import main
from coma.errors import BadInput
from coma.runtimes.find import open_model
from coma.runtimes.manifest import Manifest
from coma.runtimes.model_spec import METADATA, to_json
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shape
from coma.runtimes.torch_program import SPEC_FILE, TorchProgramRuntime, read_program_spec
from export import torch_program
from export.graphs.load import load_exportable
from export.onnx_export import with_normalization
from export.verify.parity import batch_inputs

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter and compiler have many

KINDS: dict[str, tuple[Any, Any]] = {
    "encoder": (backbone, VIT),
    "reconstructor": (pretrained, VIT),
    "classifier": (classifier, VIT),
}
SLOW_KINDS = {
    "reconstructor of a DyViT": ("reconstructor", pretrained),
    "segmentor": ("segmentor", segmentor),
}


def errors_of(artifact: Path, graph: Any, folder: Path, shapes=FREE, compile_for=None) -> dict[str, float]:
    """Largest difference between a program and its model at every corner of its shapes."""
    path = folder / "it.pt2"
    spec = torch_program.write_program(load_exportable(artifact, graph), shapes, path, compile_for)
    program, model = TorchProgramRuntime(path), TorchRuntime(load_exportable(artifact, graph))
    assert program.spec == spec
    pictures = [torch.randint(0, 256, (90, 70, 3), dtype=torch.uint8).numpy() for _ in range(3)]
    worst = {}
    for shape in (shapes.min, shapes.opt, shapes.max, Shape(3, 96, 32)):
        inputs = batch_inputs(spec, pictures, [i % 3 for i in range(shape.batch)], shape.height, shape.width)
        ours, theirs = model(**inputs), program(**inputs)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype
            error = (ours[name].double() - theirs[name].double()).nan_to_num().norm()
            worst[f"{name} at {shape}"] = float(error / ours[name].double().nan_to_num().norm().clamp(min=1))
    return worst


@pytest.mark.parametrize("graph", KINDS)
def test_a_program_takes_all_shapes(graph, tmp_path):
    make, model = KINDS[graph]
    assert max(errors_of(make(tmp_path / "a", model), graph, tmp_path).values()) < 2e-6


@pytest.mark.slow
@pytest.mark.openmmlab
@pytest.mark.parametrize("name", SLOW_KINDS)
def test_programs_of_hierarchical_encoders_take_all_shapes(name, tmp_path):
    graph, make = SLOW_KINDS[name]
    assert max(errors_of(make(tmp_path / "a"), graph, tmp_path).values()) < 2e-6


@pytest.mark.slow
def test_a_compiled_program_takes_all_shapes_and_knows_its_cpu(tmp_path, monkeypatch):
    artifact = backbone(tmp_path / "a", VIT)
    assert max(errors_of(artifact, "encoder", tmp_path, compile_for="cpu").values()) < 2e-6
    assert read_program_spec(tmp_path / "it.pt2")[1]
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", lambda: "none")
    with pytest.raises(BadInput, match="needs a CPU with"):
        TorchProgramRuntime(tmp_path / "it.pt2")


def test_normalisation_in_the_graph_takes_pixels(tmp_path):
    exportable = with_normalization(load_exportable(pretrained(tmp_path / "a", VIT), "reconstructor"))
    torch_program.write_program(exportable, FREE, tmp_path / "it.pt2")
    program = TorchProgramRuntime(tmp_path / "it.pt2")
    inputs = {
        "images": torch.randint(0, 256, (2, 3, 48, 32), dtype=torch.uint8),
        "visible": torch.rand(2, 3, 2) < 0.5,
    }
    ours = TorchRuntime(exportable)(**inputs)
    for name, values in program(**inputs).items():
        torch.testing.assert_close(values, ours[name])


# The command


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Artifact whose folder of exports holds ONNX files and programs in fp32 and fp16."""
    artifact = classifier(tmp_path_factory.mktemp("run") / "artifact", VIT)
    assert export(artifact, "--to", "onnx,pt2", "--precision", "fp32,fp16") == 0
    return artifact


def test_programs_stand_in_the_manifest_and_open_everywhere(exported, capsys):
    folder = exported.parent / "export"
    entries = {entry.file: entry for entry in Manifest.read(folder, "").files}  # type: ignore[union-attr]
    assert set(entries) == {
        "classifier.onnx",
        "classifier.pt2",
        "classifier-fp16.onnx",
        "classifier-fp16.pt2",
    }
    assert all(entry.verification["failures"] == [] for entry in entries.values())
    assert entries["classifier.pt2"].runtime.startswith("torch ")
    images = torch.randn(1, 3, 48, 48)
    wanted = coma.open_runtime(exported)(images)["logits"]
    opened = coma.open_runtime(folder / "classifier.pt2")
    torch.testing.assert_close(opened(images)["logits"], wanted)
    torch.testing.assert_close(open_model(exported, "classifier", "pt2", "cpu")(images)["logits"], wanted)
    with pytest.raises(BadInput, match="the classifier takes images"):
        opened(torch.randn(1, 3, 32, 48))
    assert main(["info", str(folder / "classifier.pt2")]) == 0
    assert "PyTorch program of torch.export" in capsys.readouterr().out
    assert main(["benchmark", str(exported), "--benchmark-seconds", "0.1", "--batch", "1"]) == 0
    assert "classifier.pt2" in capsys.readouterr().out


def test_a_wrong_program_is_refused(tmp_path, monkeypatch, caplog):
    artifact = classifier(tmp_path / "artifact", VIT)
    write = torch_program.write_program

    def broken(exportable, *others):
        with torch.no_grad():
            next(p for p in exportable.module.parameters() if p.shape[0] == 3).mul_(
                1.001
            )  # the kind of fault that no eye would see
        return write(exportable, *others)

    monkeypatch.setattr(torch_program, "write_program", broken)
    assert export(artifact, "--to", "onnx,pt2") == 1
    manifest = Manifest.read(tmp_path / "export", "")
    assert [entry.file for entry in manifest.rejected] == ["classifier.pt2.rejected"]  # type: ignore[union-attr]
    assert not (tmp_path / "export" / "classifier.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "onnx,pt2", "--precision", "int8", "--calibrate", "."], "are forms of ONNX files"),
        (["--to", "onnx,aoti"], "needs a C++ compiler"),
    ],
)
def test_what_cannot_be_written_is_said_first(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch_program, "COMPILERS", ("no-such-compiler",))
    assert export(classifier(tmp_path / "artifact", VIT), *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


# Files of strangers


def test_a_program_opens_only_beside_its_manifest(exported, tmp_path):
    shutil.copy(exported.parent / "export" / "classifier.pt2", tmp_path / "classifier.pt2")
    with pytest.raises(BadInput, match=r"opening a \.pt2 file may run code"):
        coma.open_runtime(tmp_path / "classifier.pt2")


def test_a_changed_program_is_refused(exported, tmp_path):
    folder = Path(shutil.copytree(exported.parent / "export", tmp_path / "export"))
    with zipfile.ZipFile(folder / "classifier.pt2", "a") as archive:
        archive.writestr("more", "text")
    with pytest.raises(BadInput, match="has changed since its verification"):
        coma.open_runtime(folder / "classifier.pt2")


@pytest.mark.parametrize("content", [b"", b"not a zip", "other", "list", "huge", "half"])
def test_a_foreign_program_is_one_line(content, exported, tmp_path):
    path = tmp_path / "it.pt2"
    spec = to_json(read_program_spec(exported.parent / "export" / "classifier.pt2")[0])
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "half":
        whole = (exported.parent / "export" / "classifier.pt2").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        texts = {"other": json.dumps({METADATA: 3}), "list": "[1]", "huge": spec + " " * 2**25}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"it/extra/{SPEC_FILE}", texts[content])
    with pytest.raises(BadInput, match=r"it\.pt2"):
        read_program_spec(path)
