"""Batches that do not fit are split into passes, or refused with what would fit."""

from typing import Any

import numpy as np
import pytest
import torch
from detectors import SMALL
from PIL import Image

from coma.config.serialization import to_plain
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.memory import GIB
from downstream import step_memory
from downstream.cli_options import TrainOptions
from downstream.configs.adapt import EncoderSpec, set_encoder
from downstream.configs.load import load_config
from downstream.configs.schedule import set_schedule, split_batch
from downstream.tasks import detection, segmentation

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]
SPEC = EncoderSpec(SMALL, (0.5,) * 3, (0.2,) * 3, {"encoder": {"architecture": "dyvit", **to_plain(SMALL)}})


def config_of(kind: Any, side: int, batch: int) -> Any:
    """A configuration of UPerNet or Faster R-CNN as the commands make it, without a dataset."""
    preset = segmentation.PRESET if kind == "segmentor" else detection.preset_path("faster-rcnn")
    config = load_config(preset)
    options = TrainOptions(head_channels=32, batch_size=batch, device="cpu", steps=2)
    set_encoder(config, SPEC, options)
    if kind == "segmentor":
        segmentation.set_pipelines(config, 3, ImageSize.of(side), None, False)
    else:
        detection.set_pipelines(config, 3, ImageSize(side, round(side * detection.LONGEST)), False)
    set_schedule(config, options, 100, "mIoU")
    return config


@pytest.fixture(scope="module")
def needs() -> dict[str, tuple[float, float, float]]:
    """Bytes of an image, of a pixel, and of the parameters."""
    return {kind: step_memory._costs(kind, config_of(kind, 64, 2)) for kind in ("segmentor", "detector")}


def test_larger_images_take_what_was_predicted(needs):
    fixed, per_pixel, _ = needs["segmentor"]
    from mmengine.registry import MODELS, DefaultScope

    config = config_of("segmentor", 64, 2)
    with DefaultScope.overwrite_default_scope("mmseg"):
        from downstream.openmmlab.runner import replace_sync_bn

        replace_sync_bn(config.model)
        model: Any = MODELS.build(config.model).train()
        counted = step_memory._kept("segmentor", model, 192) / 2
    assert fixed + per_pixel * 192**2 == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("kind", ["segmentor", "detector"])
def test_a_batch_that_does_not_fit_is_split(kind, needs, monkeypatch, caplog):
    config = config_of(kind, 256, 12)
    fixed, per_pixel, state = needs[kind]
    of_image = step_memory.PEAK * (fixed + per_pixel * step_memory._largest_image(config))
    monkeypatch.setattr(step_memory, "_costs", lambda *_: needs[kind])
    for room, passes in ((12.5, None), (11.5, 2), (4.5, 3), (2.5, 6)):
        fresh = config_of(kind, 256, 12)
        monkeypatch.setattr(step_memory, "memory_of_process", lambda _, room=room: state + room * of_image)
        with caplog.at_level("INFO"):
            step_memory.split_into_passes(kind, fresh, None, "cpu")
        assert fresh.train_cfg.get("passes") == passes == fresh.optim_wrapper.get("accumulative_counts")
        assert (f"{passes} passes of" in caplog.text) == bool(passes)
        caplog.clear()


@pytest.mark.parametrize("kind", ["segmentor", "detector"])
def test_what_never_fits_is_refused_with_what_would(kind, needs, monkeypatch):
    monkeypatch.setattr(step_memory, "_costs", lambda *_: needs[kind])
    monkeypatch.setattr(step_memory, "memory_of_process", lambda _: 0.3 * GIB)
    with pytest.raises(BadInput, match=r"0\.3 GiB are free; try") as told:
        step_memory.split_into_passes(kind, config_of(kind, 4096, 8), None, "cpu")
    flag = "--crop-size" if kind == "segmentor" else "--short-side"
    side = int(str(told.value).partition(f"{flag} ")[2].partition(",")[0])
    fitting = config_of(kind, side, 8)
    step_memory.split_into_passes(kind, fitting, None, "cpu")  # does not raise
    assert fitting.train_cfg.passes >= 4
    monkeypatch.setattr(step_memory, "memory_of_process", lambda _: None)
    step_memory.split_into_passes(kind, config_of(kind, 4096, 8), None, "cpu")  # nobody knows


