"""What a folder of exports says of itself: whose files they are, what was refused, what was found, where."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import export_files
import onnx
import pytest
from PIL import Image

from demo.runtimes import exported_files
from export import exporting, judging, making
from export.commands.export import run
from export.comparing import exported
from export.exporting import Outcome
from export.forms.load import artifact_hash, load_deployable, preprocessing_of
from export.images import Photographs
from export.judging import Judge
from export.making import Maker, describe, fits, fitted, layers_of
from export.manifest import Entry, Manifest
from export.quantization.graph import constant_products
from export.report import render
from export.request import folder_beside
from export.runtimes.open import open_runtime
from export.runtimes.pytorch import TorchRuntime
from export.shapes import parse_shapes
from export.tensorrt.sidecar import sidecar_path
from export.verify.check import Verdict
from pretrain.artifact import load_artifact, save_artifact
from pretrain.cli import main
from pretrain.config import ViTConfig
from pretrain.errors import BadInput, CheckFailed, Interrupted
from pretrain.plain import to_plain

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself

VIT = ViTConfig(patch=16, dim=16, depth=1, heads=2)
FIXED = parse_shapes("2x3x64x64", 3)
PASSED, FAILED = Verdict((), 1, {}, ()), Verdict((), 1, {}, ("too far off",))


class Silent:
    def step(self, title: str, done: int = 0, total: int | None = None) -> None: ...
    def say(self, line: str) -> None: ...


def entry(file: str, **changes: Any) -> Entry:
    known = {
        "file": file,
        "form": "classifier",
        "precision": "fp32",
        "runtime": "",
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
    """Of a file and of PyTorch, which takes ten times as long."""
    found = [{"shape": shape, "what": what} for what in ("compute", "end to end")]
    return [row | {"p50": p50 * slower} for row in found for slower in (1, 10)]


def changed(artifact: Path, folder: Path, **changes: Any) -> Path:
    """The same weights, to the byte, described otherwise."""
    shutil.copytree(artifact, folder)
    config = replace(load_artifact(artifact).config, **changes)
    (folder / "config.json").write_text(json.dumps(to_plain(config)))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return export_files.classifier(tmp_path_factory.mktemp("classifier") / "artifact", VIT)


def test_a_refused_file_leaves_the_older_one_and_nothing_is_made_of_it(tmp_path, classifier, monkeypatch):
    out = tmp_path / "out"
    arguments = ["export", str(classifier), "--out", str(out), "--seconds", "0"]
    assert main([*arguments, "--shapes", "1x48x48"]) == 0
    older, listed = (out / "classifier.onnx").read_bytes(), json.loads((out / "manifest.json").read_text())
    products = list(constant_products(onnx.load(out / "classifier.onnx").graph))
    assert {each.layer for each in products} <= layers_of(load_deployable(classifier, "classifier").module)

    def corrupt(deployable, shapes, path):
        if making.UNVERIFIED in path.name:  # not the one that int8 is made of
            deployable.module.classifier.head.weight.data.mul_(-2)
        return written(deployable, shapes, path)

    written = making.write_onnx
    monkeypatch.setattr(making, "write_onnx", corrupt)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i in range(3):
        Image.fromarray(Photographs().read(i, 3)[:200, :200]).save(photographs / f"{i}.png")
    more = ("--shapes", "1x64x64", "--precision", "fp32,int8", "--calibrate", str(photographs))
    assert main([*arguments, *more, "--verify", str(photographs)]) == 1
    names = {path.name for path in out.iterdir()} - {"manifest.json", "report.md"}
    assert names == {"classifier.onnx", "classifier.onnx.rejected", "classifier-int8.onnx"}
    assert (out / "classifier.onnx").read_bytes() == older
    manifest = json.loads((out / "manifest.json").read_text())
    assert [each["file"] for each in manifest["files"]] == ["classifier.onnx", "classifier-int8.onnx"]
    assert manifest["files"][0] == listed["files"][0]
    assert [each["file"] for each in manifest["rejected"]] == ["classifier.onnx.rejected"]
    about = describe(out / "classifier-int8.onnx")
    assert about.inputs[0].axes == (1, 3, 64, 64) and about.preprocessing.size == (64, 64)
    report = (out / "report.md").read_text()
    assert "- `classifier.onnx`: 6 images of scikit-image; " in report
    assert f"- `classifier-int8.onnx`, `classifier.onnx.rejected`: 3 images of {photographs}; " in report


def test_an_artifact_of_an_odd_size_is_exported_and_prepared_at_that_size(tmp_path, classifier):
    artifact = changed(classifier, tmp_path / "artifact", image_size=50)
    assert main(["export", str(artifact), "--seconds", "0"]) == 0
    about = describe(tmp_path / "export" / "classifier.onnx")
    assert about.inputs[0].axes == ("batch", 3, 50, 50) and about.preprocessing.size == (50, 50)


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
    found = fitted(load_deployable(classifier, "classifier"), parse_shapes(shapes, 3))
    assert found.description.preprocessing.size == size


@pytest.mark.parametrize(("channels", "order"), [(1, "grey"), (3, "RGB"), (5, "as stored")])
def test_only_three_channels_are_called_red_green_and_blue(channels, order):
    mean, std = (0.5,) * channels, (0.2,) * channels
    config = export_files.about("backbone", replace(VIT, channels=channels), mean=mean, std=std)
    assert preprocessing_of(config).channel_order == order


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
        lambda: exported(tmp_path, classifier, "classifier", required=True),
        lambda: open_runtime(tmp_path / "classifier.onnx"),
        lambda: list(exported_files(tmp_path)),
    )
    for read in readers:
        with pytest.raises(BadInput, match=r"manifest\.json: of format 1, and this program writes 2; "):
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
    found = judging._worth_it(PASSED, entry("classifier-int8.onnx", bytes=size, latency=own), 100, plain)
    assert found.passed == kept
    assert kept or found.failures == ("neither smaller than the fp32 file nor faster",)


def test_what_was_refused_before_an_error_is_said_with_it_and_reported(tmp_path, monkeypatch):
    artifact = export_files.pretrained(tmp_path / "artifact", VIT)

    def fails(request, form, shapes, manifest, watcher, outcome):
        if form == "reconstructor":
            raise BadInput("no room for it")
        manifest.add(entry("encoder.onnx.rejected"), passed=False)
        outcome.refused.append("encoder.onnx: too far off")

    monkeypatch.setattr(exporting, "export", fails)
    with pytest.raises(BadInput, match=r"(?s)no room for it.*refused.*encoder\.onnx: too far off"):
        run([str(artifact)])
    assert "- `encoder.onnx.rejected`: too far off" in (tmp_path / "export" / "report.md").read_text()


def test_rtx_checks_what_this_run_kept(tmp_path, classifier, monkeypatch):
    checked = []

    def keeps_fp16(request, form, shapes, manifest, watcher, outcome):
        (request.out / "classifier.onnx").touch()  # of an earlier run
        outcome.kept.append(request.out / "classifier-fp16.onnx")

    def check(path, profiles):
        checked.append(path.name)
        raise CheckFailed("does not parse")

    monkeypatch.setattr(exporting, "export", keeps_fp16)
    monkeypatch.setattr(
        making, "describe", lambda path: load_deployable(classifier, "classifier").description
    )
    monkeypatch.setattr("export.tensorrt.profiles.profile_of", lambda *_: None)
    monkeypatch.setattr("export.tensorrt.library.require_package", lambda _: None)
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

    def keeps(request, form, shapes, manifest, watcher, outcome):
        manifest.add(entry("classifier.onnx"), passed=True)

    monkeypatch.setattr(exporting, "export", keeps)
    monkeypatch.chdir(artifact)
    run(["."])
    assert {path.name for path in artifact.iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "run" / "export" / "report.md").read_text().startswith("# Exports of artifact\n")
    assert folder_beside(Path()) == tmp_path / "run" / "export"


@pytest.fixture
def judged(tmp_path, classifier, monkeypatch) -> tuple[Judge, Maker, Path]:
    """For engines, with a builder and a runtime that need no GPU."""
    request: Any = SimpleNamespace(
        artifact=classifier, out=tmp_path, engine=None, images="", pictures=(), seconds=0, labelled=None,
        precisions=("fp32", "fp16"), tensorrt=True, inside=False, device="cpu", most=9,
    )  # fmt: skip
    reference = TorchRuntime(load_deployable(classifier, "classifier"))
    about = reference.description

    def build(onnx_path, engine_path, *_):
        engine_path.write_text("new engine")
        sidecar_path(engine_path).write_text("new sidecar")

    monkeypatch.setattr("export.tensorrt.builder.build_engine", build)
    monkeypatch.setattr("export.tensorrt.profiles.profile_of", lambda *_: None)
    monkeypatch.setattr(judging, "describe", lambda _: about)
    monkeypatch.setattr(
        "export.runtimes.tensorrt.TensorRTRuntime",
        lambda *_, **__: SimpleNamespace(description=about, title="TensorRT"),
    )
    manifest = Manifest("artifact", "", "classifier")
    maker = Maker(request, "classifier", FIXED, Silent())
    return Judge(request, reference, FIXED, Silent(), manifest), maker, tmp_path / "classifier.onnx"


def held(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*engine*")}


def test_an_engine_and_its_sidecar_get_their_names_together(judged, tmp_path, monkeypatch):
    judge, maker, source = judged
    monkeypatch.setattr(judging, "verify", lambda *_: FAILED)
    assert judge.engine(source, maker)
    refused = {"classifier.engine.rejected": "new engine", "classifier.engine.rejected.json": "new sidecar"}
    assert held(tmp_path) == refused
    monkeypatch.setattr(judging, "verify", lambda *_: PASSED)
    assert not judge.engine(source, maker)
    maker.clean()
    assert held(tmp_path) == {"classifier.engine": "new engine", "classifier.engine.json": "new sidecar"}


def test_an_engine_that_is_not_finished_leaves_nothing(judged, tmp_path, monkeypatch):
    judge, maker, source = judged

    def fails(*_):
        raise CheckFailed("out of memory")

    monkeypatch.setattr(judging, "verify", fails)
    with pytest.raises(CheckFailed):
        judge.engine(source, maker)
    maker.clean()
    assert held(tmp_path) == {}


def test_an_engine_is_recorded_after_its_sidecar_is_in_place(judged, tmp_path, monkeypatch):
    judge, maker, source = judged
    seen = []

    def add(*_):
        seen.append(held(tmp_path))

    monkeypatch.setattr(judging, "verify", lambda *_: PASSED)
    monkeypatch.setattr(judge.manifest, "add", add)
    judge.engine(source, maker)
    assert "classifier.engine.json" in seen[0]


@pytest.fixture
def exporting_it(judged, monkeypatch):
    """Export in two precisions, with engines; whatever can be run passes."""
    judge, _, _ = judged
    monkeypatch.setattr(judging, "verify", lambda *_: PASSED)

    def export() -> tuple[Outcome, Manifest]:
        manifest, outcome = Manifest("artifact", "", "classifier"), Outcome()
        exporting.export(judge.request, "classifier", FIXED, manifest, Silent(), outcome)
        return outcome, manifest

    return export


def names(entries: list[Entry]) -> list[str]:
    return [each.file for each in entries]


def test_an_engine_that_cannot_be_built_is_refused_and_the_rest_is_made(exporting_it, tmp_path, monkeypatch):
    from export.tensorrt import builder

    def fails(onnx_path, *rest):
        if onnx_path.name == "classifier.onnx":
            raise CheckFailed("out of memory")
        build(onnx_path, *rest)

    build = builder.build_engine
    monkeypatch.setattr(builder, "build_engine", fails)
    outcome, manifest = exporting_it()
    assert [path.name for path in outcome.kept] == ["classifier.onnx", "classifier-fp16.onnx"]
    assert outcome.refused == ["classifier.engine: out of memory"]
    assert names(manifest.files) == ["classifier.onnx", "classifier-fp16.onnx", "classifier-fp16.engine"]
    assert names(manifest.rejected) == ["classifier.engine.rejected"]
    assert "- `classifier.engine.rejected`: out of memory" in render(manifest)
    assert set(held(tmp_path)) == {"classifier-fp16.engine", "classifier-fp16.engine.json"}


def test_a_file_that_cannot_be_loaded_is_refused_and_kept_for_a_look(exporting_it, tmp_path, monkeypatch):
    def fails(model, precision):
        raise BadInput("a branch in 16 bits")

    monkeypatch.setattr(judging, "emulate", fails)
    outcome, manifest = exporting_it()
    assert outcome.refused == ["classifier-fp16.onnx: a branch in 16 bits"]
    assert names(manifest.files) == ["classifier.onnx", "classifier.engine"]
    assert names(manifest.rejected) == ["classifier-fp16.onnx.rejected"]
    assert manifest.rejected[0].bytes == (tmp_path / "classifier-fp16.onnx.rejected").stat().st_size


def test_images_that_one_file_does_not_take_are_its_fault_and_others_are_the_users(
    exporting_it, judged, monkeypatch
):
    def top1(runtime, *_):
        if runtime.title in unfit:
            raise BadInput("images 1x3x99x99: the engine takes 1x3x64x64")
        return {"top-1": 50.0}

    judged[0].request.labelled = object()
    monkeypatch.setattr(judging, "top1", top1)
    unfit = ("TensorRT",)
    outcome, manifest = exporting_it()
    assert len(outcome.refused) == 2 and outcome.refused[0].startswith("classifier.engine: images 1x3x99x99")
    assert names(manifest.files) == ["classifier.onnx", "classifier-fp16.onnx"]
    unfit = (judged[0].reference.title,)
    with pytest.raises(BadInput, match="images 1x3x99x99"):
        exporting_it()


@pytest.mark.parametrize("error", [BadInput("no TensorRT"), Interrupted("Ctrl-C"), KeyboardInterrupt()])
def test_what_is_not_about_one_file_ends_the_export(exporting_it, tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr("export.tensorrt.builder.build_engine", fails)
    with pytest.raises(type(error)):
        exporting_it()
    assert {path.name for path in tmp_path.iterdir()} == {"classifier.onnx", "manifest.json"}


def test_patterns_of_layers_hold_in_the_forms_that_have_them(tmp_path):
    artifact = export_files.pretrained(tmp_path / "artifact", VIT)
    layers = {
        form: layers_of(load_deployable(artifact, form).module) for form in ("encoder", "reconstructor")
    }
    assert fits("*.decoder.head", layers["reconstructor"]) and not fits("*.decoder.head", layers["encoder"])
    assert not fits("*norm*", layers["encoder"])
    request: Any = SimpleNamespace(artifact=artifact, keep=("*.fc2", "*.decoder.*"), inside=False)
    assert Maker(request, "encoder", FIXED, Silent())._keep() == ["*.fc2"]
    assert Maker(request, "reconstructor", FIXED, Silent())._keep() == ["*.fc2", "*.decoder.*"]
    request.inside = True  # the file's layers are then those of `form`
    assert Maker(request, "encoder", FIXED, Silent())._keep() == ["form.*.fc2"]
