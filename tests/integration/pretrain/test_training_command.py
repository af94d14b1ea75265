"""`coma pretrain`: presets, overrides, replays and resumption."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from short_runs import rows

from coma.config import (
    DataConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    encoder_preset,
    method_preset,
)
from coma.config.serialization import read_config, to_plain
from coma.errors import BadInput, ComaError
from coma.image_size import ImageSize
from pretrain.commands.pretrain import parse, run
from pretrain.training import pretrain
from pretrain.training.distributed import AGREED


def change(config: PretrainConfig, **parts: dict[str, Any]) -> PretrainConfig:
    return replace(
        config, **{name: replace(getattr(config, name), **fields) for name, fields in parts.items()}
    )


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reconstruction_sheet", "loss_curve"):
        monkeypatch.setattr(f"pretrain.training.run_directory.{name}", lambda *_, **__: None)


def test_presets_choose_defaults_and_flags_override_them():
    flags = "--out runs/first --model tiny --image-size 64 --method coma4 --channels 4 --epochs 3 --no-flip"
    config, resume, *_ = parse(["photos", *flags.split(), "--model.dim", "16", "--objective.no-norm-pix"])
    assert not resume
    assert config.data == DataConfig(images=Path("photos"), image_size=ImageSize.of(64), flip=False)
    assert config.model == replace(encoder_preset("tiny", 64, 4), dim=16)
    assert config.objective == replace(method_preset("coma4", decoder_dim=192), norm_pix=False)
    assert config.optimizer == OptimizerConfig(epochs=3)
    assert config.run == RunConfig(out=Path("runs/first"))
    assert parse(["photos"])[0].model == encoder_preset("small")
    assert parse(["photos", "--recipe", "small-data"])[0].optimizer.batch_size == 64


def test_a_run_is_replayed_and_resumed_by_its_directory(settings, photos, tmp_path, capsys):
    first = pretrain(settings)
    saved = read_config(first)
    again, *_ = parse(["--from", str(first), "--out", str(tmp_path / "second"), "--seed", "1"])
    assert again == change(saved, run={"out": tmp_path / "second", "seed": 1})
    other, *_ = parse([str(tmp_path), "--from", str(first / "config.json")])
    assert other.data.mean is None  # of other images: measured again

    moved = first.rename(tmp_path / "moved")
    config, resume, *_ = parse(["--resume", str(moved), "--steps", "6"])
    assert resume
    assert config == change(saved, run={"out": moved}, optimizer={"steps": 6})
    capsys.readouterr()
    run(["--resume", str(moved), "--steps", "6"])
    told = capsys.readouterr()
    assert "6 steps, 24 images seen" in told.out
    assert f"coma evaluate {moved / 'artifact'} --data CLASSES" in told.out
    assert "resuming at step 5 of 6" in told.err
    with pytest.raises(
        BadInput, match=r"--out .*other does not go with --resume, which continues in .*moved"
    ):
        parse(["--resume", str(moved), "--out", str(tmp_path / "other")])
    with pytest.raises(BadInput, match="--model does not go with --resume"):
        parse(["--resume", str(moved), "--model", "tiny"])
    with pytest.raises(BadInput, match="no such file"):
        parse(["--resume", str(tmp_path / "nowhere")])


def test_one_step_is_enough_for_a_smoke_test(photos, tmp_path, capsys):
    out = tmp_path / "smoke"
    flags = "--model tiny --image-size 32 --steps 1 --batch-size 2 --device cpu"
    run([str(photos), "--out", str(out), *flags.split()])
    assert rows(out)[-1]["step"] == 1
    assert f"{out / 'artifact'} (encoder and decoder)" in capsys.readouterr().out


def test_only_one_process_prints_what_all_agreed_on(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        error = BadInput("no")
        error.add_note(AGREED)
        raise error

    monkeypatch.setattr("pretrain.training.pretrain", refuse)
    with pytest.raises(ComaError):
        run(["photos"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        run(["photos"])
    assert ended.value.code == 2


@pytest.mark.parametrize("flag", ["--resume", "--from"])
def test_epochs_count_although_the_earlier_run_was_counted_in_steps(tmp_path, flag):
    config = PretrainConfig()
    config = replace(config, optimizer=replace(config.optimizer, steps=2))
    (tmp_path / "config.json").write_text(json.dumps(to_plain(config)))
    assert parse([flag, str(tmp_path)])[0].optimizer.steps == 2
    optimizer = parse([flag, str(tmp_path), "--epochs", "7"])[0].optimizer
    assert (optimizer.epochs, optimizer.steps) == (7, None)
