"""`--dry-run` and the lines that open a run: they say what the run then does; a dry run writes nothing."""

import re
from dataclasses import replace
from typing import Any

import pytest
from short_runs import OBJECTIVE, ROWS, at, everything_in, rows, table

from coma.config import METHOD_PRESETS, TeacherConfig, ViTConfig, encoder_preset, method_preset
from coma.errors import BadInput, CheckFailed
from coma.models import build_encoder
from pretrain.commands.pretrain import run as run_command
from pretrain.training import pretrain
from pretrain.training.throughput import encoder_flops, flops_per_image
from pretrain.training.train_step import NotFinite, TrainStep


def test_a_dry_run_estimates_three_real_steps_and_writes_nothing(settings, tmp_path, monkeypatch, capsys):
    steps: list[int] = []
    take = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda self, n, *rest: steps.append(n) or take(self, n, *rest))
    before = everything_in(tmp_path)
    assert (
        pretrain(at(settings, settings.run.out, track="tensorboard,mlflow"), dry_run=True) == settings.run.out
    )
    assert everything_in(tmp_path) == before
    assert steps == [0, 1, 2]
    told = table(capsys.readouterr().out)
    assert list(told) == [*ROWS, "time", "memory"]
    assert told["images"].startswith(f"10 in {settings.data.images}; 3 channels")
    assert told["crops"] == "16 x 16 px, 20% to 100% of the area, half of them flipped; 4 mask units of 8 px"
    parameters = sum(parameter.numel() for parameter in build_encoder(settings.model).parameters())
    assert told["model"].startswith(f"dyvit, {parameters:,} parameters; with a decoder ")
    assert told["model"].endswith("by coma on 2 views of each image")
    assert told["steps"] == "5 of 4 images, which are 2 epochs"
    assert told["learning rate"].startswith("2.34e-06 at its peak (0.00015 x 4 / 256)")
    assert told["device"] == "cpu, fp32"
    assert "tensorboard/, mlflow/" in told["writes"]
    assert re.match(
        r"0:00:\d\d for 5 steps, without pictures.* \(mean of 2 steps after the first\)", told["time"]
    )
    assert re.match(r"\d\.\d\d GiB at most, resident in this process", told["memory"])


def test_flops_are_those_of_one_step_and_of_the_encoder(settings, capsys):
    pretrain(settings, dry_run=True)
    step, encoder = re.findall(r"([\d.]+) MFLOPs", table(capsys.readouterr().out)["FLOPs"])
    assert float(step) == pytest.approx(4 * flops_per_image(settings) / 1e6, rel=1e-3)
    assert float(encoder) == pytest.approx(encoder_flops(settings.model, 16) / 1e6, rel=1e-3)


def test_the_encoders_flops_are_those_of_a_vit_by_hand():
    model = ViTConfig(patch=4, dim=16, depth=2, heads=2, mlp_ratio=2.0)
    tokens = 16 + 1
    block = tokens * 2 * 16 * 16 * (4 + 2 * 2.0) + 2 * 2 * tokens * tokens * 16
    assert encoder_flops(model, 16) == pytest.approx(16 * 2 * 48 * 16 + 2 * block, rel=1e-3)


def test_the_same_lines_open_a_run(settings, capsys):
    pretrain(settings, dry_run=True)
    dry = table(capsys.readouterr().out)
    pretrain(settings)
    told = capsys.readouterr()
    assert told.out == ""
    assert {name: text for name, text in table(told.err).items() if name in dry} == {
        name: text for name, text in dry.items() if name in ROWS
    }
    made = {path.name + "/" * path.is_dir() for path in settings.run.out.iterdir()}
    assert set(dry["writes"].partition(": ")[2].partition(";")[0].split(", ")) == made


@pytest.mark.parametrize("method", METHOD_PRESETS)
def test_every_method_runs_dry(settings, weights, capsys, method):
    objective = replace(method_preset(method), decoder=OBJECTIVE.decoder)
    if objective.teacher:
        objective = replace(objective, teacher=TeacherConfig("test_vit", weights))
    model, data = ViTConfig(patch=8, dim=8, depth=1, heads=2), replace(settings.data, image_size=32)
    pretrain(replace(settings, model=model, data=data, objective=objective), dry_run=True)
    assert list(table(capsys.readouterr().out)) == [*ROWS, "time", "memory"]
    assert not settings.run.out.exists()


def test_networks_of_timm_run_dry(settings, capsys):
    model, objective = (
        encoder_preset("timm:test_vit", 160),
        replace(method_preset("mae"), decoder=OBJECTIVE.decoder),
    )
    data = replace(settings.data, image_size=160)
    pretrain(replace(settings, model=model, data=data, objective=objective), dry_run=True)
    told = table(capsys.readouterr().out)
    assert told["model"].startswith("timm test_vit, ")
    assert "FLOPs for the encoder on one image" in told["FLOPs"]


def test_a_resumed_run_runs_dry_from_where_it_is(settings, capsys):
    run = pretrain(settings)
    before = everything_in(run)
    run_command(["--resume", str(run), "--steps", "7", "--dry-run"])
    assert "for 2 steps" in table(capsys.readouterr().out)["time"]
    run_command(["--resume", str(run), "--dry-run"])
    assert table(capsys.readouterr().out)["time"] == "all steps are done"
    assert everything_in(run) == before
    assert rows(run)[-1]["step"] == 5


def test_bad_settings_are_refused_by_a_dry_run_as_by_a_run(settings, monkeypatch):
    with pytest.raises(BadInput, match="multiple of the 8 px mask unit"):
        pretrain(replace(settings, data=replace(settings.data, image_size=20)), dry_run=True)

    def explode(*_: Any) -> None:
        raise NotFinite(float("nan"), 1.0)

    monkeypatch.setattr(TrainStep, "__call__", explode)
    with pytest.raises(CheckFailed, match="step 1: loss nan"):
        pretrain(settings, dry_run=True)
    assert not settings.run.out.exists()


@pytest.mark.gpu
def test_the_memory_of_a_gpu_is_measured(settings, accelerator, capsys):
    pretrain(at(settings, settings.run.out, device=accelerator.type), dry_run=True)
    told = table(capsys.readouterr().out)
    assert told["device"].startswith(accelerator.type)
    assert ("on the GPU" in told["memory"]) is (accelerator.type == "cuda")
