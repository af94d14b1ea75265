"""`coma export` from artifact to report: what is kept, what is refused, and what it says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import export_files
import onnx
import pytest
import torch
from export_files import VIT
from PIL import Image
from skimage import data

from coma.artifact import load_artifact, save_artifact
from coma.cli import main
from coma.config import BeyondConfig
from coma.errors import BadInput
from coma.runtimes.manifest import Manifest
from coma.runtimes.model_spec import GraphKind
from coma.runtimes.open import open_runtime
from coma.runtimes.pytorch import TorchRuntime
from export import candidates, gate
from export.commands.benchmark import parse_size
from export.commands.export import run
from export.pipeline import default_shapes

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself

QUICK = ("--shapes", "1x48x48:2x48x48:4x48x48", "--benchmark-seconds", "0.01")


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


@pytest.mark.slow
def test_a_classifier_in_three_precisions(tmp_path, photographs, capsys, monkeypatch):
    measured = []

    def measures(runtime, *rest):
        measured.append(runtime)
        return top1(runtime, *rest)

    top1 = gate.top1
    monkeypatch.setattr(gate, "top1", measures)
    artifact = export_files.classifier(tmp_path / "run" / "artifact")
    images = ("--verify", photographs, "--calibrate", photographs)
    arguments = [artifact, "--precision", "fp32,fp16,int8", *images, *QUICK]
    run([str(argument) for argument in arguments])
    folder = tmp_path / "run" / "export"
    files = {"classifier.onnx", "classifier-fp16.onnx", "classifier-int8.onnx"}
    assert {path.name for path in folder.iterdir()} == files | {"manifest.json", "report.md", "report.png"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["precision"] for entry in manifest["files"]] == ["fp32", "fp16", "int8"]
    assert [isinstance(each, TorchRuntime) for each in measured] == [True, False, False, False]
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
    artifact = export_files.classifier(tmp_path / "artifact", export_files.VIT)

    def corrupt(exportable, shapes, path, *rest):
        layer = exportable.module.classifier.blocks[0].mlp.fc2
        layer.weight.data.mul_(-2)
        return written(exportable, shapes, path, *rest)

    written = candidates.write_onnx
    monkeypatch.setattr(candidates, "write_onnx", corrupt)
    assert main(["export", str(artifact), "--out", str(tmp_path / "out"), *QUICK]) == 1
    error = capsys.readouterr().err
    assert "classifier.blocks.0.mlp.fc2" in error and "refused" in error
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"classifier.onnx.rejected", "manifest.json", "report.md", "report.png"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["files"] == [] and manifest["rejected"][0]["file"] == "classifier.onnx.rejected"
    assert "## Refused" in (tmp_path / "out" / "report.md").read_text()
    onnx.load_model_from_string((tmp_path / "out" / "classifier.onnx.rejected").read_bytes())

    monkeypatch.setattr(candidates, "write_onnx", written)  # the next try replaces it
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
        (["--graph", "reconstructor"], "is a classifier"),
        (["--verify", "nowhere"], "nowhere"),
        (["--verify-images", "0"], "--verify-images 0"),
        (["--to", "onnx,tensorrt"], "TensorRT|tensorrt|GPU"),
        (["--benchmark-seconds", "nan"], "--benchmark-seconds nan"),
        (["--benchmark-seconds", "inf"], "--benchmark-seconds inf"),
        (["--benchmark-seconds=-1"], "--benchmark-seconds -1"),
        (["--calibrate", "."], "--calibrate has an effect on int8 and fp8 only"),
        (["--exclude-layers", "none"], "--exclude-layers has an effect on int8 and fp8 only"),
        (["--builder-level", "5"], "--builder-level has an effect on engines only; add --to onnx,tensorrt"),
        (["--dataset", "."], "--dataset measures detectors and segmentors, .* is a classifier; --verify"),
        (["--precision", "int8", "--calibrate", "x", "--exclude-layers", "*.fc9"], r"'\*\.fc9': no layer"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(tmp_path, arguments, message, capsys):
    artifact = export_files.classifier(tmp_path / "artifact")
    if "onnx,tensorrt" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BadInput, match=message):
        run([str(artifact), *arguments, "--out", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out/*.onnx*"))


@pytest.fixture
def undecoded(monkeypatch) -> None:
    """Fails where images are decoded."""

    def decodes(*_) -> None:
        raise AssertionError("images are decoded")

    monkeypatch.setattr("export.image_sets.read_image_set", decodes)


@pytest.mark.parametrize("command", ["export", "benchmark"])
@pytest.mark.parametrize("place", ["taken", "taken/below", "x" * 300])
def test_a_place_that_cannot_be_written_to_is_refused_at_once(tmp_path, place, command, capsys, undecoded):
    artifact = export_files.classifier(tmp_path / "artifact", VIT)
    (tmp_path / "taken").touch()
    out = tmp_path / place / ("" if command == "export" else "results.json")
    assert main([command, str(artifact), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"error: --out {tmp_path / place}" in error
    assert "cannot be written to (" in error or "is a file; give a folder" in error


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_classes_that_the_model_does_not_know_are_refused_at_once(
    tmp_path, photographs, precision, undecoded
):
    artifact = export_files.classifier(tmp_path / "artifact", VIT)
    (photographs / "cat").rename(photographs / "dog")
    more = ("--calibrate", str(photographs)) if precision == "int8" else ()
    try:
        with pytest.raises(BadInput, match="does not have the classes dog; it has cat, cup, face"):
            run([str(artifact), "--verify", str(photographs), "--precision", precision, *more])
    finally:
        (photographs / "dog").rename(photographs / "cat")


def test_fewer_labelled_images_than_a_fixed_batch_are_refused_at_once(tmp_path, photographs, undecoded):
    artifact = export_files.classifier(tmp_path / "artifact", VIT)
    with pytest.raises(BadInput, match="top-1 on 9 images is fewer than one batch of 16"):
        run([str(artifact), "--verify", str(photographs), "--shapes", "16x48x48"])
    splits = tmp_path / "splits"  # top-1 is that of images which nobody trained on
    shutil.copytree(photographs, splits / "train")
    shutil.copytree(photographs / "cat", splits / "test" / "cat")
    with pytest.raises(BadInput, match="top-1 on 3 images is fewer than one batch of 4"):
        run([str(artifact), "--verify", str(splits), "--shapes", "4x48x48"])


def test_bundled_photographs_do_not_fit_five_channels(tmp_path, undecoded):
    config = export_files.about("backbone", replace(VIT, channels=5), mean=(0.5,) * 5, std=(0.2,) * 5)
    save_artifact(tmp_path / "artifact", tensors={}, config=config)
    with pytest.raises(BadInput, match="takes 5 channels, and the bundled photographs have 3; give"):
        run([str(tmp_path / "artifact")])


@pytest.mark.parametrize(
    ("kind", "dataset", "shapes", "message"),
    [
        ("segmentor", ".", "1x64x64", "--shapes needs a dynamic height and width and a minimum batch of 1"),
        ("detector", ".", "1x64x64:1x64x64:1x96x64", "needs a dynamic height and width"),
        ("detector", ".", "2x64x64:2x64x64:2x96x96", "minimum batch of 1; the shapes are 2 x 64 x 64"),
        ("detector", "nowhere", "1x64x64:1x64x64:1x96x96", "--dataset nowhere: no such file"),
        ("backbone", ".", "1x64x64", "measures detectors and segmentors, .* is a backbone$"),
    ],
)
def test_a_metric_that_cannot_be_taken_is_refused(tmp_path, kind, dataset, shapes, message, undecoded):
    config = export_files.about(kind, VIT)  # refused before the model is rebuilt
    save_artifact(tmp_path / "artifact", tensors={}, config=config)
    with pytest.raises(BadInput, match=message):
        run([str(tmp_path / "artifact"), "--dataset", dataset, "--shapes", shapes])


def test_exports_of_another_artifact_are_not_mixed_in(tmp_path):
    Manifest("a", "hash", "classifier").write(tmp_path)
    with pytest.raises(BadInput, match="another artifact"):
        Manifest.of(tmp_path, "b", "other", "classifier")
    plain = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**plain, "format_version": 1}))
    with pytest.raises(BadInput, match="format 1, but this version reads format 3; choose another --out"):
        Manifest.of(tmp_path, "a", "hash", "classifier")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="not readable"):
        Manifest.of(tmp_path, "a", "hash", "classifier")


def test_default_shapes_follow_the_kind(tmp_path):
    config = load_artifact(export_files.classifier(tmp_path / "c")).config
    shapes = default_shapes(config, "classifier")
    assert shapes.dynamic == {"batch"} and shapes.opt.height == 48
    config = load_artifact(export_files.segmentor(tmp_path / "s")).config
    assert default_shapes(config, "segmentor").dynamic == {"batch", "height", "width"}


@pytest.mark.slow
def test_a_model_that_zooms_in_rebuilds_its_whole_views(tmp_path):
    """The encoder saw 48 px; the decoder rebuilds the view around them, 80."""
    method = BeyondConfig("zoom-in+mask", decoder=export_files.OBJECTIVE.decoder)
    artifact = export_files.pretrained(tmp_path / "artifact", method=method)
    run([str(artifact), "--verify-images", "2", "--benchmark-seconds", "0"])
    sides: dict[GraphKind, int] = {"encoder": 48, "reconstructor": 80}
    for graph, side in sides.items():
        runtime = open_runtime(tmp_path / "export" / f"{graph}.onnx", "cpu")
        assert runtime.spec.inputs[0].axes[2:] == (side, side)
        assert runtime.spec.preprocessing.size == (side, side)
        config = load_artifact(artifact).config
        assert parse_size(None, config, graph) == (side, side)
