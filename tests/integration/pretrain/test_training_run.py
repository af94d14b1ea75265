"""A whole run: what it leaves behind, and what it refuses."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from short_runs import MODEL, rows

from coma.config import OptimizerConfig, PretrainConfig, ViTConfig, method_preset
from coma.config.serialization import read_config
from coma.errors import BadInput
from coma.objectives.load import load_pretrained
from pretrain.training import pretrain
from pretrain.training.run_plan import count_steps, split_batch


def change(config: PretrainConfig, **parts: dict[str, Any]) -> PretrainConfig:
    return replace(
        config, **{name: replace(getattr(config, name), **fields) for name, fields in parts.items()}
    )


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reconstruction_sheet", "loss_curve"):
        monkeypatch.setattr(f"pretrain.training.run_directory.{name}", lambda *_, **__: None)


# what a run leaves ------------------------------------------------------------------------------


def test_a_run_leaves_everything(settings, photos, capsys):
    run = pretrain(settings)
    assert sorted(path.name for path in run.iterdir()) == [
        *(
            "artifact",
            "config.json",
            "data.json.gz",
            "loss_curve.png",
            "metrics.jsonl",
            "reconstructions",
            "state",
            "tensorboard",
        ),
    ]
    assert sorted(path.name for path in (run / "reconstructions").iterdir()) == [
        "step-000003.png",
        "step-000005.png",
    ]
    for picture in (run / "loss_curve.png", *(run / "reconstructions").iterdir()):
        with Image.open(picture) as opened:
            assert min(opened.size) > 100
    assert sorted(path.name for path in (run / "state").iterdir()) == ["step-000004.pt", "step-000005.pt"]

    saved = read_config(run)
    assert replace(saved, data=replace(saved.data, mean=None, std=None)) == settings
    assert saved.data.mean is not None
    assert all(0.4 < m < 0.6 for m in saved.data.mean)  # measured on uniform noise

    about = load_pretrained(run / "artifact").artifact
    assert (about.model, about.objective, about.mean) == (MODEL, settings.objective, saved.data.mean)
    assert about.trained["steps"] == about.trained["steps_planned"] == 5
    assert about.trained["images_seen"] == 20
    assert (about.trained["method"], about.trained["data"]) == ("coma", photos.name)

    logged = rows(run)
    assert [row["step"] for row in logged] == [2, 4, 5]
    assert [row["images_seen"] for row in logged] == [8, 16, 20]
    assert [row["epoch"] for row in logged] == [0.8, 1.6, 2.0]
    for row in logged:
        assert set(row) - {"memory_gib"} == {
            *("step", "epoch", "images_seen", "loss", "lr", "grad_norm"),
            *("images_per_s", "cpu_s", "data_wait", "skipped", "explained_variance"),
        }
        assert 0 <= row["data_wait"] <= 1
        assert row["images_per_s"] > 0
        assert 0.1 < row.get("memory_gib", 1) < 100  # where the system tells
    assert about.trained["loss"] == pytest.approx(logged[-1]["loss"])  # the last log point is one step long
    told = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in told[-3:]] == ["step 2/5", "step 4/5", "step 5/5"]


def test_tensorboard_reads_what_was_logged(settings, no_pictures):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars(run: Path) -> list[tuple[int, float]]:
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("loss")]

    run = pretrain(settings)
    assert scalars(run) == [(row["step"], pytest.approx(row["loss"])) for row in rows(run)]
    os.rename(run / "state" / "step-000005.pt", run / "elsewhere")  # step 5 will be done again
    pretrain(settings, resume=True)
    assert scalars(run) == [(row["step"], pytest.approx(row["loss"])) for row in rows(run)]


@pytest.mark.parametrize("method", ["mae", "coma-independent", "coma4"])
def test_one_loop_for_all_objectives_and_encoders(settings, no_pictures, method):
    model = ViTConfig(patch=4, dim=8, depth=1, heads=2)
    objective = method_preset(method, decoder_dim=32, decoder_depth=1)
    run = pretrain(replace(settings, model=model, objective=objective))
    restored = load_pretrained(run / "artifact")
    assert restored.config == objective
    assert rows(run)[-1]["step"] == 5


def test_a_loss_goes_down(settings, no_pictures):
    flat = settings.run.out.parent / "flat"
    flat.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (number * 60, number * 20, 255 - number * 60)).save(flat / f"{number}.png")
    config = change(
        settings,
        data={"images": flat},
        objective={"norm_pix": False},
        optimizer={"steps": 60, "base_lr": 0.3, "weight_decay": 0.0},
        run={"log_steps": 10, "save_steps": 60},
    )
    losses = [row["loss"] for row in rows(pretrain(config))]
    assert losses[-1] < 0.5 * losses[0]


def test_a_file_that_does_not_decode_is_named_once(settings, photos, no_pictures, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "3.png").write_bytes(b"not a picture")
    (folder / "7.png").write_bytes(b"")
    run = pretrain(change(settings, data={"images": folder}, optimizer={"steps": 10}))
    told = capsys.readouterr().err
    for name in ("3.png", "7.png"):
        assert told.count(f"warning: skipped {folder / name}: ") == 1
    assert rows(run)[-1]["skipped"] == 2
    stopping = change(
        settings, data={"images": folder, "on_bad_image": "stop"}, run={"out": tmp_path / "other"}
    )
    with pytest.raises(BadInput, match=r"[37]\.png"):
        pretrain(stopping)


def test_sheets_do_not_disturb_training(settings, tmp_path):
    with_sheets = pretrain(change(settings, run={"reconstruction_every": 1}))
    without = pretrain(change(settings, run={"reconstruction_every": 0, "out": tmp_path / "other"}))
    assert [row["loss"] for row in rows(with_sheets)] == [row["loss"] for row in rows(without)]
    assert len(list((without / "reconstructions").iterdir())) == 1  # the last


def test_a_picture_that_fails_never_ends_a_run(settings, monkeypatch, capsys):
    monkeypatch.setattr("pretrain.training.run_directory.reconstruction_sheet", lambda *_, **__: 1 / 0)
    pretrain(settings)
    assert "could not write reconstructions (division by zero)" in capsys.readouterr().err


# what it refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": {"image_size": 20}}, "--image-size 20: must be a multiple of the 8 px mask unit; 16 or 24"),
        ({"data": {"image_size": 4}}, "--image-size 4: must be a multiple of the 8 px mask unit; 8 would do"),
        ({"data": {"mean": (0.5,), "std": (0.5,)}}, "--mean and --std have 1 values, the images 3 channels"),
        ({"data": {"images": None}}, "give the images to train on"),
        ({"data": {"images": Path("nowhere")}}, "nowhere: no such file or folder"),
        (
            {"optimizer": {"batch_size": 6, "micro_batch": 4}},
            "--batch-size 4 or --batch-size 8 or --micro-batch 3",
        ),
        ({"optimizer": {"batch_size": 0}}, "must be at least 1"),
        ({"optimizer": {"steps": 0}}, "--steps 0 must be at least 1"),
        ({"run": {"log_steps": 0}}, "--log-steps 0 must be at least 1"),
        ({"model": {"channels": 5}}, "`coma pretrain --channels 3` trains one"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(settings, parts, message):
    with pytest.raises(BadInput) as raised:
        pretrain(change(settings, **parts))
    assert message in str(raised.value)
    assert not settings.run.out.exists()


def test_a_directory_in_use_is_refused(settings, tmp_path, no_pictures):
    run = pretrain(settings)
    with pytest.raises(BadInput, match=f"is not empty; continue its run with `coma pretrain --resume {run}`"):
        pretrain(settings)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-mother.txt").write_text("dear")
    with pytest.raises(BadInput, match="is not empty; choose another --out, or remove"):
        pretrain(change(settings, run={"out": tmp_path / "letters"}))
    with pytest.raises(BadInput, match="no such file"):
        pretrain(change(settings, run={"out": tmp_path / "letters"}), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file; give a folder"):
        pretrain(change(settings, run={"out": tmp_path / "file"}))


def test_sharing_out():
    slices = split_batch(OptimizerConfig(batch_size=64, micro_batch=8), rank=1, world=4)
    assert (slices.micro_batch, slices.accumulation, slices.rank) == (8, 2, 1)
    assert split_batch(OptimizerConfig(batch_size=64), rank=0, world=4).micro_batch == 16
    with pytest.raises(
        BadInput, match="--batch-size 60 cannot be split evenly over 8 processes; --batch-size 56"
    ):
        split_batch(OptimizerConfig(batch_size=60), rank=0, world=8)
    assert count_steps(OptimizerConfig(epochs=2.5, batch_size=64), 100) == 4
    assert count_steps(OptimizerConfig(epochs=2.5, batch_size=64, steps=7), 100) == 7


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "with 4 images per pass; try --micro-batch 2, --grad-checkpointing",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "out of GPU memory with 4 images per pass",
        ),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors"), "out of GPU memory"),
        (
            type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})(
                "No C++ compiler"
            ),
            r"--compile does not work here \(No C\+\+ compiler\); leave it out",
        ),
    ],
)
def test_what_the_machine_cannot_do(settings, monkeypatch, error, message):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("pretrain.training.train_step.TrainStep.__call__", fail)
    with pytest.raises(BadInput, match=message):
        pretrain(settings)
