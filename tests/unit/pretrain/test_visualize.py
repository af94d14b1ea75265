"""The sheet shows what it says, nothing leaks into it, and a picture file is whole or absent."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor, nn

import pretrain.visualize.reconstructions as pictures
from coma.config import CoMAConfig, DecoderConfig, DyViTConfig, MAEConfig, ObjectiveConfig
from coma.errors import BadInput
from coma.models import build_encoder
from coma.objectives import Objective, build_objective
from pretrain.visualize.curves import _smooth, loss_curve
from pretrain.visualize.reconstructions import reconstruction_sheet

DECODER = DecoderConfig(dim=16, depth=1, heads=2)


def small(config: ObjectiveConfig, channels: int = 3) -> Objective:
    torch.manual_seed(0)
    encoder = DyViTConfig(
        channels=channels,
        patch=1,
        dim=8,
        depths=(1, 1, 1, 1),
        heads=(1, 1, 2, 2),
        windows=((4,), (4,), (0,), (0,)),
    )
    return build_objective(config, build_encoder(encoder))


class Columns:
    """Records what was to be drawn instead of drawing it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pixels: dict[str, np.ndarray] = {}
        self.shown: dict[str, np.ndarray | None] = {}
        self.title = self.notes = ""
        monkeypatch.setattr(pictures, "draw_sheet", self.take)

    def take(self, columns: Sequence[pictures.Column], title: str, notes: str) -> Image.Image:
        self.pixels = {heading: pixels for heading, pixels, _ in columns}
        self.shown = {heading: shown for heading, _, shown in columns}
        self.title, self.notes = title, notes
        return Image.new("RGB", (1, 1))


def draw(objective: Objective, images: Tensor, path: Path, **more) -> None:
    channels = images.shape[1]
    reconstruction_sheet(
        objective, images, torch.arange(len(images)), [0.5] * channels, [0.25] * channels, path, **more
    )


def test_sheet_is_a_picture_with_a_cell_for_every_column_and_row(tmp_path):
    images = torch.randn(3, 3, 32, 32)
    draw(small(MAEConfig(decoder=DECODER)), images, tmp_path / "new" / "mae.png")
    draw(small(CoMAConfig(decoder=DECODER)), images, tmp_path / "coma.png")
    draw(small(CoMAConfig(views=4, decoder=DECODER)), images, tmp_path / "coma4.png")
    widths = []
    for name in ("new/mae.png", "coma.png", "coma4.png"):
        with Image.open(tmp_path / name) as sheet:
            sheet.load()
            assert sheet.format == "PNG" and sheet.mode == "RGB"
            widths.append(sheet.width)
    step = 176 + 8  # a cell and the gap beside it
    assert [(width - 2 * 24 + 8) / step for width in widths] == [3, 6, 10]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("views", [2, 4])
def test_every_pixel_of_the_last_column_was_predicted_by_a_view_that_did_not_see_it(
    views, tmp_path, monkeypatch
):
    columns = Columns(monkeypatch)
    objective = small(CoMAConfig(views=views, decoder=DECODER))
    images = torch.randn(2, 3, 32, 32)
    draw(objective, images, tmp_path / "a.png")
    seen = np.stack([np.asarray(columns.shown[f"view {view}"]) for view in range(1, views + 1)])
    assert (seen.sum(0) == 1).all()  # complementary
    rebuilt = np.stack([columns.pixels[f"rebuilt from view {view}"] for view in range(1, views + 1)])
    assert (np.where(seen[..., None], rebuilt, 0).sum(0) == columns.pixels["original"]).all()
    alone = columns.shown["predictions only"]
    assert alone is not None and alone.all()
    others = np.where(seen[..., None], 0, rebuilt.astype(float)).sum(0) / (views - 1)
    unclipped = (rebuilt > 0).all(0) & (rebuilt < 255).all(0)
    difference = np.abs(others - columns.pixels["predictions only"])[unclipped]
    assert unclipped.mean() > 0.2 and difference.max() <= 1


def test_hidden_pixels_do_not_show_in_what_a_view_rebuilds(tmp_path, monkeypatch):
    columns = Columns(monkeypatch)
    objective = small(CoMAConfig(decoder=DECODER))
    images = torch.randn(1, 3, 32, 32)
    draw(objective, images, tmp_path / "a.png")
    before, seen = columns.pixels["rebuilt from view 1"], columns.shown["view 1"]
    assert seen is not None
    changed = torch.where(torch.from_numpy(seen)[:, None], images, images + 3)
    draw(objective, changed, tmp_path / "a.png")
    assert (columns.pixels["rebuilt from view 1"] == before).all()
    draw(objective, changed, tmp_path / "a.png", statistics="target")  # the fault that the caption warns of
    assert (columns.pixels["rebuilt from view 1"] != before).any()


def test_notes_say_ratio_and_where_mean_and_contrast_come_from(tmp_path, monkeypatch):
    columns = Columns(monkeypatch)
    images = torch.randn(2, 3, 32, 32)
    draw(small(MAEConfig(decoder=DECODER)), images, tmp_path / "a.png", caption="step 7")
    assert columns.title == "step 7"
    assert "75%" in columns.notes and "8 x 8 px" in columns.notes and "nearby" in columns.notes
    draw(small(CoMAConfig(decoder=DECODER)), images, tmp_path / "a.png", statistics="target")
    assert "CoMA" in columns.title and "50%" in columns.notes and "leaks" in columns.notes
    draw(small(CoMAConfig(norm_pix=False, decoder=DECODER)), images, tmp_path / "a.png")
    assert "as they are" in columns.notes and "leaks" not in columns.notes


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_channels_and_sizes_keep_their_colours(channels, tmp_path, monkeypatch):
    columns = Columns(monkeypatch)
    images = torch.linspace(-2, 2, channels).view(1, channels, 1, 1).expand(1, -1, 21, 30)
    draw(small(MAEConfig(mask_ratio=0.5, decoder=DECODER), channels), images, tmp_path / "a.png")
    original = columns.pixels["original"]
    assert original.shape == (1, 21, 30, 3)
    expected = ((images[0, :3] if channels >= 3 else images[0, :1].expand(3, -1, -1)) * 0.25 + 0.5) * 255
    assert np.abs(original[0] - expected.clamp(0, 255).permute(1, 2, 0).numpy()).max() <= 0.5
    assert ("channels" in columns.notes) == (channels in (2, 5))


