"""From `coma pretrain --model timm:NAME` through every command that takes what it writes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_files
import numpy as np
import pytest
import torch
from downstream_data import SMALL, artifact, coco, labelled

from coma.artifact import load_artifact, load_classifier, load_encoder
from coma.cli import main
from coma.config import TimmConfig, encoder_preset
from coma.errors import BadArtifact
from coma.objectives.load import load_pretrained

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx, OpenMMLab and timm warn of themselves

NAME = "vit_small_patch16_dinov3"
MODEL = replace(encoder_preset(f"timm:{NAME}"), dim=24, depth=2, patch=8)
LEARNED = replace(encoder_preset("timm:eva02_tiny_patch14_336"), dim=24, depth=2, patch=14)


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Path:
    """Three steps of pre-training."""
    out = tmp_path_factory.mktemp("runs") / "run"
    size = ("--image-size", "16", "--model.patch", "8", "--model.depth", "2", "--model.dim", "24")
    steps = ("--steps", "3", "--batch-size", "4", "--workers", "0", "--device", "cpu")
    decoder = ("--objective.decoder.dim", "16", "--objective.decoder.depth", "1")
    heads = ("--objective.decoder.heads", "2")
    given = ("--model", f"timm:{NAME}", *size, *steps, *decoder, *heads, "--out", str(out))
    assert main(["pretrain", str(photos), *given]) == 0
    assert list((out / "reconstructions").glob("*.png"))
    return out


def test_a_run_leaves_an_artifact_that_loads_strictly(run, tmp_path):
    about = load_artifact(run / "artifact").config
    assert about.model == MODEL and isinstance(about.model, TimmConfig)
    objective: Any = load_pretrained(run / "artifact")
    encoder: Any = load_encoder(run / "artifact")
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)[0], objective.encoder(images)[0], rtol=0, atol=0)
    names = {name for name in load_artifact(run / "artifact").tensors if name.startswith("encoder.")}
    assert names == {f"encoder.timm.{name}" for name, _ in encoder.timm.state_dict().items()}
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in (run / "artifact").iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    plain = json.loads((copied / "config.json").read_text())
    plain["model"]["name"] = "hf-hub:someone/something"
    (copied / "config.json").write_text(json.dumps(plain))
    with pytest.raises(BadArtifact, match="not the name of an architecture"):
        load_encoder(copied)


def test_it_resumes_and_is_described(run, capsys):
    assert main(["pretrain", "--resume", str(run), "--steps", "4"]) == 0
    assert main(["info", str(run / "artifact")]) == 0
    assert NAME in capsys.readouterr().out


def test_it_is_evaluated_and_fine_tuned(run, labelled_folder, tmp_path, capsys):
    assert main(["evaluate", str(run / "artifact"), "--data", str(labelled_folder), "--device", "cpu"]) == 0
    assert "linear" in capsys.readouterr().out
    small = ("--steps", "2", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--frozen-stages", "1")
    given = ("--data", str(labelled_folder), "--out", str(tmp_path / "run"), *small)
    assert main(["classify", "train", str(run / "artifact"), *given]) == 0
    before: Any = load_encoder(run / "artifact")
    after: Any = load_classifier(tmp_path / "run" / "artifact")
    for i, moved in ((0, False), (1, True)):
        pairs = zip(before.blocks[i].parameters(), after.blocks[i].parameters(), strict=True)
        assert any(not torch.equal(one, other) for one, other in pairs) == moved


@pytest.fixture(scope="module")
def labelled_folder(tmp_path_factory) -> Path:
    """Two classes of noise in train and test folders."""
    from class_folders import class_folders

    return class_folders(tmp_path_factory.mktemp("labelled"))


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, LEARNED], ids=["rotary", "learned"])
def test_every_graph_is_exported_and_passes_the_gate(model, tmp_path):
    shapes = [(batch, 3, h * model.unit, w * model.unit) for batch, h, w in ((1, 2, 2), (2, 3, 4), (2, 4, 4))]
    size = ":".join("x".join(map(str, shape)) for shape in shapes)
    quick = ("--shapes", size, "--benchmark-seconds", "0", "--verify-images", "4")
    for kind in ("pretrained", "classifier"):
        folder = getattr(export_files, kind)(tmp_path / kind / "artifact", replace(model, depth=1))
        assert main(["export", str(folder), *quick]) == 0
    files = {path.name for path in tmp_path.rglob("*.onnx")}
    assert files == {"encoder.onnx", "reconstructor.onnx", "classifier.onnx"}


@pytest.mark.openmmlab
@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, LEARNED], ids=["patch 8", "patch 14"])
def test_detectors_and_segmentors_stand_on_it(model, tmp_path):
    backbone = artifact(tmp_path / "backbone", model)
    steps = ("--steps", "2", *SMALL, "--device", "cpu")
    data = coco(tmp_path / "coco", train=2, val=1)
    given = (str(backbone), "--data", str(data), "--out", str(tmp_path / "detector"))
    assert main(["detect", "train", *given, *steps]) == 0
    assert load_artifact(tmp_path / "detector" / "artifact").config.model == replace(model, drop_path=0.1)
    images = ("predict", str(tmp_path / "detector" / "artifact"), str(data / "val"))
    assert main(["detect", *images, "--out", str(tmp_path / "found"), "--device", "cpu"]) == 0
    data = labelled(tmp_path / "labelled", train=2, val=1)
    given = (str(backbone), "--data", str(data), "--out", str(tmp_path / "segmentor"))
    assert (
        main(["segment", "train", *given, *steps[:-6], "--crop-size", str(4 * model.unit), "--device", "cpu"])
        == 0
    )


@pytest.mark.parametrize("model", [MODEL, LEARNED], ids=["rotary", "learned"])
def test_the_demo_lists_and_shows_it(model, tmp_path):
    from demo.introspection import attention_maps_of, attention_received, feature_pyramid
    from demo.models import Models

    listed = Models([export_files.pretrained(tmp_path / "artifact", model)])
    (shown,) = [listed[name] for name in listed.names]
    assert {"encoder", "reconstructor"} <= set(shown.forms)
    encoder, image = shown.encoder(), torch.randn(1, 3, 3 * model.unit - 1, 4 * model.unit)
    assert feature_pyramid(encoder, image)[0].shape == (1, 24, 3, 4)
    assert attention_received(encoder, image).shape == (3, 4)
    (seen,) = attention_maps_of(encoder, image, 1, 0.5, 0.5).values()
    assert seen.shape == (3, 4) and np.isclose(seen.sum(), 1)
