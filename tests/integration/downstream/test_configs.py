"""Every configuration loads, builds and takes a step, at reduced width."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from downstream_data import DYVIT, VIT

from coma.config import EncoderConfig
from coma.config.serialization import to_plain
from downstream.cli_options import TrainOptions
from downstream.configs.adapt import EncoderSpec, set_encoder
from downstream.configs.load import PRESETS, load_config

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.filterwarnings("ignore"),  # mm's configurations and models warn of each other
]

ALL = sorted(PRESETS.glob("mm*/*.py"))


def reduced(path: Path) -> Any:
    """The configuration with an encoder of 8 or 16 channels and heads of 32."""
    config = load_config(path)
    model = VIT if config.model.backbone.type == "PlainViT" else DYVIT
    encoder = EncoderSpec(model, (0.4,) * 3, (0.2,) * 3, {"encoder": to_plain(model, EncoderConfig)})
    set_encoder(config, encoder, TrainOptions(head_channels=32))
    return config


def test_there_are_the_configurations_that_the_readme_names():
    assert {path.stem for path in ALL} == {
        "cascade-mask-rcnn_dyvit_fpn_1x_coco",
        "cascade-mask-rcnn_dyvit_fpn_lsj-100e_coco",
        "faster-rcnn_dyvit_fpn_1x_coco",
        "mask-rcnn_dyvit_fpn_1x_coco",
        "mask-rcnn_dyvit_fpn_lsj-100e_coco",
        "mask-rcnn_vit_sfp_1x_coco",
        "mask-rcnn_vit_sfp_lsj-100e_coco",
        "retinanet_dyvit_fpn_1x_coco",
        "upernet_dyvit_160k_ade20k-512x512",
        "upernet_dyvit_80k_cityscapes-512x1024",
        "upernet_vit_160k_ade20k-512x512",
    }


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_fits_a_base_encoder_as_it_is(path):
    """What the files say of channels is what fitting the base encoder gives."""
    from coma.config import encoder_preset

    config, fitted = load_config(path), load_config(path)
    name = "vit-base" if config.model.backbone.type == "PlainViT" else "base"
    set_encoder(
        fitted, EncoderSpec(encoder_preset(name), (0.5,) * 3, (0.5,) * 3, {"preset": name}), TrainOptions()
    )
    for part in ("neck", "rpn_head", "roi_head", "bbox_head", "decode_head", "auxiliary_head"):
        given, expected = config.model.get(part), fitted.model.get(part)
        if part == "neck" and given:
            given, expected = ({"num_outs": 4, "start_level": 0, **neck} for neck in (given, expected))
        assert given == expected, part


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_takes_a_step(path):
    from mmengine.registry import MODELS, init_default_scope

    import downstream.openmmlab  # noqa: F401
    from downstream.openmmlab.runner import replace_sync_bn

    config = reduced(path)
    init_default_scope(config.default_scope)
    replace_sync_bn(config.model)
    preprocessor = config.model.data_preprocessor
    for setting, small in (("batch_augments", None), ("size", (64, 96))):  # they pad to 512 and 1024 px
        if setting in preprocessor:
            preprocessor[setting] = small
    model = MODELS.build(config.model)
    if config.default_scope == "mmdet":
        from mmdet.registry import MODELS as REGISTRY
        from mmdet.testing import demo_mm_inputs

        assert model.__class__ is REGISTRY.get(config.model.type)
        with_mask = "mask_head" in config.model.get("roi_head", {})
        data = demo_mm_inputs(2, [(3, 64, 96), (3, 70, 64)], num_classes=3, with_mask=with_mask)
    else:
        data = _segmentation_inputs()
    before = model.backbone.encoder.norm.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = model(**model.data_preprocessor(data, True), mode="loss")
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    total.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent
    optimizer.step()
    assert not torch.equal(model.backbone.encoder.norm.weight, before)


@pytest.mark.parametrize("steps", [1, 2, 10, 19, 20, 60])
def test_the_rate_rises_to_what_was_asked_for_and_falls_to_nothing(steps):
    """In particular in runs too short for a warm-up of two steps."""
    from mmengine.optim import OptimWrapper
    from mmengine.registry import PARAM_SCHEDULERS

    import downstream.openmmlab  # noqa: F401
    from downstream.configs.schedule import set_schedule

    config = load_config(PRESETS / "mmdet" / "retinanet_dyvit_fpn_1x_coco.py")
    set_schedule(config, TrainOptions(steps=steps, batch_size=2, lr=0.5), 100, "coco/bbox_mAP")
    wrapper = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5))
    schedulers = [PARAM_SCHEDULERS.build({"optimizer": wrapper, **each}) for each in config.param_scheduler]
    rates = []
    for _ in range(steps):
        rates.append(wrapper.get_lr()["lr"][0])
        wrapper.optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) == (steps // 10 - 1 if steps >= 20 else 0)
    assert rates[-1] < 0.01 or steps < 20


def test_data_of_ones_own_keep_the_repetition_of_large_scale_jitter(tmp_path):
    from downstream_data import coco

    from downstream.datasets import open_coco
    from downstream.tasks.detection import set_dataset

    config = load_config(PRESETS / "mmdet" / "mask-rcnn_dyvit_fpn_lsj-100e_coco.py")
    data = coco(tmp_path / "data", train=1, val=1)
    set_dataset(config, open_coco(data, "train"), open_coco(data, "val"), masks=True)
    dataset = config.train_dataloader.dataset
    assert (dataset.type, dataset.times) == ("RepeatDataset", 4)
    assert dataset.dataset.ann_file == str(data / "annotations" / "train.json")
    assert [step["type"] for step in dataset.dataset.pipeline][2:4] == ["RandomResize", "RandomCrop"]
    assert config.model.roi_head.mask_head.num_classes == 2


def _segmentation_inputs() -> dict[str, Any]:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    rng = np.random.default_rng(0)
    images, samples = [], []
    for _ in range(2):
        images.append(torch.from_numpy(rng.integers(0, 255, (3, 64, 96), dtype=np.uint8)))
        labels = torch.from_numpy(rng.integers(0, 19, (1, 64, 96)))
        meta = {"img_shape": (64, 96), "ori_shape": (64, 96)}
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=meta))
    return {"inputs": images, "data_samples": samples}
