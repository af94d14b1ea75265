"""Images of 32 x 64 px from pre-training through every command that takes its size from the artifact."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from class_folders import class_folders
from PIL import Image

import coma
from coma.artifact import load_artifact
from coma.cli import main
from coma.config.serialization import read_config
from coma.data import evaluation_batches, normalize, open_source
from coma.runtimes.onnxruntime import OnnxRuntime
from downstream.features.files import FeaturesFile
from export.commands.benchmark import parse_size

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself

QUICK = ("--workers", "0", "--device", "cpu")
SMALL = ("--steps", "2", "--batch-size", "4", "--track", "none", *QUICK)
DECODER = (
    "--objective.decoder.dim",
    "16",
    "--objective.decoder.depth",
    "1",
    "--objective.decoder.heads",
    "2",
)
WIDE = ("--image-size", "32", "64")


def succeeds(*argv: object) -> None:
    assert main([str(word) for word in argv]) == 0


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Six crops of photographs, wide and tall."""
    from skimage import data

    folder = tmp_path_factory.mktemp("photographs")
    for number, pixels in enumerate([data.astronaut(), data.coffee(), data.chelsea()]):
        Image.fromarray(pixels[:90, :200]).save(folder / f"wide{number}.png")
        Image.fromarray(pixels[:200, 30:120]).save(folder / f"tall{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    shape = ("--model", "tiny", "--model.dim", "16", "--model.heads", "2", "2", "4", "4",
             "--model.depths", "1", "1", "1", "1")  # fmt: skip
    succeeds("pretrain", photographs, "--out", out, *WIDE, *shape, *DECODER, *SMALL)
    return out


@pytest.mark.slow
def test_runs_draw_their_pictures_and_resume(run, photographs, tmp_path, capsys):
    about = load_artifact(run / "artifact").config
    assert about.image_size == (32, 64) and about.model.unit == 8
    assert json.loads((run / "artifact" / "config.json").read_text())["image_size"] == [32, 64]
    (sheet,) = (run / "reconstructions").glob("*.png")
    with Image.open(sheet) as picture:
        assert picture.width > picture.height * 0.5
    succeeds("pretrain", photographs, "--out", tmp_path / "dry", *WIDE, "--from", run, "--dry-run")
    out = capsys.readouterr().out
    assert "32 x 64 px, 20% to 100% of the area" in out and "32 mask units of 8 px" in out
    assert "for the encoder on one image of 32 x 64 px" in out
    succeeds("pretrain", photographs, "--out", tmp_path / "more", "--init", run / "artifact", *SMALL)
    assert read_config(tmp_path / "more").data.image_size == (32, 64)  # that of the weights
    succeeds("pretrain", photographs, "--out", tmp_path / "square", "--init", run / "artifact",
             "--image-size", "64", *SMALL)  # fmt: skip
    succeeds("pretrain", photographs, "--out", tmp_path / "tall", "--init", tmp_path / "square" / "artifact",
             "--image-size", "64", "32", *SMALL)  # fmt: skip
    assert load_artifact(tmp_path / "tall" / "artifact").config.image_size == (64, 32)
    succeeds("info", run / "artifact")
    assert "32 x 64 px" in capsys.readouterr().out
    succeeds("pretrain", "--resume", run, "--steps", 3)
    assert read_config(run).data.image_size == (32, 64)


def test_features_are_those_of_centre_crops_of_that_shape(run, photographs, tmp_path):
    encoder = coma.load_encoder(run / "artifact")
    about = encoder.artifact
    (batch,) = evaluation_batches(
        open_source(photographs), image_size=about.image_size, channels=3, batch_size=9, workers=0
    )
    assert batch.images.shape == (6, 3, 32, 64)
    with torch.no_grad():
        wanted = encoder.pool(normalize(batch.images, about.mean, about.std)).numpy()
    succeeds("embed", run / "artifact", photographs, "--out", tmp_path / "a.npz", *QUICK)
    file = FeaturesFile(tmp_path / "a.npz")
    assert file.info.spec.image_size == (32, 64)
    np.testing.assert_allclose(np.load(tmp_path / "a.npz")["feature"], wanted, atol=1e-5)
    succeeds(
        "embed",
        run / "artifact",
        photographs,
        "--out",
        tmp_path / "b.npz",
        "--image-size",
        "16",
        "40",
        *QUICK,
    )
    assert FeaturesFile(tmp_path / "b.npz").info.spec.image_size == (16, 40)


@pytest.mark.slow
def test_every_graph_passes_the_gate_in_onnx_runtime(run, photographs, tmp_path):
    labelled = class_folders(tmp_path / "labelled")
    succeeds("evaluate", run / "artifact", "--data", labelled, *QUICK)
    succeeds("evaluate", run / "artifact", "--data", labelled, "--image-size", "16", "24", *QUICK)
    classifier = tmp_path / "classifier"
    succeeds("classify", "train", run / "artifact", "--data", labelled, "--out", classifier, *SMALL)
    assert load_artifact(classifier / "artifact").config.image_size == (32, 64)
    tall = tmp_path / "tall"
    succeeds(
        "classify",
        "train",
        run / "artifact",
        "--data",
        labelled,
        "--out",
        tall,
        "--image-size",
        64,
        32,
        *SMALL,
    )
    assert load_artifact(tall / "artifact").config.image_size == (64, 32)
    for artifact, graphs in ((run, ("encoder", "reconstructor")), (classifier, ("classifier",))):
        out = tmp_path / artifact.name / "export"
        succeeds("export", artifact / "artifact", "--out", out, "--verify", photographs, "--verify-images", 3,
                 "--benchmark-seconds", 0)  # fmt: skip
        kept = {each["file"]: each for each in json.loads((out / "manifest.json").read_text())["files"]}
        for graph in graphs:
            assert kept[f"{graph}.onnx"]["shapes"] == ["1 x 32 x 64", "8 x 32 x 64", "32 x 32 x 64"]
            rule = OnnxRuntime(out / f"{graph}.onnx").spec.preprocessing
            assert (rule.resize, rule.size) == ("centre-crop", (32, 64))
    about = load_artifact(run / "artifact").config
    assert parse_size(None, about, "encoder") == (32, 64)
    succeeds("benchmark", run / "artifact", "--benchmark-seconds", 0.1, "--batch", 1)
    succeeds("classify", "predict", classifier / "artifact", photographs, "--out", tmp_path / "found", *QUICK)
