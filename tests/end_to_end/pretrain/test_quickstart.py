"""Quickstart goes from nothing to verified results, goes on where it was, and touches only its own folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pretrain.commands.quickstart as quickstart
from coma.cli import main
from coma.config import PretrainConfig
from coma.config.serialization import read_config
from coma.errors import CheckFailed
from coma.objectives.load import load_pretrained


def short(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quickstart, "_FEWEST_STEPS", 3)
    patch.setattr(quickstart, "_TRIALS", 2)


def coma(out: Path, *more: str) -> int:
    return main(["quickstart", "--out", str(out), "--minutes", "0.0001", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("once") / "quickstart"
    with pytest.MonkeyPatch.context() as patch:
        short(patch)
        assert coma(out) == 0
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "elsewhere" / "moved")


def test_everything_it_promises_is_there(finished):
    pictures = sorted((finished / "pictures").iterdir())
    assert len(pictures) == len(quickstart.PHOTOGRAPHS)
    for made in (
        "reconstructions.png",
        "reconstructions-tiny-64.png",
        "run/loss_curve.png",
        "run/reconstructions/step-000003.png",
        pictures[0],
    ):
        with Image.open(finished / made) as picture:
            picture.verify()
    objective = load_pretrained(finished / "run" / "artifact")
    about = objective.artifact
    assert about.trained["steps"] == 3 and about.trained["images"] == len(pictures)
    assert not objective.training


def test_running_it_again_trains_nothing_and_draws_again(copy, capsys):
    weights = load_file(copy / "run/artifact/model.safetensors")
    (copy / "reconstructions.png").unlink()
    assert coma(copy) == 0
    said = capsys.readouterr().out
    assert "resuming" in said and "--fresh" in said and str(copy / "reconstructions.png") in said
    torch.testing.assert_close(load_file(copy / "run/artifact/model.safetensors"), weights, rtol=0, atol=0)
    assert (copy / "reconstructions.png").exists()


def test_fresh_starts_over_and_may_change_the_method(copy, monkeypatch, capsys):
    short(monkeypatch)
    assert coma(copy, "--method", "mae") == 2
    assert "--fresh" in capsys.readouterr().err
    assert coma(copy, "--method", "mae", "--fresh") == 0
    assert load_pretrained(copy / "run/artifact").artifact.trained["method"] == "mae"


def test_other_peoples_folders_are_left_alone(copy, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    assert coma(theirs, "--fresh") == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert coma(theirs / "thesis.txt") == 2
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]
    (copy / "pictures").rename(copy / "photos")  # then it is some other run
    assert coma(copy, "--fresh") == 2
    assert "not the run of a quickstart" in capsys.readouterr().err
    assert (copy / "run/artifact/model.safetensors").exists()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_that_make_no_sense_are_refused(minutes, tmp_path, capsys):
    assert main(["quickstart", "--out", str(tmp_path / "out"), f"--minutes={minutes}"]) == 2
    assert "--minutes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def moved(out: Path) -> PretrainConfig:
    plan = read_config(out / "run")
    return replace(plan, run=replace(plan.run, out=out / "run"))


def test_verification_catches_an_artifact_with_one_other_weight(copy):
    plan = moved(copy)
    images, seeds = torch.randn(2, 3, 64, 64), torch.arange(2)
    path = copy / "run/artifact/model.safetensors"
    quickstart.verify(plan, load_pretrained(copy / "run/artifact"), images, seeds)
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("decoder.") and name.endswith("head.bias"))
    tensors[name][0] += 1e-3
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    about = json.loads(path.with_name("config.json").read_text())
    del about["checksums"]  # which would notice it first
    path.with_name("config.json").write_text(json.dumps(about))
    with pytest.raises(CheckFailed, match="does not reconstruct the same as the trained model"):
        quickstart.verify(plan, load_pretrained(copy / "run/artifact"), images, seeds)


def test_verification_needs_a_state_to_compare_with(copy):
    plan = moved(copy)
    shutil.rmtree(copy / "run/state")
    objective = load_pretrained(copy / "run/artifact")
    with pytest.raises(CheckFailed, match="no training state"):
        quickstart.verify(plan, objective, torch.randn(1, 3, 64, 64), torch.arange(1))