def test_floats_in_a_unit_of_their_own_are_neither_black_nor_white(tmp_path, monkeypatch):
    columns = Columns(monkeypatch)
    images = torch.linspace(-2, 2, 32 * 32).view(1, 1, 32, 32)  # of Hounsfield units, normalised
    reconstruction_sheet(
        small(MAEConfig(decoder=DECODER), 1), images, torch.zeros(1).long(), [-600], [400], tmp_path / "a.png"
    )
    expected = (images[0, 0, :, :, None].expand(-1, -1, 3) / 6 + 0.5) * 255
    assert np.abs(columns.pixels["original"][0] - expected.numpy()).max() <= 0.5
    assert "-3 to +3 standard deviations" in columns.notes


def test_only_eight_rows_and_the_mode_is_left_as_it_was(tmp_path, monkeypatch):
    columns = Columns(monkeypatch)
    objective = small(MAEConfig(decoder=DECODER)).train()
    draw(objective, torch.randn(9, 3, 16, 16), tmp_path / "a.png")
    assert len(columns.pixels["original"]) == 8
    assert objective.training and objective.encoder.training


def test_mode_is_restored_when_reconstruction_fails(tmp_path):
    class Broken(nn.Module):
        encoder = small(MAEConfig(decoder=DECODER)).encoder

        def draw_visible(self, *_):
            raise RuntimeError("planted")

    broken = Broken()
    with pytest.raises(RuntimeError, match="planted"):
        draw(broken, torch.randn(1, 3, 16, 16), tmp_path / "a.png")  # type: ignore[arg-type]
    assert broken.training and not list(tmp_path.iterdir())


def test_an_older_picture_survives_a_failed_write(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    objective, images = small(MAEConfig(decoder=DECODER)), torch.randn(1, 3, 16, 16)
    draw(objective, images, path)
    before = path.read_bytes()

    write = os.write

    def full_disk(number: int, data: memoryview) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(number, data[: len(data) // 2])

    monkeypatch.setattr("coma.atomic_io.os.write", full_disk)
    with pytest.raises(OSError, match="no space"):
        draw(objective, images, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def write_metrics(path: Path, losses: list[float], **more) -> Path:
    path.parent.mkdir(exist_ok=True)
    rows = [{"step": step, "loss": loss, "lr": 1e-3, **more} for step, loss in enumerate(losses, start=1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ink(path: Path) -> int:
    with Image.open(path) as picture:
        return int((np.asarray(picture.convert("L")) < 200).sum())


@pytest.mark.parametrize("count", [1, 2, 300])
def test_curve_draws_runs_of_any_length(count, tmp_path):
    metrics = write_metrics(tmp_path / "run" / "metrics.jsonl", [2 / step for step in range(1, count + 1)])
    loss_curve(metrics, tmp_path / "curve.png", title="two minutes")
    assert ink(tmp_path / "curve.png") > 1000
    assert not list(tmp_path.rglob("*.part"))


def test_curve_takes_lines_without_finite_loss_and_a_line_cut_short_by_a_kill(tmp_path):
    metrics = write_metrics(tmp_path / "metrics.jsonl", [1.0, 0.5, float("nan")], data_wait=0.25)
    metrics.write_text(metrics.read_text() + '{"step": 4, "lo')
    loss_curve(metrics, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()


def test_curve_tells_validation_from_test(tmp_path, monkeypatch):
    """The test is one point, at the step whose weights were chosen."""
    metrics = write_metrics(tmp_path / "metrics.jsonl", [2.0, 1.0, 0.5])
    rows = [{"step": 1, "val_top1": 0.5}, {"step": 2, "val_top1": 0.75}, {"step": 3, "val_top1": 0.25}]
    rows.append({"step": 3, "chosen_step": 2, "test_top1": 0.6})
    with metrics.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    drawn: dict[str, tuple[list[float], ...]] = {}
    plot = Axes.plot

    def record(axes: Axes, *points: Any, **how: Any) -> Any:
        if "label" in how:
            drawn[how["label"]] = tuple(map(list, points))
        return plot(axes, *points, **how)

    monkeypatch.setattr(Axes, "plot", record)
    loss_curve(metrics, tmp_path / "curve.png")
    assert drawn == {
        "validation: 25, at best 75": ([1, 2, 3], [50, 75, 25]),
        "test, once, with the chosen weights: 60": ([2], [60]),
    }


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        ("", "no step with a finite loss"),
        ("nonsense\n{}\n", "not a readable"),
        ("3\n{}\n", "not a readable"),
    ],
)
def test_curve_refuses_what_is_not_metrics(content, complaint, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    if content is not None:
        metrics.write_text(content)
    with pytest.raises(BadInput, match=rf"metrics.jsonl.*{complaint}"):
        loss_curve(metrics, tmp_path / "curve.png")


def test_smoothing_keeps_a_constant_and_the_length():
    assert np.allclose(_smooth([3.0] * 100), 3.0)
    assert len(_smooth([1.0])) == 1
    noisy = [1.0, -1.0] * 50
    assert np.abs(_smooth(noisy)).max() < 0.5
