"""Heads get the strides that an encoder really has, or are refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from downstream_data import DYVIT, VIT

from coma.config import EncoderConfig
from coma.config.serialization import to_plain
from coma.errors import BadInput
from downstream.cli_options import TrainOptions
from downstream.configs.adapt import EncoderSpec, set_encoder
from downstream.configs.load import PRESETS, load_config
from downstream.configs.strides import check_strides

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.filterwarnings("ignore"),  # mm's configurations and models warn of each other
]

FCOS = "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco"


def described(model: EncoderConfig) -> EncoderSpec:
    return EncoderSpec(model, (0.4,) * 3, (0.2,) * 3, {"encoder": to_plain(model, EncoderConfig)})


def stock(name: str, folder: Path, library: str = "mmdet") -> Any:
    path = folder / "theirs.py"
    path.write_text(f"_base_ = '{library}::{name}.py'\n")
    return load_config(path)


def build(config: Any) -> Any:
    from mmengine.registry import MODELS, init_default_scope

    from downstream.openmmlab.runner import replace_sync_bn

    init_default_scope(config.default_scope)
    replace_sync_bn(config.model)
    return MODELS.build(config.model)


@pytest.mark.parametrize(
    ("model", "finest"),
    [(replace(DYVIT, patch=p), p) for p in (1, 2, 4, 8)]
    + [(replace(VIT, patch=p), p / 4) for p in (4, 8, 14, 16)],
)
def test_points_and_ranges_of_fcos_follow_any_encoder(model, finest, tmp_path):
    config = stock(FCOS, tmp_path)
    set_encoder(config, described(model), TrainOptions(head_channels=32))
    detector = build(config)
    check_strides(detector)
    head = detector.bbox_head
    assert [stride[0] for stride in head.prior_generator.strides] == [finest * 2**i for i in range(1, 6)]
    assert head.regress_ranges[0] == (-1, 16 * finest) and head.regress_ranges[-1] == (128 * finest, 1e8)


@pytest.mark.parametrize(
    "name",
    [
        "atss/atss_r50_fpn_1x_coco",
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
        "foveabox/fovea_r50_fpn_4xb4-1x_coco",
        "guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco",
        "libra_rcnn/libra-retinanet_r50_fpn_1x_coco",
        "mask_rcnn/mask-rcnn_r50_fpn_1x_coco",
        "reppoints/reppoints-moment_r50_fpn_1x_coco",
        "solo/solo_r50_fpn_1x_coco",
    ],
)
def test_heads_of_mmdet_follow_an_encoder_of_patch_2(name, tmp_path):
    """And what is left at 4, as it was for all but anchors, is refused."""
    config = stock(name, tmp_path)
    set_encoder(config, described(replace(DYVIT, patch=2)), TrainOptions())
    check_strides(build(config))
    config = stock(name, tmp_path)
    set_encoder(config, described(replace(DYVIT, patch=4)), TrainOptions())
    config.model.backbone.encoder.patch = 2
    config.model.backbone.encoder.windows = to_plain(replace(DYVIT, patch=2), EncoderConfig)["windows"]
    with pytest.raises(BadInput, match=r"^model\.\w+.* \(\w+\): its .*strides are .* but the maps "):
        check_strides(build(config))


def test_sizes_that_share_out_boxes_follow_too(tmp_path):
    config = stock("mask_rcnn/mask-rcnn_r50_fpn_1x_coco", tmp_path)
    set_encoder(config, described(replace(DYVIT, patch=2)), TrainOptions())
    extractor = config.model.roi_head.mask_roi_extractor
    assert (list(extractor.featmap_strides), extractor.finest_scale) == ([2, 4, 8, 16], 28)


def test_an_encoder_of_the_usual_patch_changes_no_stride(tmp_path):
    before, after = stock(FCOS, tmp_path), stock(FCOS, tmp_path)
    set_encoder(after, described(DYVIT), TrainOptions())
    assert after.model.bbox_head == before.model.bbox_head


def test_strides_are_fitted_from_those_of_the_configurations_own_encoder():
    """A configuration of ours that was made for patch 2 keeps its strides with another encoder of patch 2."""
    config = load_config(PRESETS / "mmdet" / "faster-rcnn_dyvit_fpn_1x_coco.py")
    small = described(replace(DYVIT, patch=2))
    for _ in range(2):
        set_encoder(config, small, TrainOptions())
        assert list(config.model.rpn_head.anchor_generator.strides) == [2, 4, 8, 16, 32]
    set_encoder(config, described(DYVIT), TrainOptions())
    assert list(config.model.rpn_head.anchor_generator.strides) == [4, 8, 16, 32, 64]


def test_a_configuration_for_a_plain_vit_takes_a_dyvit_and_the_other_way_round():
    for name, model in (("mask-rcnn_vit_sfp_1x_coco", DYVIT), ("retinanet_dyvit_fpn_1x_coco", VIT)):
        config = load_config(PRESETS / "mmdet" / f"{name}.py")
        set_encoder(config, described(model), TrainOptions(head_channels=32))
        check_strides(build(config))


def test_checking_leaves_the_model_as_it_was(tmp_path):
    config = stock(FCOS, tmp_path)
    set_encoder(config, described(DYVIT), TrainOptions(head_channels=32))
    detector = build(config).train()
    before, state = {k: v.clone() for k, v in detector.state_dict().items()}, torch.get_rng_state()
    check_strides(detector)
    assert detector.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in detector.state_dict().items())
