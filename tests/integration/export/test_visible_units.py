"""Graphs that take a list of visible units and compute these alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import export_files
import pytest
import torch
from export_files import DYVIT, VIT, export
from gate_cases import BATCHES, Case, Made
from graph_faults import Change, other_units
from tensorrt_files import needs_rtx

from coma.cli import main
from coma.config import BeyondConfig
from coma.errors import BadInput
from coma.runtimes.find import open_model
from coma.runtimes.manifest import Manifest
from coma.runtimes.model_spec import GraphKind, Precision
from coma.runtimes.onnx_file import read_onnx_file
from coma.runtimes.open import open_onnx, open_runtime
from coma.runtimes.tensorrt.profiles import profile_of
from demo.models import Models
from export.candidates import remove_unfinished
from export.config import file_name
from export.tensorrt.rtx import check_rtx

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself

LISTED = Case("reconstructor", "fp32", BATCHES, visible=5)  # of 16 units
ENCODER = Case("encoder", "fp32", BATCHES, visible=5)
FAULTS: dict[str, Change] = {
    "ignored": other_units(("Mul", 0), ("Add", range(5))),
    "shifted": other_units(("Add", 1), ("Mod", 16)),
    "one of another place": other_units(("Add", [0, 0, 0, 0, 1]), ("Mod", 16)),
    "of the first image": other_units(("Gather", [0] * 5)),
}


@pytest.fixture(scope="module")
def exported(once) -> Path:
    """An artifact and, beside it, one file of every graph, with a list of four units of nine."""

    def fill(folder: Path) -> None:
        artifact = export_files.pretrained(folder / "artifact", VIT)
        assert export(artifact, "--visible-units", "4", "--shapes", "1x48x48:2x48x48:3x48x48") == 0

    return once("visible", fill) / "artifact"


def lists(batch: int, count: int, units: int) -> torch.Tensor:
    return torch.stack([torch.randperm(units)[:count] for _ in range(batch)])


def check_parity(made: Made) -> None:
    assert made.judge(made.file).failures == ()
    spec, _ = read_onnx_file(made.file)
    assert spec.visible_units == made.case.visible
    runtime = open_onnx(made.file, threads=1)
    for batch in (1, 2, 3, 5):
        inputs = {
            "images": torch.randn(batch, 3, 64, 64),
            "visible": lists(batch, made.case.visible or 0, 16),
        }
        for name, wanted in made.reference(**inputs).items():
            found = runtime(**inputs)[name]
            assert wanted.std() > 0.01 and (found - wanted).norm() <= 2e-5 * wanted.norm(), name


@pytest.mark.slow
def test_a_file_gives_what_pytorch_gives_for_any_list_and_batch(made):
    check_parity(made(LISTED))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("encoder", 5),
        ("encoder, ViT", 15),
        ("encoder, ViT", 5),
        ("reconstructor", 1),
        ("reconstructor, ViT", 5),
    ],
)
def test_files_give_what_pytorch_gives_for_any_count(model, count, made):
    check_parity(made(Case(model, "fp32", BATCHES, visible=count)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [LISTED, replace(ENCODER, model="encoder, ViT")], ids=lambda case: case.model
)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_pass(case, precision: Precision, made):
    file = made(replace(case, precision=precision))
    assert file.judge(file.file).failures == ()


@pytest.mark.slow
def test_a_file_takes_pixels(made, tmp_path):
    case = made(replace(LISTED, model="reconstructor, ViT", pixels=True))
    assert case.judge(case.file).failures == ()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_lists_that_are_not_followed_are_refused(fault, made, tmp_path):
    case = made(LISTED)
    assert case.judge(case.planted(FAULTS[fault], tmp_path)).failures


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, "another order"])
def test_lists_that_an_encoder_does_not_follow_are_refused(fault, made, tmp_path):
    case = made(ENCODER)
    change = (FAULTS | {"another order": other_units(("Gather", [1, 0, 2, 3, 4]))})[fault]
    assert case.judge(case.planted(change, tmp_path)).failures


def refused(runtime: Any, visible: torch.Tensor) -> str:
    with pytest.raises(BadInput) as caught:
        runtime(torch.zeros(len(visible), 3, 48, 48), visible=visible)
    return str(caught.value)


def test_wrong_lists_are_refused_alike_in_every_runtime(exported):
    file = exported.parent / "export" / "reconstructor-visible4.onnx"
    runtimes = [
        open_runtime(exported, graph="reconstructor", visible_units=4),
        open_runtime(file),
        open_runtime(file, "openvino"),
    ]
    good = lists(2, 4, 9)
    first, *others = [each(torch.ones(2, 3, 48, 48), visible=good)["reconstruction"] for each in runtimes]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)
    for visible, message in (
        ([[0, 1, 2, 9]], "visible lists unit 9; images of 3 x 3 units have 0 to 8"),
        ([[0, 1, 2, -1]], "visible lists unit -1; images of 3 x 3 units have 0 to 8"),
        ([[0, 1, 2, 3], [4, 0, 4, 1]], "visible lists unit 4 of image 1 twice; list every unit once"),
        (
            [[0, 1, 2]],
            "the reconstructor takes visible int64 ['batch', 4], given was [1, 3]",
        ),
    ):
        assert {refused(each, torch.tensor(visible)) for each in runtimes} == {message}
    wrong_type = "the reconstructor takes visible int64 ['batch', 4], given was bool"
    assert {refused(each, torch.ones(1, 3, 3, dtype=torch.bool)) for each in runtimes} == {wrong_type}


def test_the_manifest_says_how_many_units_a_file_takes(exported):
    folder = exported.parent / "export"
    manifest = Manifest.read(folder, "")
    assert manifest and {each.file: (each.graph, each.visible_units) for each in manifest.files} == {
        "encoder-visible4.onnx": ("encoder", 4),
        "reconstructor-visible4.onnx": ("reconstructor", 4),
    }


def test_a_benchmark_compares_with_pytorch_that_drops_the_same(exported, tmp_path, capsys):
    flags = ["--graph", "reconstructor", "--batch", "2", "--benchmark-seconds", "0.01", "--threads", "1"]
    out = tmp_path / "results.json"
    assert main(["benchmark", str(exported), *flags, "--visible-units", "4", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == ["torch eager", "reconstructor-visible4.onnx"]
    assert found["visible_units"] == 4
    assert main(["benchmark", str(exported), *flags]) == 0
    said = capsys.readouterr().out
    assert "reconstructor-visible4.onnx: computes 4 listed units only; add --visible-units 4" in said
    assert main(["benchmark", str(exported), *flags, "--visible-units", "9"]) == 2
    assert "--visible-units 9: images of 48 x 48 px have only 9 mask units" in capsys.readouterr().err


def test_who_needs_whole_images_refuses_these_files_in_one_line(exported):
    file = exported.parent / "export" / "encoder-visible4.onnx"
    with pytest.raises(BadInput, match="computes 4 listed units only; give a file that coma export wrote"):
        open_model(file, "encoder")
    with pytest.raises(BadInput, match=r"has no \.onnx file of a encoder"):
        open_model(exported, "encoder", "onnxruntime")


def test_the_demo_names_the_files_that_it_cannot_use(exported):
    models = Models([exported])
    options = {each.title: each.reason for each in models[models.names[0]].options("reconstructor")}
    reason = options["ONNX Runtime, 4 visible units"] or ""
    assert reason.startswith("takes lists of a fixed number of visible units")
    assert options["PyTorch"] is None and "ONNX Runtime" in options


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--visible-units", "9"], "images of 48 x 48 px have only 9 mask units"),
        (["--visible-units", "0"], "--visible-units 0"),
        (["--visible-units", "4", "--shapes", "1x48x48:1x48x48:1x48x64"], "needs a fixed image size"),
    ],
)
def test_settings_that_fit_no_image_are_refused(flags, message, exported, tmp_path, capsys):
    assert main(["export", str(exported), "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_models_that_fill_in_no_units_are_refused(tmp_path, capsys):
    method = BeyondConfig("zoom-in+mask", decoder=export_files.OBJECTIVE.decoder)
    artifact = export_files.pretrained(tmp_path / "zoomed", method=method)
    assert export(artifact, "--visible-units", "2") == 2
    assert "was trained with --degrade zoom-in+mask" in capsys.readouterr().err
    artifact = export_files.classifier(tmp_path / "classifier")
    assert export(artifact, "--visible-units", "2") == 2
    assert "is a classifier; give a pretrained artifact or a backbone" in capsys.readouterr().err


def test_unfinished_files_of_any_name_are_removed_and_no_others(tmp_path):
    ours = [
        f"{Path(file_name(graph, precision, count)).stem}.unverified.{end}"
        for graph in get_args(GraphKind)
        for precision in get_args(Precision)
        for count in (None, 7)
        for end in ("onnx", "engine", "engine.json")
    ]
    ours += ["encoder.onnx.base", ".report.md.part", ".encoder-visible7.unverified.onnx.part"]
    foreign = ["mine.unverified.onnx", "encoder-visible7.onnx", "encoder-visible.unverified.onnx", "x.part"]
    for name in (*ours, *foreign):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(foreign)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("model", [DYVIT, VIT], ids=["dyvit", "vit"])
@pytest.mark.parametrize("graph", ["encoder", "reconstructor"])
def test_rtx_compiles_them_with_free_batch(graph, model, made, tmp_path):
    name = graph if model is DYVIT else f"{graph}, ViT"
    file = made(Case(name, "fp32", BATCHES, visible=5)).file
    spec, _ = read_onnx_file(file)
    assert [each.axes[0] for each in spec.inputs] == ["batch", "batch"]
    assert check_rtx(file, (profile_of(spec, BATCHES),)).layers > 50