def test_micro_batches_divide_the_batch():
    config = config_of("segmentor", 64, 12)
    step_memory.split_into_passes("segmentor", config, 3, "cpu")
    assert config.train_cfg.passes == 4
    for wrong in (5, 1, 24):
        with pytest.raises(BadInput, match="choose one of 12, 6, 4, 3, 2"):
            step_memory.split_into_passes("segmentor", config, wrong, "cpu")


def test_other_processes_cannot_break_the_passes_of_a_run(monkeypatch):
    """A run that is resumed by more processes has fewer images per process."""
    config = config_of("segmentor", 64, 12)
    step_memory.split_into_passes("segmentor", config, 2, "cpu")  # six passes
    monkeypatch.setenv("WORLD_SIZE", "2")
    split_batch(config)
    assert config.train_dataloader.batch_size == 6
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(BadInput, match="4 images per process cannot be split into the 6 passes"):
        split_batch(config)


def test_crops_are_as_large_as_the_images(tmp_path):
    from types import SimpleNamespace

    for number, size in enumerate([(120, 96), (150, 99), (90, 400)]):
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "masks").mkdir()
    for number in range(9):  # not of this split
        Image.new("L", (32, 32)).save(tmp_path / "masks" / f"{number}.png")
    split: Any = SimpleNamespace(images=tmp_path, image_suffix=".png", stems=("0", "1", "2"))
    assert segmentation.default_crop(split, 16, None) == (96, 96)
    assert segmentation.default_crop(split, 64, None) == (64, 64)
    assert segmentation.default_crop(split, 14, 1000) == (504, 504)
    assert segmentation.default_crop(split, 512, None) == (512, 512)


# Passes


def weights_after(steps: int, loop: dict[str, Any], counts: int, folder: Any) -> torch.Tensor:
    """Weights of a linear model after some steps on batches of six numbers, with AdamW."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    from downstream.openmmlab.runner import closed_log

    class Line(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)
            torch.nn.init.ones_(self.layer.weight)

        def forward(self, inputs: Any, data_samples: Any = None, mode: str = "loss") -> Any:
            return {"loss": ((self.layer(torch.stack(inputs)) - 1) ** 2).mean()}

    torch.manual_seed(0)
    numbers = torch.randn(6 * steps, 3, generator=torch.Generator().manual_seed(0))
    batches: Any = torch.utils.data.DataLoader(
        [{"inputs": row, "data_samples": None} for row in numbers],  # type: ignore[arg-type]
        batch_size=6,
        collate_fn=lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    )
    no_hooks: Any = {"checkpoint": None, "logger": None}
    with closed_log(folder):
        runner = Runner(
            model=Line(),
            work_dir=str(folder),
            train_dataloader=batches,
            train_cfg={"max_iters": steps, **loop},
            optim_wrapper={
                "type": "OptimWrapper",
                "optimizer": {"type": "AdamW", "lr": 0.1},
                "accumulative_counts": counts,
            },
            experiment_name=folder.name,
            log_level="ERROR",
            default_hooks=no_hooks,
        )
        runner.train()
    assert runner.iter == steps
    layer: Any = runner.model.layer
    return torch.cat([layer.weight.detach().ravel(), layer.bias.detach()])


@pytest.mark.parametrize("passes", [2, 3, 6])
def test_passes_give_the_step_of_the_whole_batch(passes, tmp_path):
    whole = weights_after(5, {"type": "IterBasedTrainLoop"}, 1, tmp_path / "whole")
    parts = weights_after(
        5, {"type": "AccumulatingTrainLoop", "passes": passes}, passes, tmp_path / f"parts{passes}"
    )
    torch.testing.assert_close(parts, whole)
