"""Fine-tuning runs resume to the very same numbers, and `coma classify train` refuses with one line."""

import errno
import os
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier_runs import COLOURS, paint, rows, to, without_val
from PIL import Image
from safetensors.torch import load_file
from short_runs import Killed, assert_same, killed_in, stop_during

from coma import cli
from coma.artifact import (
    load_artifact,
    load_encoder,
    save_artifact,
)
from coma.config import FinetuneConfig
from coma.config.serialization import read_config
from coma.errors import BadInput, CheckFailed, Interrupted
from coma.locks import lock_run
from downstream.classify import plan, run_directory
from downstream.classify.finetune import finetune
from downstream.commands.classify import parse

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def whole(short: FinetuneConfig, no_curves: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains the run of `short` without an interruption; returns its folder."""
    config = to(short, tmp_path_factory.mktemp("whole") / "run")
    finetune(config)
    return config.run.out


# resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_process_is_refused(short, tmp_path, frozen):
    config = to(short, tmp_path / "run", frozen=frozen)
    with lock_run(config.run.out), pytest.raises(BadInput, match="another process is training in"):
        finetune(config)
    assert not list((tmp_path / "run").iterdir())


def test_interrupted_and_resumed_is_uninterrupted(short, whole, tmp_path):
    config = to(short, tmp_path / "run")
    for step, number in ((1, signal.SIGINT), (2, signal.SIGTERM), (4, signal.SIGTERM)):  # 2: when validated
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(Interrupted, match="coma classify train --resume"),
        ):
            stop_during(patch, step, number)
            finetune(config, resume=step > 1)
        validated = [row["step"] for row in rows(config.run.out) if "val_top1" in row]
        assert validated == ([3] if step > 2 else [])  # who stops does not wait; it is made up for
        torch.rand(3)  # numbers drawn by anybody else change nothing
    finetune(config, resume=True)
    assert_same(config.run.out, whole)


def test_a_run_that_is_killed_after_a_validation_repeats_no_row(short, whole, tmp_path):
    """Stopped at a step that a validation is due at, validated when resumed, killed before the next save."""
    config = to(short, tmp_path / "run")
    for resume, end, step in ((False, stop_during, 2), (True, killed_in, 3)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises((Killed, Interrupted)):
            end(patch, step)
            finetune(config, resume=resume)
    finetune(config, resume=True)
    assert_same(config.run.out, whole)


def test_the_comparison_notices_another_seed(short, whole, tmp_path):
    config = to(short, tmp_path / "run")
    finetune(replace(config, run=replace(config.run, seed=1)))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_worker_processes_change_nothing(short, whole, tmp_path):
    config = to(short, tmp_path / "run")
    finetune(replace(config, data=replace(config.data, workers=1)))
    assert_same(config.run.out, whole)


def test_a_validation_that_fails_loses_no_step(short, whole, tmp_path):
    config = to(short, tmp_path / "run")

    def fail(*_: Any, step: int, **more: Any) -> Any:
        if step == 7:
            raise CheckFailed("the classifier's outputs are not finite")
        return validate(*_, step=step, **more)

    validate = run_directory.validate
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckFailed, match="not finite"):
        patch.setattr(run_directory, "validate", fail)
        finetune(config)
    assert (config.run.out / "state" / "step-000007.pt").is_file()
    finetune(config, resume=True)
    assert_same(config.run.out, whole)


class Dead(BaseException):
    """Stands for kill -9: from here on the process writes nothing."""


@pytest.mark.parametrize(
    "site",
    [
        "pretrain.training.run_directory.write_state",
        "pretrain.training.run_directory.save_artifact",
        "downstream.classify.run_directory.validate",
    ],
)
@pytest.mark.parametrize("when", [1, 2])
def test_killed_at_any_point_of_a_save(short, whole, tmp_path, site, when):
    config, calls = to(short, tmp_path / "run"), 0

    def die(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > when:
            raise Dead
        return real(*_, **__)

    module, _, name = site.rpartition(".")
    real = getattr(import_module(module), name)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Dead):
        patch.setattr(site, die)
        finetune(config)
    finetune(config, resume=True)
    assert_same(config.run.out, whole)


@pytest.mark.parametrize(("site", "what"), [("write_state", "state"), ("save_artifact", "artifact")])
def test_a_full_disk_loses_nothing(short, whole, tmp_path, capsys, site, what):
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = to(short, tmp_path / "run")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(CheckFailed, match=rf"written: {what} \(No space"),
    ):
        patch.setattr(f"pretrain.training.run_directory.{site}", no_room)
        finetune(config)
    assert "coma classify train --resume" not in capsys.readouterr().out
    finetune(config, resume=True)
    assert_same(config.run.out, whole)


def test_a_run_that_is_over_is_not_done_again(short, whole, monkeypatch):
    before = (whole / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(run_directory, "validate", lambda *_, **__: pytest.fail("validated again"))
    result = finetune(to(short, whole), resume=True)
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert result.last is not None and result.last.step == 7


def test_what_may_not_change(short, place, whole, tmp_path):
    with pytest.raises(BadInput, match=r"optimizer.mixup 0.8 -> 0.1"):
        finetune(to(short, whole, mixup=0.1), resume=True)
    with pytest.raises(
        BadInput, match=r"is not empty; continue its run with `coma classify train --resume .*another --out"
    ):
        finetune(to(short, whole))
    with pytest.raises(BadInput, match="is of a run of `coma classify train`"):
        read_config(whole)
    paint(tmp_path / "test", 12, seed=1)
    moved = replace(to(short, whole), data=replace(short.data, images=place / "data" / "train"))
    with pytest.raises(BadInput, match=r"the test images have changed: 3 added"):
        finetune(replace(moved, test=tmp_path / "test"), resume=True)


def test_a_loss_that_is_no_number_stops_the_run(short, place, tmp_path):
    encoder: Any = load_encoder(place / "artifact")
    about = encoder.artifact
    with torch.no_grad():
        encoder.norm.bias.fill_(float("nan"))
    save_artifact(tmp_path / "damaged", tensors=encoder.state_dict(), config=about)
    config = replace(to(short, tmp_path / "run"), artifact=tmp_path / "damaged")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(CheckFailed, match=r"loss nan.* are in"),
    ):
        patch.setattr("torch.optim.AdamW.step", lambda *_: pytest.fail("the weights were touched"))
        finetune(config)
    written = load_file(tmp_path / "run" / "nonfinite" / "step-000001.safetensors")
    assert written["labels"].shape == written["seeds"].shape == (4,)
    assert not (tmp_path / "run" / "artifact").exists()


def test_held_out_images_are_the_same_when_the_run_goes_on(short, place, tmp_path, monkeypatch):
    config = without_val(short, place, tmp_path / "run")
    finetune(without_val(short, place, tmp_path / "whole"))
    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
        stop_during(patch, 4, signal.SIGTERM)
        finetune(config)
    monkeypatch.setattr(plan, "hold_out", lambda labels, *_: torch.arange(len(labels)) % 4 == 0)
    with pytest.raises(BadInput, match=r"the validation images have changed: 1 removed \(green/04"):
        finetune(config, resume=True)
    monkeypatch.undo()
    finetune(config, resume=True)
    assert_same(config.run.out, tmp_path / "whole")


# the command ------------------------------------------------------------------------------------


def coma(*argv: object) -> int:
    return cli.main(["classify", "train", *map(str, argv)])


SMALL = ["--steps", "4", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--log-steps", "2"]


def test_the_command_from_beginning_to_end(place, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_during(patch, 2)
        assert coma(place / "artifact", "--data", place / "data", "--out", run, *SMALL) == 130
    told = capsys.readouterr()
    assert f"resume with: coma classify train --resume {run}" in told.err
    data = read_config(run, FinetuneConfig).data
    assert (data.crop_scale, data.image_size) == ((0.08, 1.0), (16, 16))

    drawn: list[Path] = []
    monkeypatch.setattr("pretrain.training.run_directory.loss_curve", lambda _, path: drawn.append(path))
    assert coma("--resume", run) == 0
    shown = capsys.readouterr()
    assert "resuming at step 3 of 4" in shown.err
    about = load_artifact(run / "artifact").config.trained
    assert f"weights of step {about['steps']} of 4: chosen on 6 validation images" in shown.out
    assert f"top-1 {about['test_top1']:.2%} on 9 test images, used once, at the end" in shown.out
    assert f"classifier       {run / 'artifact'}\n" in shown.out
    assert "trained on 12 images of 3 classes" in shown.out
    assert drawn == [run / "loss_curve.png"]

    scratch = ("--data", place / "data" / "train", "--test", place / "data" / "test", "--from-scratch")
    assert coma(place / "artifact", *scratch, "--out", tmp_path / "other", *SMALL) == 0
    assert load_artifact(tmp_path / "other" / "artifact").config.trained["pretrained"] is None


def test_resuming_takes_the_settings_of_the_run(short, place, tmp_path):
    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
        stop_during(patch, 1)
        finetune(to(short, tmp_path / "run", mixup=0.3, layer_decay=0.5))
    saved = read_config(tmp_path / "run", FinetuneConfig)
    assert saved.optimizer.mixup == 0.3
    assert parse(["--resume", str(tmp_path / "run")]).config == saved
    longer = parse(["--resume", str(tmp_path / "run" / "config.json"), "--steps", "9"]).config
    assert longer == replace(saved, optimizer=replace(saved.optimizer, steps=9))


@pytest.fixture(scope="module")
def refused(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the flags below may point at, right or wrong."""
    folder = tmp_path_factory.mktemp("refused")
    paint(folder / "more" / "red-and-others", 3, seed=0)
    flat, single, wide = folder / "flat", folder / "single", folder / "wide"
    for part in ("train", "test"):
        for name, target in (("x", flat / part), ("y", single / part / "only")):
            target.mkdir(parents=True)
            Image.new("RGB", (20, 20), (9, 9, 9)).save(target / f"{name}.png")
        for name in COLOURS:
            (wide / part / name).mkdir(parents=True)
            for number in range(2):
                np.save(wide / part / name / f"{number}.npy", np.zeros((20, 20, 5), np.uint8))
    (folder / "foreign").mkdir()
    for name in ("red", "violet"):
        (folder / "foreign" / name).mkdir()
        Image.new("RGB", (20, 20)).save(folder / "foreign" / name / "0.png")
    places = {path.name: path for path in (flat, single, wide, folder / "foreign")}
    return places | {
        "DATA": place / "data",
        "ARTIFACT": place / "artifact",
        "TRAIN": place / "data" / "train",
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "ARTIFACT --data flat",
            "flat/train: has no labels; give a folder with one folder of",
        ),
        ("ARTIFACT --data single", "has no labels"),
        ("ARTIFACT --data TRAIN --test foreign", "does not have the classes violet; it has blue, green, red"),
        ("ARTIFACT --data wide", "5 channels, but the model takes 3"),
        ("ARTIFACT --data DATA --image-size 20", "--image-size 20: must be a multiple of the 8 px mask unit"),
        ("ARTIFACT --data DATA --batch-size 5", "5 images per pass: mixup and CutMix pair them"),
        ("ARTIFACT --data DATA --micro-batch 3", "--batch-size 4 cannot be split evenly"),
        ("ARTIFACT --data DATA --log-steps 0", "--log-steps 0 must be at least 1"),
        ("ARTIFACT --data DATA --steps 0", "--steps 0 must be at least 1"),
        ("ARTIFACT --data DATA --layer-decay 7", "--layer-decay 7 must be more than 0"),
        ("ARTIFACT", "coma classify train needs --data"),
        ("--data DATA", "coma classify train needs ARTIFACT"),
        ("ARTIFACT --data DATA --allow-changed-data", "--allow-changed-data goes with --resume"),
        ("--resume ARTIFACT", "config.json: is of an artifact, not of a run; give a run directory"),
    ],
)
def test_the_command_refuses_with_one_line(refused, tmp_path, capsys, argv, message):
    words = [str(refused.get(word, word)) for word in argv.split()]
    flags = [*SMALL[:4], *words, "--out", str(tmp_path / "run")]
    assert coma(*(words if words[0] == "--resume" else flags)) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_needs_a_place_and_one_process(place, whole, capsys, monkeypatch):
    given = (place / "artifact", "--data", place / "data")
    assert coma(*given) == 2
    assert "coma classify train needs --out" in capsys.readouterr().err
    assert coma("--resume", whole, "--out", "elsewhere") == 2
    assert "--out does not go with --resume" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert coma(*given, "--out", "nowhere") == 2
    assert "start it without torchrun" in capsys.readouterr().err
