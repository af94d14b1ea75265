"""`coma export` from artifact to report: what is kept, what is refused, and what it says."""

import json
from pathlib import Path

import export_files
import onnx
import pytest
import torch
from PIL import Image
from skimage import data

from export import making
from export.commands.export import default_shapes, run
from export.manifest import Manifest
from export.runtimes.open import open_runtime
from pretrain.cli import main
from pretrain.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself

QUICK = ("--shapes", "1x48x48:2x48x48:4x48x48", "--seconds", "0.01")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder for each of three classes."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, pixels in zip(
        export_files.CLASSES, (data.chelsea(), data.coffee(), data.astronaut()), strict=True
    ):
        (folder / name).mkdir()
        for number in range(3):
            crop = Image.fromarray(pixels).crop((40 * number, 0, 40 * number + 200, 200))
            crop.save(folder / name / f"{number}.png")
    return folder


def test_a_classifier_in_three_precisions(tmp_path, photographs, capsys):
    artifact = export_files.classifier(tmp_path / "run" / "artifact")
    images = ("--verify", photographs, "--calibrate", photographs)
    arguments = [artifact, "--precision", "fp32,fp16,int8", *images, *QUICK]
    run([str(argument) for argument in arguments])
    folder = tmp_path / "run" / "export"
    files = {"classifier.onnx", "classifier-fp16.onnx", "classifier-int8.onnx"}
    assert {path.name for path in folder.iterdir()} == files | {"manifest.json", "report.md"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["precision"] for entry in manifest["files"]] == ["fp32", "fp16", "int8"]
    sizes = [entry["bytes"] for entry in manifest["files"]]
    assert sizes[0] > max(sizes[1:])
    for entry in manifest["files"]:
        assert entry["verification"]["passed"] and entry["verification"]["images"] == 9
        assert entry["metric"]["torch"].keys() == {"top-1"}
        assert {row["what"] for row in entry["latency"]} == {"compute", "end to end"}
        assert (folder / entry["file"]).stat().st_size == entry["bytes"]
    report = (folder / "report.md").read_text()
    assert "`classifier-int8.onnx`" in report and "top-1" in report and "images/s" in report
    assert "kept    classifier-fp16.onnx" in capsys.readouterr().err
    pixels = torch.randn(3, 3, 48, 48)
    wanted, found = (open_runtime(path)(pixels)["logits"] for path in (artifact, folder / "classifier.onnx"))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_a_failed_gate_keeps_the_file_aside_and_names_the_layer(tmp_path, monkeypatch, capsys):
    artifact = export_files.classifier(tmp_path / "artifact")

    def corrupt(deployable, shapes, path):
        layer = deployable.module.classifier.stages[1].blocks[0].mlp.fc2
        layer.weight.data.mul_(-2)
        return written(deployable, shapes, path)

    written = making.write_onnx
    monkeypatch.setattr(making, "write_onnx", corrupt)
    assert main(["export", str(artifact), "--out", str(tmp_path / "out"), *QUICK]) == 1
    error = capsys.readouterr().err
    assert "classifier.stages.1.blocks.0.mlp.fc2" in error and "refused" in error
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"classifier.onnx.rejected", "manifest.json", "report.md"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["files"] == [] and manifest["rejected"][0]["file"] == "classifier.onnx.rejected"
    assert "## Refused" in (tmp_path / "out" / "report.md").read_text()
    onnx.load_model_from_string((tmp_path / "out" / "classifier.onnx.rejected").read_bytes())

    monkeypatch.setattr(making, "write_onnx", written)  # the next try replaces it
    assert main(["export", str(artifact), "--out", str(tmp_path / "out"), *QUICK]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [entry["file"] for entry in manifest["files"]] == ["classifier.onnx"]
    assert manifest["rejected"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx,coreml"], "--to 'onnx,coreml': give some of onnx, tensorrt"),
        (["--precision", "fp64"], "--precision 'fp64'"),
        (["--precision", "int8"], "int8 and fp8 need --calibrate"),
        (["--shapes", "1x5x48x48"], "5 channels"),
        (["--shapes", "1x8x48"], "smaller than the encoder's mask unit"),
        (["--form", "reconstructor"], "is a classifier"),
        (["--verify", "nowhere"], "nowhere"),
        (["--verify-images", "0"], "--verify-images 0"),
        (["--to", "onnx,tensorrt"], "TensorRT|tensorrt|GPU"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(tmp_path, arguments, message, capsys):
    artifact = export_files.classifier(tmp_path / "artifact")
    if "tensorrt" in arguments[1] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BadInput, match=message):
        run([str(artifact), *arguments, "--out", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out/*.onnx*"))


def test_exports_of_another_artifact_are_not_mixed_in(tmp_path):
    Manifest("a", "hash", "classifier").write(tmp_path)
    with pytest.raises(BadInput, match="another artifact"):
        Manifest.of(tmp_path, "b", "other", "classifier")
    plain = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**plain, "format_version": 1}))
    with pytest.raises(BadInput, match="of format 1, and this program writes 2; choose another --out"):
        Manifest.of(tmp_path, "a", "hash", "classifier")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="not readable"):
        Manifest.of(tmp_path, "a", "hash", "classifier")


def test_default_shapes_follow_the_kind(tmp_path):
    from pretrain.artifact import load_artifact

    config = load_artifact(export_files.classifier(tmp_path / "c")).config
    shapes = default_shapes(config)
    assert shapes.dynamic == {"batch"} and shapes.usual.height == 48
    config = load_artifact(export_files.segmentor(tmp_path / "s")).config
    assert default_shapes(config).dynamic == {"batch", "height", "width"}
