"""`coma segment` from end to end: train, resume after kill -9, measure, draw; and what only it can refuse."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from downstream_data import DYVIT, artifact, coco, labelled
from PIL import Image

from coma.artifact import load_artifact
from coma.errors import BadArtifact, BadInput
from downstream.commands.segment import run
from downstream.openmmlab.checkpoint import allow_safe_loading

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # mm's packages warn of each other

SMALL = ["--head-channels", "32", "--crop-size", "64", "--batch-size", "4", "--workers", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return labelled(tmp_path_factory.mktemp("labelled") / "data")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """Long enough to tell the ground from what lies on it."""
    folder = tmp_path_factory.mktemp("runs")
    backbone = artifact(folder / "backbone")
    run(["train", str(backbone), "--data", str(data), "--out", str(folder / "run"), "--steps", "40",
         "--lr", "3e-3",
         "--validations", "2", *SMALL])  # fmt: skip
    return folder / "run"


def test_it_learns_and_leaves_an_artifact(trained):
    found = load_artifact(trained / "artifact")
    assert found.config.kind == "segmentor" and found.config.class_names == ("ground", "square", "disc")
    assert found.config.model == replace(DYVIT, drop_path=0.1)
    assert (found.config.head or {})["library"] == "mmseg" and len((found.config.head or {})["palette"]) == 3
    assert found.config.trained["scores"]["mIoU"] > 60  # ground alone: 26


def test_the_artifact_gives_what_the_trained_model_gave(trained, data, tmp_path, capsys):
    run(["test", str(trained / "artifact"), "--data", str(data), "--out", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())
    kept = load_artifact(trained / "artifact").config.trained
    assert kept["checkpoint"].endswith("iter_40.pth")
    assert {k: scores[k] for k in kept["scores"]} == pytest.approx(kept["scores"], abs=0.01)
    assert "mIoU" in capsys.readouterr().out


def test_label_maps_and_overlays(trained, data, tmp_path):
    out = tmp_path / "out"
    run(["predict", str(trained / "artifact"), str(data / "img_dir" / "val"), "--out", str(out)])
    names = {path.name for path in (data / "img_dir" / "val").iterdir()}
    assert (
        {p.name for p in (out / "pictures").iterdir()}
        == {p.name for p in (out / "labels").iterdir()}
        == names
    )
    agreement = []
    for name in names:
        label = Image.open(out / "labels" / name)
        assert label.mode == "P" and label.size == (96, 64)
        truth = np.asarray(Image.open(data / "ann_dir" / "val" / name))
        agreement.append((np.asarray(label) == truth).mean())
        assert Image.open(out / "pictures" / name).size == (96, 64)
    assert np.mean(agreement) > 0.88  # ground alone: 0.77


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(data, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "coma", "segment", "train", "--preset", "tiny", "--data", str(data)]
    command += ["--out", str(out), "--steps", "30", "--save-steps", "2", "--validations", "1", *SMALL]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (out / "last_checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    allow_safe_loading()
    done = torch.load((out / "last_checkpoint").read_text())["meta"]["iter"]
    assert 2 <= done < 30
    config = (out / "config.py").read_text()
    (out / "config.py").write_text(config.replace("max_iters=30", f"max_iters={done + 1}"))
    run(["train", "--resume", str(out)])
    assert load_artifact(out / "artifact").config.trained["steps"] == done + 1


@pytest.mark.slow
def test_two_processes_share_a_batch(data, tmp_path):
    from downstream.openmmlab.checkpoint import checkpoint_weights

    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "coma"]
    command += [
        "segment",
        "train",
        "--preset",
        "tiny",
        "--data",
        str(data),
        "--out",
        str(out),
        "--steps",
        "2",
    ]
    done = subprocess.run(
        [*command, *SMALL], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 steps; val split, at the last step") == 1  # one of them reports
    assert done.stderr.count("2/2") == 2  # the step and its validation
    assert load_artifact(out / "artifact").config.trained["steps"] == 2
    assert not any(name.startswith("module.") for name in checkpoint_weights(out / "iter_2.pth"))


@pytest.mark.slow
def test_five_channels_and_ade20k_numbers(tmp_path):
    """Multi-channel TIFF, images smaller than the crop, and labels that count from 1."""
    import tifffile

    data = labelled(tmp_path / "data", train=2, val=1, size=(80, 48))
    for path in (data / "img_dir").rglob("*.png"):
        pixels = np.asarray(Image.open(path))
        path.unlink()
        bands = np.concatenate([pixels, pixels[..., :2]], axis=2).astype(np.uint16) * 200
        tifffile.imwrite(path.with_suffix(".tif"), bands, photometric="minisblack", planarconfig="contig")
    settings = {"classes": list("ab"), "reduce_zero_label": True}
    (data / "classes.json").write_text(json.dumps(settings))
    path = artifact(tmp_path / "a", replace(DYVIT, channels=5))
    run(["train", str(path), "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "1", *SMALL])
    config = load_artifact(tmp_path / "run" / "artifact").config
    assert config.model.channels == 5 and config.class_names == ("a", "b")
    image = data / "img_dir" / "val" / "0.tif"
    run(["predict", str(tmp_path / "run" / "artifact"), str(image), "--out", str(tmp_path / "p")])
    assert np.asarray(Image.open(tmp_path / "p" / "labels" / "0.png")).max() <= 1


@pytest.mark.slow
def test_any_configuration_of_mmseg(data, tmp_path):
    theirs = tmp_path / "theirs.py"
    theirs.write_text(
        "_base_ = 'mmseg::upernet/upernet_r18_4xb4-20k_voc12aug-512x512.py'\n"
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=1, val_interval=1)\n"
        "crop_size = (64, 64)\n"
        "model = dict(decode_head=dict(channels=16), auxiliary_head=dict(channels=16),\n"
        "             data_preprocessor=dict(size=crop_size))\n"
        "train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)\n"
        "val_dataloader = dict(num_workers=0, persistent_workers=False)\n"
    )
    backbone = artifact(tmp_path / "backbone")
    options = ["train_dataloader.dataset.pipeline.2.scale=(96,64)",
               "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
               "val_dataloader.dataset.pipeline.1.scale=(96,64)"]  # fmt: skip
    run(["train", str(backbone), "--config", str(theirs), "--data", str(data), "--out", str(tmp_path / "run"),
         "--cfg-options", *options])  # fmt: skip
    config = load_artifact(tmp_path / "run" / "artifact").config
    assert config.class_names == ("ground", "square", "disc") and config.trained["steps"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "tiny", "--data", "D", "--out", "x", "--crop-size", "100"], "32 px mask unit"),
        (["train", "--preset", "tiny", "--data", "C", "--out", "x"], "have boxes alone"),
        (["train", "--out", "x", "--data", "D"], "give an artifact"),
        (["predict", "C", "D", "--out", "x"], "not an artifact"),
        (["test", "T", "--data", "C"], "have boxes alone"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message, data, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = coco(tmp_path / "c", train=1, val=1, masks=False)
    places = {"D": str(data), "T": str(trained / "artifact"), "C": str(other)}
    with pytest.raises((BadInput, BadArtifact), match=message):
        run([places.get(argument, argument) for argument in arguments])


def test_check_prints_what_a_dataset_holds(data, capsys):
    run(["check", "--data", str(data), "--out", str(data.parent / "sheet")])
    said = capsys.readouterr().out
    assert "no errors found" in said
    labels = [np.asarray(Image.open(path)) for path in (data / "ann_dir" / "train").iterdir()]
    counts = sorted(int((label == 1).sum()) for label in labels)
    share = f"{sum(counts) / sum(label.size for label in labels):.2%}"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    assert ["square", "train", str(len(labels)), share, str(counts[0]), str(counts[-1])] in rows
    assert (data.parent / "sheet" / "contact_sheet.png").is_file()


def test_a_segmentor_is_not_a_detector(trained, data, tmp_path):
    from downstream.commands.detect import run as detect

    with pytest.raises(BadArtifact, match=r"its kind is 'segmentor', not 'detector'; use coma segment"):
        detect(["predict", str(trained / "artifact"), str(data), "--out", str(tmp_path / "x")])
