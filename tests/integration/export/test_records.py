"""What a folder of exports says of itself: whose files they are, what was refused, what was found, where."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_files
import onnx
import pytest
from export_files import VIT
from PIL import Image

from coma.artifact import ArtifactConfig, load_artifact, save_artifact
from coma.artifact.load import artifact_hash
from coma.cli import main
from coma.config.serialization import to_plain
from coma.errors import BadInput, CheckFailed
from coma.paths import exports_beside
from coma.runtimes.manifest import Entry, Manifest
from coma.runtimes.open import open_runtime
from coma.runtimes.shape_ranges import parse_shapes
from demo.runtimes import exported_files
from export import candidates, gate, pipeline
from export.benchmark import list_exports
from export.candidates import fit_preprocessing, layers_of, read_spec
from export.commands.export import run
from export.graphs.load import load_exportable, preprocessing_of
from export.preprocessing import Photographs
from export.quantization.qdq import weight_matmuls
from export.report import render, write_report
from export.verify.verdict import ParityResult

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself

FIXED = parse_shapes("2x3x64x64", 3)
PASSED, FAILED = ParityResult(1, {}, ()), ParityResult(1, {}, ("too far off",))


def entry(file: str, **changes: Any) -> Entry:
    known = {
        "file": file,
        "graph": "classifier",
        "precision": "fp32",
        "runtime": "some",
        "sha256": "",
        "bytes": 100,
        "parameters": 1,
        "shapes": [],
        "tolerances": {},
        "verification": {"outputs": {}, "failures": ["too far off"]},
        "images": "6 images of scikit-image",
        "machine": "this machine",
        "versions": {"torch": "2"},
    }
    return Entry(**known | changes)


def rows(p50: float, shape: str = "1 x 48 x 48") -> list[dict[str, Any]]:
    """Returns the latencies of a file and of PyTorch, which takes ten times as long."""
    found = [{"shape": shape, "what": what} for what in ("compute", "end to end")]
    timed = (("some", p50), ("torch", 10 * p50))
    return [row | {"p50": time, "runtime": runtime} for row in found for runtime, time in timed]


def changed(artifact: Path, folder: Path, **changes: Any) -> Path:
    """The same weights, to the byte, described otherwise."""
    shutil.copytree(artifact, folder)
    config = replace(load_artifact(artifact).config, **changes)
    (folder / "config.json").write_text(json.dumps(to_plain(config)))
    return folder


def test_of_two_shapes_in_an_older_manifest_the_timed_one_is_the_optimum():
    listed = ["1 x 48 x 48", "4 x 48 x 48"]
    for timed, optimum in ((listed[:1], 1), (listed, 4), ([], 1)):
        old = entry("a.onnx", shapes=listed, latency=[{"shape": shape} for shape in timed])
        assert old.shape_range().opt.batch == optimum


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return export_files.classifier(tmp_path_factory.mktemp("classifier") / "artifact", VIT)


def test_a_refused_file_leaves_the_older_one_and_nothing_is_made_of_it(tmp_path, classifier, monkeypatch):
    out = tmp_path / "out"
    arguments = ["export", str(classifier), "--out", str(out), "--benchmark-seconds", "0"]
    assert main([*arguments, "--shapes", "1x48x48"]) == 0
    older, listed = (out / "classifier.onnx").read_bytes(), json.loads((out / "manifest.json").read_text())
    products = list(weight_matmuls(onnx.load(out / "classifier.onnx").graph))
    assert {each.layer for each in products} <= layers_of(load_exportable(classifier, "classifier").module)

    def corrupt(exportable, shapes, path, *rest):
        if candidates.UNVERIFIED in path.name:  # not the one that int8 is made of
            exportable.module.classifier.head.weight.data.mul_(-2)
        return written(exportable, shapes, path, *rest)

    written = candidates.write_onnx
    monkeypatch.setattr(candidates, "write_onnx", corrupt)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i in range(3):
        Image.fromarray(Photographs().read(i, 3)[:200, :200]).save(photographs / f"{i}.png")
    more = ("--shapes", "1x64x64", "--precision", "fp32,int8", "--calibrate", str(photographs))
    more += ("--verify-images", "3", "--calibrate-images", "3")
    assert main([*arguments, *more, "--verify", str(photographs)]) == 1
    names = {path.name for path in out.iterdir()} - {"manifest.json", "report.md", "report.png"}
    assert names == {"classifier.onnx", "classifier.onnx.rejected", "classifier-int8.onnx"}
    assert (out / "classifier.onnx").read_bytes() == older
    manifest = json.loads((out / "manifest.json").read_text())
    assert [each["file"] for each in manifest["files"]] == ["classifier.onnx", "classifier-int8.onnx"]
    assert manifest["files"][0] == listed["files"][0]
    assert [each["file"] for each in manifest["rejected"]] == ["classifier.onnx.rejected"]
    spec = read_spec(out / "classifier-int8.onnx")
    assert spec.inputs[0].axes == (1, 3, 64, 64) and spec.preprocessing.size == (64, 64)
    report = (out / "report.md").read_text()
    assert "- `classifier.onnx`: 6 images of scikit-image; " in report
    assert f"- `classifier-int8.onnx`, `classifier.onnx.rejected`: 3 images of {photographs}; " in report


def test_an_artifact_of_an_odd_size_is_exported_and_prepared_at_that_size(tmp_path, classifier):
    artifact = changed(classifier, tmp_path / "artifact", image_size=50)
    assert main(["export", str(artifact), "--benchmark-seconds", "0"]) == 0
    spec = read_spec(tmp_path / "export" / "classifier.onnx")
    assert spec.inputs[0].axes == ("batch", 3, 50, 50) and spec.preprocessing.size == (50, 50)


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ("1x3x48x48:2x3x48x48:4x3x48x48", (48, 48)),
        ("1x3x32x32:1x3x64x64:1x3x96x96", (48, 48)),
        ("1x3x64x64", (64, 64)),
        ("1x3x64x32:1x3x64x64:1x3x64x96", (64, 64)),
        ("1x3x64x64:1x3x80x80:1x3x96x96", (80, 80)),
    ],
)
def test_images_are_prepared_for_a_size_that_the_file_takes(classifier, shapes, size):
    found = fit_preprocessing(load_exportable(classifier, "classifier"), parse_shapes(shapes, 3))
    assert found.spec.preprocessing.size == size


@pytest.mark.parametrize(("channels", "order"), [(1, "grey"), (3, "RGB"), (5, "as stored")])
def test_only_three_channels_are_called_red_green_and_blue(channels, order):
    mean, std = (0.5,) * channels, (0.2,) * channels
    config = export_files.about("backbone", replace(VIT, channels=channels), mean=mean, std=std)
    assert preprocessing_of(config).channel_order == order


def of_pipeline(*steps: str, **pixels: Any) -> ArtifactConfig:
    head = {"model": {"data_preprocessor": pixels}, "pipeline": [{"type": name} for name in steps]}
    return export_files.about("segmentor", VIT, class_names=("a",), head=head)


@pytest.mark.parametrize("step", ["CLAHE", "mmseg.RGB2Gray", "Pad", "AdjustGamma"])
@pytest.mark.parametrize("graph", ["segmentor", "encoder"])
def test_pipelines_that_change_pixels_otherwise_are_refused_by_name(step, graph):
    config = of_pipeline("LoadImageFromFile", step, "PackSegInputs", bgr_to_rgb=True)
    with pytest.raises(BadInput, match=f"the pipeline step {step.removeprefix('mmseg.')} of test images"):
        preprocessing_of(config, graph)


@pytest.mark.parametrize("pixels", [{}, {"bgr_to_rgb": False}])
def test_models_that_take_bgr_are_refused(pixels):
    with pytest.raises(BadInput, match="takes pixels in BGR"):
        preprocessing_of(of_pipeline("ReadImage", "PackSegInputs", **pixels), "segmentor")
    rule = preprocessing_of(of_pipeline("mmseg.ReadImage", "PackSegInputs", bgr_to_rgb=True), "segmentor")
    assert rule.channel_order == "RGB" and rule.resize == "none"


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"mean": (0.1, 0.1, 0.1)}, False),
        ({"class_names": ("cat", "dog", "face")}, False),
        ({"head": {"type": "linear", "pool": "max"}}, False),
        ({"image_size": 64}, False),
        ({"trained": {"steps": 7}, "versions": {"torch": "3"}}, True),
    ],
)
def test_an_artifact_is_known_by_all_that_changes_its_answers(tmp_path, classifier, changes, same):
    other = changed(classifier, tmp_path / "other", **changes)
    assert (artifact_hash(other) == artifact_hash(classifier)) == same
    Manifest("artifact", artifact_hash(classifier), "classifier").write(tmp_path)
    if same:
        Manifest.of(tmp_path, "artifact", artifact_hash(other), "classifier")
        return
    with pytest.raises(BadInput, match="of another artifact"):
        Manifest.of(tmp_path, "artifact", artifact_hash(other), "classifier")


def test_other_weights_are_another_artifact(tmp_path, classifier):
    known = load_artifact(classifier)
    tensors = {name: tensor + 1 for name, tensor in known.tensors.items()}
    save_artifact(tmp_path / "other", tensors=tensors, config=known.config)
    assert artifact_hash(tmp_path / "other") != artifact_hash(classifier)


def test_the_same_weights_written_again_are_the_same_artifact(tmp_path, classifier):
    known = load_artifact(classifier)
    hashes = set()
    for _ in range(20):  # safetensors writes the facts in its header in an order that is drawn anew
        save_artifact(tmp_path / "again", tensors=known.tensors, config=known.config)
        hashes.add(artifact_hash(tmp_path / "again"))
    assert hashes == {artifact_hash(classifier)}


def test_a_manifest_of_another_version_is_refused_by_whoever_reads_it(tmp_path, classifier):
    (tmp_path / "classifier.onnx").touch()
    Manifest("artifact", artifact_hash(classifier), "classifier").write(tmp_path)
    plain = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**plain, "format_version": 1}))
    readers = (
        lambda: Manifest.of(tmp_path, "artifact", artifact_hash(classifier), "classifier"),
        lambda: list_exports(tmp_path, classifier, "classifier", required=True),
        lambda: open_runtime(tmp_path / "classifier.onnx"),
        lambda: list(exported_files(tmp_path)),
    )
    for read in readers:
        with pytest.raises(BadInput, match=r"manifest\.json: format 1, but this version reads format 3; "):
            read()


def test_a_refused_file_is_listed_beside_one_that_passed_until_another_passes():
    manifest = Manifest("artifact", "", "classifier")
    manifest.add(entry("classifier.onnx", bytes=1), passed=True)
    for size in (2, 3):
        manifest.add(entry("classifier.onnx.rejected", bytes=size), passed=False)
    assert ([each.bytes for each in manifest.files], [each.bytes for each in manifest.rejected]) == ([1], [3])
    manifest.add(entry("classifier.onnx", bytes=4), passed=True)
    assert ([each.bytes for each in manifest.files], manifest.rejected) == ([4], [])


def test_the_report_says_by_file_where_it_was_measured_if_not_all_were_alike():
    manifest = Manifest("artifact", "", "classifier")
    for file in ("a.onnx", "b.onnx"):
        manifest.add(entry(file), passed=True)
    assert "6 images of scikit-image; this machine; torch 2\n" in render(manifest)
    manifest.add(entry("c.onnx", machine="another", versions={"torch": "3"}), passed=True)
    report = render(manifest)
    assert "- `a.onnx`, `b.onnx`: 6 images of scikit-image; this machine; torch 2\n" in report
    assert "- `c.onnx`: 6 images of scikit-image; another; torch 3\n" in report


def errors(relative: float | None, agreement: float | None = None) -> dict[str, float | None]:
    numbers = dict.fromkeys(("cosine", "relative", "max", "mean", "p99.9"), relative)
    return {**numbers, "agreement": agreement}


def test_the_report_says_and_draws_the_error_at_every_shape(tmp_path):
    verification = {
        "outputs": {"logits": errors(3e-5), "pooled": errors(2e-6), "classes": errors(None, 0.75)},
        "by_shape": {
            "1 x 48 x 48": {"logits": errors(1e-6), "pooled": errors(2e-6), "classes": errors(None, 1.0)},
            "2 x 96 x 32": {"logits": errors(3e-5), "classes": errors(None, 0.5)},
        },
        "failures": [],
    }
    manifest = Manifest("artifact", "", "classifier")
    numbers = dict.fromkeys(("p90", "p99", "images_per_second"), 1.0)
    latency = [row | numbers for row in rows(9.0)]
    manifest.add(entry("a.onnx", verification=verification, latency=latency), passed=True)
    report = write_report(manifest, tmp_path).read_text()
    assert "| `a.onnx` | 1 x 48 x 48 | 2e-06 | pooled | 100.00% | classes |" in report
    assert "| `a.onnx` | 2 x 96 x 32 | 3e-05 | logits | 50.00% | classes |" in report
    assert "](report.png)" in report
    with Image.open(tmp_path / "report.png") as picture:
        both = picture.size
    manifest.add(entry("a.onnx", verification=verification), passed=True)
    write_report(manifest, tmp_path)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size[0] < both[0]  # without latencies
    manifest.add(entry("a.onnx"), passed=True)
    assert "report.png" not in write_report(manifest, tmp_path).read_text()
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    ("size", "own", "fp32", "kept"),
    [
        (99, rows(9), rows(1), True),  # smaller
        (100, rows(1), rows(2), True),  # faster than the fp32 file
        (100, rows(3), rows(2), False),  # faster than PyTorch alone
        (100, rows(1), None, False),  # compared with nothing
        (100, rows(1), rows(2, "8 x 48 x 48"), False),
        (100, [], rows(2), False),
    ],
)
def test_a_quantised_file_is_smaller_or_faster_than_the_fp32_file(size, own, fp32, kept):
    plain = None if fp32 is None else entry("classifier.onnx", latency=fp32)
    found = gate._require_gain(
        PASSED, entry("classifier-int8.onnx", bytes=size, latency=own), "fp32", 100, plain
    )
    assert found.passed == kept
    assert kept or found.failures == ("neither smaller than the fp32 file nor faster",)


def test_what_was_refused_before_an_error_is_said_with_it_and_reported(tmp_path, monkeypatch):
    artifact = export_files.pretrained(tmp_path / "artifact", VIT)

    def fails(config, images, graph, shapes, manifest, listener, outcome):
        if graph == "reconstructor":
            raise BadInput("no room for it")
        manifest.add(entry("encoder.onnx.rejected"), passed=False)
        outcome.refused.append("encoder.onnx: too far off")

    monkeypatch.setattr(pipeline, "export_graph", fails)
    with pytest.raises(BadInput, match=r"(?s)no room for it.*refused.*encoder\.onnx: too far off"):
        run([str(artifact)])
    assert "- `encoder.onnx.rejected`: too far off" in (tmp_path / "export" / "report.md").read_text()


def test_rtx_checks_what_this_run_kept(tmp_path, classifier, monkeypatch):
    checked = []

    def keeps_fp16(config, images, graph, shapes, manifest, listener, outcome):
        (config.folder / "classifier.onnx").touch()  # of an earlier run
        outcome.kept.append(config.folder / "classifier-fp16.onnx")

    def check(path, profiles):
        checked.append(path.name)
        raise CheckFailed("does not parse")

    monkeypatch.setattr(pipeline, "export_graph", keeps_fp16)
    monkeypatch.setattr(pipeline, "read_spec", lambda path: load_exportable(classifier, "classifier").spec)
    monkeypatch.setattr("export.pipeline.profile_of", lambda *_: None)
    monkeypatch.setattr("coma.runtimes.tensorrt.discovery.require_package", lambda _: None)
    monkeypatch.setattr("export.tensorrt.rtx.check_rtx", check)
    arguments = (
        str(classifier),
        "--precision",
        "fp32,fp16",
        "--check",
        "rtx",
        "--out",
        str(tmp_path / "out"),
    )
    with pytest.raises(CheckFailed, match=r"classifier-fp16\.onnx: does not parse"):
        run(list(arguments))
    assert checked == ["classifier-fp16.onnx"]


def test_inside_an_artifact_files_lie_beside_it_and_carry_its_name(tmp_path, monkeypatch):
    artifact = export_files.classifier(tmp_path / "run" / "artifact", VIT)

    def keeps(config, images, graph, shapes, manifest, listener, outcome):
        manifest.add(entry("classifier.onnx"), passed=True)

    monkeypatch.setattr(pipeline, "export_graph", keeps)
    monkeypatch.chdir(artifact)
    run(["."])
    assert {path.name for path in artifact.iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "run" / "export" / "report.md").read_text().startswith("# Exports of artifact\n")
    assert exports_beside(Path()) == tmp_path / "run" / "export"
