"""Flags that change a configuration of the user's own: its length, its sizes, its optimizer."""

from pathlib import Path

import pytest

from coma.errors import BadInput
from coma.image_size import ImageSize
from downstream.cli_options import TrainOptions
from downstream.configs.override import override_backbone, override_training, set_image_size

pytestmark = pytest.mark.openmmlab


def stock(name: str):
    from downstream.configs.load import load_config

    library = __import__(name.partition("/")[0])
    return load_config(Path(library.__path__[0], ".mim", "configs", name.partition("/")[2]))


def changed(name: str, given: dict, images: int | None = None):
    config = stock(name)
    override_training(config, TrainOptions(**given), given, images)
    return config


RETINANET = "mmdet/retinanet/retinanet_r18_fpn_1x_coco.py"  # 12 epochs; warm-up of 500 steps; steps at 8, 11
RTMDET = "mmdet/rtmdet/rtmdet_tiny_8xb32-300e_coco.py"
FCN = "mmseg/fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py"


def test_nothing_that_was_not_given_changes():
    before = stock(RETINANET).to_dict()
    assert changed(RETINANET, {}).to_dict() == before


def test_rates_and_batches():
    given = {"lr": 0.5, "weight_decay": 0.25, "batch_size": 6, "seed": 3, "workers": 0}
    config = changed(RETINANET, given)
    assert config.optim_wrapper.optimizer.lr == 0.5 and config.optim_wrapper.optimizer.weight_decay == 0.25
    assert config.optim_wrapper.optimizer.type == "SGD"
    assert config.train_dataloader.batch_size == config.global_batch_size == 6
    assert config.randomness == {"seed": 3} and config.train_dataloader.num_workers == 0


def test_a_schedule_in_epochs_is_scaled():
    config = changed(RETINANET, {"epochs": 24})
    assert config.train_cfg.max_epochs == 24 and config.train_cfg.val_interval == 1
    warmup, steps = config.param_scheduler
    assert warmup["end"] == 500  # iterations of a longer run
    assert steps["end"] == 24 and steps["milestones"] == [16, 22]
    shorter = changed(RETINANET, {"epochs": 3})
    assert shorter.param_scheduler[0]["end"] == 125 and shorter.param_scheduler[1]["milestones"] == [2, 3]


def test_what_happens_in_the_last_epochs_is_scaled():
    config = changed(RTMDET, {"epochs": 30})
    switch = next(hook for hook in config.custom_hooks if "switch_epoch" in hook)
    assert switch["switch_epoch"] == 28 and config.train_cfg.dynamic_intervals == [(28, 1)]
    assert config.train_cfg.val_interval <= 30


def test_a_schedule_in_iterations_is_scaled():
    config = changed(FCN, {"epochs": 2}, images=4000)  # batches of 4
    assert config.train_cfg.max_iters == 2000 and config.train_cfg.val_interval == 200
    assert config.default_hooks.checkpoint.interval == 200
    assert config.param_scheduler[0]["end"] == 2000
    assert changed(FCN, {"steps": 10}).train_cfg.max_iters == 10


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (RETINANET, {"steps": 5}, "--steps: this configuration counts epochs"),
        (RETINANET, {"epochs": 0.5}, "--epochs 0.5: this configuration counts whole epochs"),
        (FCN, {"epochs": 2}, "counts iterations; give --steps, or --data"),
        (FCN, {"layer_decay": 0.5}, "--layer-decay: needs one of our backbones"),
    ],
)
def test_flags_that_do_not_fit_are_refused(name, given, message):
    with pytest.raises(BadInput, match=message):
        changed(name, given)


def test_steps_of_a_schedule_in_epochs_are_refused_with_the_steps_of_an_epoch():
    with pytest.raises(BadInput, match=r"counts epochs, of 12\.5 steps each; give --epochs"):
        changed(RETINANET, {"steps": 5}, images=25)  # batches of 2


def test_layer_decay_keeps_the_settings_that_it_knows():
    config = stock(RETINANET)
    config.model.backbone = {"type": "DyViT", "preset": "tiny"}
    config.optim_wrapper.paramwise_cfg = {"norm_decay_mult": 0.0, "num_layers": 12}
    override_training(config, TrainOptions(layer_decay=0.5), ["layer_decay"], None)
    assert config.optim_wrapper.constructor == "LayerDecayConstructor"
    assert config.optim_wrapper.paramwise_cfg == {"norm_decay_mult": 0.0, "decay_rate": 0.5}
    override_backbone(config, TrainOptions(frozen_stages=2, grad_checkpointing=True), ["frozen_stages"])
    assert config.model.backbone == {"type": "DyViT", "preset": "tiny", "frozen_stages": 2}


def test_sizes_are_scaled_together():
    config = stock(RETINANET)  # 1333 x 800
    set_image_size(config, ImageSize(400, 600))
    assert config.test_dataloader.dataset.pipeline[1].scale == (600, 400)
    config = stock(RTMDET)  # mosaics of 640
    set_image_size(config, ImageSize(320, 320))
    text = str(config.train_dataloader.dataset.pipeline)
    assert "(320, 320)" in text and "(640, 640)" in text and "1280" not in text  # resized to twice the size
    assert "640" not in str(config.test_dataloader.dataset.pipeline)
    config = stock(FCN)  # crops of 512
    set_image_size(config, ImageSize(128, 256))
    assert config.model.data_preprocessor["size"] == (128, 256)
    crop = next(step for step in config.train_dataloader.dataset.pipeline if step["type"] == "RandomCrop")
    assert tuple(crop["crop_size"]) == (128, 256)
    assert tuple(config.test_dataloader.dataset.pipeline[1].scale) == (724, 181)


def test_a_configuration_without_a_size_is_refused():
    config = stock(RETINANET)
    config.test_dataloader.dataset.pipeline = [{"type": "LoadImageFromFile"}]
    with pytest.raises(BadInput, match=r"--image-size: .* no fixed size"):
        set_image_size(config, ImageSize(64, 64))
