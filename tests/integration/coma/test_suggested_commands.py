"""Commands that are suggested can be pasted into a shell, whatever the folder is called."""

import json
import re
import shlex

import pytest
from dataset_files import save
from export_files import backbone

from coma.config import PretrainConfig, encoder_preset, method_preset
from coma.config.serialization import to_plain
from coma.errors import BadInput
from coma.runtimes.find import find_model
from downstream.commands.training import print_trained
from export.benchmark import list_exports
from pretrain.commands.pack import run as pack
from pretrain.commands.pretrain import summary

NAME = "it's $my run"


@pytest.fixture
def artifact(tmp_path):
    return backbone(tmp_path / NAME / "artifact")


def pasted(text: str, path, count: int = 1) -> None:
    """Checks that a shell passes this path on in so many of the commands of a text."""
    commands = re.findall(r"coma [a-z].*?(?=;|$| first$| again$)", text, re.MULTILINE)
    assert sum(str(path) in shlex.split(each) for each in commands) == count, text


def test_after_pre_training(artifact, tmp_path):
    folder = tmp_path / NAME
    config = PretrainConfig(model=encoder_preset("tiny", 32), objective=method_preset("coma"))
    (folder / "config.json").write_text(json.dumps(to_plain(config)))
    (folder / "metrics.jsonl").write_text('{"step": 7, "images_seen": 70, "loss": 0.5}\n')
    (folder / "reconstructions").mkdir()
    for step in (5, 999_999, 1_000_000):
        (folder / "reconstructions" / f"step-{step:06}.png").touch()
    text = summary(folder)
    pasted(text, artifact)
    pasted(text, folder)
    assert text.count(".png") == 2 and str(folder / "reconstructions" / "step-1000000.png") in text


def test_after_packing(tmp_path, capsys):
    save(tmp_path / "images" / "1.jpg")
    pack([str(tmp_path / "images"), "--out", str(tmp_path / NAME)])
    pasted(capsys.readouterr().out, tmp_path / NAME)


def test_after_the_training_of_a_detector(artifact, capsys):
    about = json.loads((artifact / "config.json").read_text())
    scores = {"scores": {}, "last_scores": {}, "checkpoint": "best_1.pth", "steps": 1}
    (artifact / "config.json").write_text(json.dumps(about | {"trained": scores}))
    print_trained("detect", artifact.parent, artifact)
    pasted(capsys.readouterr().out, artifact, 2)


def test_where_exports_are_missing(artifact, tmp_path):
    with pytest.raises(BadInput) as missing:
        find_model(artifact, "encoder", "onnxruntime")
    pasted(str(missing.value), artifact)
    with pytest.raises(BadInput) as required:
        list_exports(tmp_path, artifact, "encoder", required=True)
    pasted(str(required.value), artifact)
