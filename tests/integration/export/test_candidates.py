"""Files are made and gated one by one: what gets a name, what fails alone, what ends an export."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import export_files
import pytest
from export_files import VIT, Silent

from coma.errors import BadInput, CheckFailed, Interrupted
from coma.runtimes.manifest import NAME, Entry, Manifest, Selection
from coma.runtimes.model_spec import GraphKind
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import parse_shapes
from coma.runtimes.tensorrt.sidecar import sidecar_path
from export import gate, pipeline
from export.candidates import CandidateBuilder, layers_of, matches_any
from export.config import ExportConfig, ExportImages
from export.gate import Gate
from export.graphs.load import load_exportable
from export.image_sets import ImageSet
from export.pipeline import Outcome
from export.report import render
from export.verify.verdict import ParityResult

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself

FIXED = parse_shapes("2x3x64x64", 3)
PASSED, FAILED = ParityResult(1, {}, ()), ParityResult(1, {}, ("too far off",))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return export_files.classifier(tmp_path_factory.mktemp("classifier") / "artifact", VIT)


@pytest.fixture
def gated(tmp_path, classifier, monkeypatch) -> tuple[Gate, CandidateBuilder, Path]:
    """For engines, with a builder and a runtime that need no GPU."""
    config = ExportConfig(
        classifier, to="onnx,tensorrt", precision="fp32,fp16", out=tmp_path, benchmark_seconds=0
    )
    images = ExportImages(ImageSet(Selection("", 0, 0), ()))
    reference = TorchRuntime(load_exportable(classifier, "classifier"))
    spec = reference.spec

    def build(onnx_path, engine_path, *_):
        engine_path.write_text("new engine")
        sidecar_path(engine_path).write_text("new sidecar")

    monkeypatch.setattr("export.tensorrt.builder.build_engine", build)
    monkeypatch.setattr("coma.runtimes.tensorrt.profiles.profile_of", lambda *_: None)
    monkeypatch.setattr(gate, "read_spec", lambda _: spec)
    monkeypatch.setattr(
        "coma.runtimes.tensorrt.runtime.TensorRTRuntime",
        lambda *_, **__: SimpleNamespace(spec=spec, title="TensorRT"),
    )
    manifest = Manifest("artifact", spec.source, "classifier")
    builder = CandidateBuilder(config, images, "classifier", FIXED, Silent(), spec.source)
    return Gate(config, images, reference, FIXED, Silent(), manifest), builder, tmp_path / "classifier.onnx"


@pytest.mark.parametrize("text", ["1x64x64:1x64x64:4x64x64", "1x64x64:4x64x64:4x64x64", "2x64x64"])
def test_the_manifest_keeps_the_optimum(gated, tmp_path, text):
    judge, builder, path = gated
    judge.shapes = parse_shapes(text, 3)
    judge.reject(path, "fp32", builder, CheckFailed("too far off"))
    found = Manifest.read(tmp_path, "")
    assert found is not None and found.rejected[0].shape_range() == judge.shapes


def test_the_data_set_is_opened_once_for_all_files(gated, monkeypatch):
    judge, opened, measured = gated[0], [], []
    judge.config = replace(judge.config, dataset=Path("data"))
    judge.reference = SimpleNamespace(spec=SimpleNamespace(graph="detector"), title="PyTorch")

    def open_dataset(directory, data, *_):
        opened.append(data)
        return lambda run: {"AP": float(measured.append(run) or 1)}

    entry_point = SimpleNamespace(load=lambda: open_dataset)
    monkeypatch.setattr("export.verify.task_metrics.metadata.entry_points", lambda **_: [entry_point])
    found = [judge._metric(judge.reference) for _ in ("fp32", "fp16")]
    assert opened == [Path("data")] and len(measured) == 3
    assert found == [{"torch": {"AP": 1}, "file": {"AP": 1}}] * 2


def held(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*engine*")}


def test_an_engine_and_its_sidecar_get_their_names_together(gated, tmp_path, monkeypatch):
    each, builder, source = gated
    monkeypatch.setattr(gate, "verify", lambda *_, **__: FAILED)
    assert each.verify_engine(source, builder)
    refused = {"classifier.engine.rejected": "new engine", "classifier.engine.rejected.json": "new sidecar"}
    assert held(tmp_path) == refused
    monkeypatch.setattr(gate, "verify", lambda *_, **__: PASSED)
    assert not each.verify_engine(source, builder)
    builder.remove_temporary_files()
    assert held(tmp_path) == {"classifier.engine": "new engine", "classifier.engine.json": "new sidecar"}


def test_an_engine_that_is_not_finished_leaves_nothing(gated, tmp_path, monkeypatch):
    each, builder, source = gated

    def fails(*_, **__):
        raise CheckFailed("out of memory")

    monkeypatch.setattr(gate, "verify", fails)
    with pytest.raises(CheckFailed):
        each.verify_engine(source, builder)
    builder.remove_temporary_files()
    assert held(tmp_path) == {}


def test_an_engine_is_recorded_after_its_sidecar_is_in_place(gated, tmp_path, monkeypatch):
    each, builder, source = gated
    seen = []

    def replaces(path, target):
        if Path(target).name == NAME:
            seen.append(held(tmp_path))
        return original(path, target)

    original = Path.replace
    monkeypatch.setattr(gate, "verify", lambda *_, **__: PASSED)
    monkeypatch.setattr(Path, "replace", replaces)
    each.verify_engine(source, builder)
    assert [set(names) for names in seen] == [{"classifier.engine", "classifier.engine.json"}]


@pytest.fixture
def exporting_it(gated, monkeypatch):
    """Export in two precisions, with engines; whatever can be run passes."""
    each, _, _ = gated
    monkeypatch.setattr(gate, "verify", lambda *_, **__: PASSED)

    def export() -> tuple[Outcome, Manifest]:
        manifest, outcome = Manifest("artifact", each.reference.spec.source, "classifier"), Outcome()
        pipeline.export_graph(each.config, each.images, "classifier", FIXED, manifest, Silent(), outcome)
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
    def fails(model, precision, path):
        raise BadInput("a branch in 16 bits")

    monkeypatch.setattr("export.verify.opened_file.emulate", fails)
    outcome, manifest = exporting_it()
    assert outcome.refused == ["classifier-fp16.onnx: a branch in 16 bits"]
    assert names(manifest.files) == ["classifier.onnx", "classifier.engine"]
    assert names(manifest.rejected) == ["classifier-fp16.onnx.rejected"]
    assert manifest.rejected[0].bytes == (tmp_path / "classifier-fp16.onnx.rejected").stat().st_size


def test_images_that_one_file_does_not_take_are_its_fault_and_others_are_the_users(
    exporting_it, gated, monkeypatch
):
    def top1(runtime, *_):
        if runtime.title in unfit:
            raise BadInput("images 1x3x99x99: the engine takes 1x3x64x64")
        return {"top-1": 50.0}, Selection("labelled images", 2, 2)

    gated[0].images = replace(gated[0].images, labelled=object())
    monkeypatch.setattr(gate, "top1", top1)
    unfit = ("TensorRT",)
    outcome, manifest = exporting_it()
    assert len(outcome.refused) == 2 and outcome.refused[0].startswith("classifier.engine: images 1x3x99x99")
    assert names(manifest.files) == ["classifier.onnx", "classifier-fp16.onnx"]
    unfit = (gated[0].reference.title,)
    with pytest.raises(BadInput, match="images 1x3x99x99"):
        exporting_it()


@pytest.mark.parametrize("error", [BadInput("no TensorRT"), Interrupted("Ctrl-C"), KeyboardInterrupt()])
def test_what_is_not_about_one_file_ends_the_export(exporting_it, tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("export.tensorrt.builder.build_engine", fails)
    with pytest.raises(type(error)):
        exporting_it()
    assert {path.name for path in tmp_path.iterdir()} == {"classifier.onnx", "manifest.json"}


def test_patterns_of_layers_hold_in_the_graphs_that_have_them(tmp_path):
    artifact = export_files.pretrained(tmp_path / "artifact", VIT)
    layers = {
        graph: layers_of(load_exportable(artifact, graph).module) for graph in ("encoder", "reconstructor")
    }
    assert matches_any("*.decoder.head", layers["reconstructor"]) and not matches_any(
        "*.decoder.head", layers["encoder"]
    )
    assert not matches_any("*norm*", layers["encoder"])
    config = ExportConfig(artifact, exclude_layers=("*.fc2", "*.decoder.*"))

    def excluded(graph: GraphKind, **changes: Any) -> list[str]:
        images = ExportImages(ImageSet(Selection("", 0, 0), ()))
        return CandidateBuilder(
            replace(config, **changes), images, graph, FIXED, Silent(), ""
        )._excluded_layers()

    assert excluded("encoder") == ["*.fc2"]
    assert excluded("reconstructor") == ["*.fc2", "*.decoder.*"]
    assert excluded("encoder", normalize_in_graph=True) == ["model.*.fc2"]  # so the file names its layers
