"""What `coma detect` refuses, in one line that names the flag or the file."""

import pytest
import torch
from downstream_data import coco

from coma.cli import main
from coma.errors import BadArtifact, BadInput
from downstream.commands.detect import run
from downstream.configs.load import PRESETS

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # mm's packages warn of each other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of train, test, predict, check"),
        (["tarin"], "no verb 'tarin'"),
        (["train", "--data", "D", "--out", "x"], "give an artifact"),
        (["train", "A", "--out", "x", "--preset", "tiny", "--data", "D"], "and not both"),
        (["train", "--preset", "tiny", "--data", "D"], "give --out"),
        (["train", "--preset", "tiny", "--out", "x"], "give --data"),
        (
            ["train", "--preset", "tiny", "--data", "D", "--out", "x", "--steps", "0"],
            "--steps 0 must",
        ),
        (
            ["train", "--preset", "tiny", "--data", "D", "--out", "x", "--workers", "-1"],
            "--workers -1 must",
        ),
        (
            ["train", "--preset", "tiny", "--data", "D", "--out", "x", "--head-channels", "20"],
            "multiple of 32",
        ),
        (
            ["train", "--preset", "vit-tiny", "--data", "D", "--out", "x", "--global-blocks", "2"],
            "in every block",
        ),
        (
            ["train", "--preset", "tiny", "--data", "D", "--out", "x", "--cfg-options", "a"],
            "must be name=value",
        ),
        (["train", "--preset", "tiny", "--data", "D", "--out", "D"], "is not empty"),
        (["train", "--config", "none.py", "--out", "x"], "no such file"),
        (
            ["train", "A", "--config", "C", "--out", "x", "--steps", "3"],
            "--steps: this configuration counts epochs",
        ),
        (
            ["train", "--config", "C", "--out", "x", "--drop-path", "0.2", "--model", "retinanet"],
            "--model: no effect",
        ),
        (["train", "--preset", "tiny", "--data", "D", "--out", "x", "--batch-size", "0"], "at least 1"),
        (
            ["train", "--preset", "tiny", "--data", "D", "--out", "x", "--lr", "0"],
            "--lr 0 must",
        ),
        (["train", "--preset", "tiny", "--data", "D", "--out", "x", "--save-steps", "-3"], "at least 1"),
        (["train", "--preset", "tiny", "--data", "D", "--out", "x", "--short-side", "0"], "at least 32"),
        (["predict", "T", "D", "--out", "x", "--annotations", "J"], "no image with this name|both are image"),
        (["train", "--resume", "D"], "holds no config.py"),
        (["predict", "T", "none", "--out", "x"], "no such file or folder"),
        (["predict", "T", "D", "--out", "D"], "is not empty"),
        (["predict", "A", "D", "--out", "x"], "its kind is 'backbone'"),
        (["test", "A", "--data", "D"], "coma detect train"),
        (["check", "--data", "none"], "there is no folder"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message, data, backbone, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places: dict[str, str] = {"D": str(data), "A": str(backbone), "T": str(trained / "artifact")}
    places |= {"C": str(PRESETS / "mmdet" / "retinanet_dyvit_fpn_1x_coco.py")}
    places |= {"J": str(data / "annotations" / "val.json")}
    with pytest.raises((BadInput, BadArtifact), match=message):
        run([places.get(argument, argument) for argument in arguments])
    assert not (tmp_path / "x").exists() or arguments[0] == "predict"


@pytest.mark.parametrize("command", ["detect", "segment"])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--epochs", "99"], "--epochs"),
        (["--lr=0.5"], "--lr"),
        (["--no-grad-checkpointing"], "--grad-checkpointing"),
        (["--data", "nowhere", "--out", "elsewhere"], "--data, --out"),
        (["--cfg-options", "a=1"], "--cfg-options"),
        (["runs/first/artifact"], "runs/first/artifact"),
        (["runs/first/artifact", "--preset", "tiny"], "runs/first/artifact, --preset"),
    ],
)
def test_a_resumed_run_refuses_other_settings(command, arguments, named, tmp_path, capsys):
    (tmp_path / "config.py").write_text("")
    resumed = ["--resume", str(tmp_path), "--device", "cpu"]
    assert main([command, "train", *arguments, *resumed]) == BadInput.exit_code == 2
    assert f"{named}: a resumed run keeps its settings; start a new run" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ["train", "test", "predict"])
def test_a_device_that_is_not_there_is_refused(verb, data, trained, tmp_path):
    last = {"train": ["--data", str(data)], "test": ["--data", str(data)], "predict": [str(data)]}[verb]
    out = ["--out", str(tmp_path / "x"), "--device", "cuda"]
    source = ["--preset", "tiny"] if verb == "train" else [str(trained / "artifact")]
    with pytest.raises(BadInput, match="--device cuda: not available"):
        run([verb, *source, *last, *out])
    assert not (tmp_path / "x").exists()


def test_other_classes_are_refused(trained, data, tmp_path):
    other = coco(tmp_path / "other", train=1, val=1)
    text = (other / "annotations" / "val.json").read_text().replace("disc", "ball")
    (other / "annotations" / "val.json").write_text(text)
    with pytest.raises(BadInput, match="has classes square, ball; the artifact has square, disc"):
        run(["test", str(trained / "artifact"), "--data", str(other)])
