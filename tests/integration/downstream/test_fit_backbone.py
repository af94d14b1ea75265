"""Our encoders speak like the backbone that they replace: `coma.fit_backbone`, contract and adapter."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from downstream_data import DYVIT, VIT, artifact

import coma
from coma.config import EncoderConfig
from coma.errors import BadInput
from coma.models import build_encoder
from downstream.configs.outputs import Outputs
from downstream.openmmlab.adapter import OutputAdapter, choose_stages

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.filterwarnings("ignore"),  # mm's configurations and models warn of each other
]
ZOO = {library: zoo.stock_configs(library) for library in ("mmdet", "mmseg")}
PSPNET = "mmseg/pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024"
YOLOX = "mmdet/yolox/yolox_tiny_8xb8-300e_coco"


def stock(name: str) -> Path:
    library, _, rest = name.partition("/")
    return ZOO[library] / f"{rest}.py"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    models: dict[str, EncoderConfig] = {f"patch {p}": replace(DYVIT, patch=p) for p in (1, 2, 4)}
    models |= {f"vit {p}": replace(VIT, patch=p) for p in (14, 16)}
    return {name: artifact(folder / name, model) for name, model in models.items()}


def backbone_of(config: Any) -> Any:
    from mmengine.registry import MODELS

    return MODELS.build(config.model.backbone)


# The adapter


@pytest.mark.parametrize("model", [DYVIT, replace(DYVIT, patch=2), replace(DYVIT, patch=1), VIT,
                                   replace(VIT, patch=14)], ids=str)  # fmt: skip
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (4, 8, 8, 8), (32,), (8, 16, 32, 64), (16, 8, 4, 2, 1)])
def test_any_encoder_outputs_any_maps_of_any_image(model, strides):
    channels = tuple(3 + i for i in range(len(strides)))
    adapter = OutputAdapter(model.widths, model.strides, Outputs(channels, strides))
    images = torch.randn(2, 3, 70, 101)
    maps = adapter(images, build_encoder(model)(images))
    expected = [(2, c, -(-70 // s), -(-101 // s)) for c, s in zip(channels, strides, strict=True)]
    assert [tuple(map.shape) for map in maps] == expected
    torch.stack([map.square().mean() for map in maps]).sum().backward()
    assert all(each.grad is not None for each in adapter.parameters())


def test_a_map_that_fits_is_only_normalised():
    adapter = OutputAdapter(DYVIT.widths, DYVIT.strides, Outputs((16, 64), (8, 32)))
    images = torch.randn(1, 3, 64, 64)
    pyramid = build_encoder(DYVIT)(images)
    second, last = adapter(images, pyramid)
    assert torch.equal(last, pyramid[3])
    torch.testing.assert_close(second, torch.nn.functional.layer_norm(
        pyramid[1].movedim(1, -1), (16,), eps=1e-6).movedim(-1, 1), atol=1e-4, rtol=1e-4)  # fmt: skip


def test_resized_maps_stay_in_place():
    """A bright pixel of one stage is bright at the same place of the image at every stride."""
    adapter = OutputAdapter((1,), (8,), Outputs((1, 1, 1), (4, 8, 16)))
    map = torch.zeros(1, 1, 8, 8)
    map[0, 0, 2, 5] = 1
    for each, stride in zip(adapter(torch.zeros(1, 3, 64, 64), [map]), (4, 8, 16), strict=True):
        row, column = divmod(int(each.flatten().argmax()), each.shape[-1])
        assert row * stride <= 2 * 8 + 4 <= (row + 1) * stride
        assert column * stride <= 5 * 8 + 4 <= (column + 1) * stride


@pytest.mark.parametrize(
    ("strides", "outputs", "stages"),
    [
        ((4, 8, 16, 32), Outputs((1, 1, 1, 1), (4, 8, 16, 32)), [(0,), (1,), (2,), (3,)]),
        ((2, 4, 8, 16), Outputs((1, 1, 1), (8, 16, 32)), [(2,), (3,), (3,)]),
        ((4, 8, 16, 32), Outputs((1, 1, 1, 1), (4, 8, 8, 8)), [(0,), (1,), (2,), (1, 2, 3)]),
        ((4, 8, 16, 32), Outputs((1, 1), (8, 32)), [(1,), (3,)]),
        ((4, 8, 16, 32), Outputs((1,), (16,)), [(2, 3)]),
        ((4, 8, 16, 32), Outputs((1, 1), (16, 4)), [(2, 3), (0, 1, 2, 3)]),
        ((4, 8, 16, 32), Outputs((1, 1, 1), (4, 8, 16), unused=(0, 2)), [(), (1, 2, 3), ()]),
        ((16,), Outputs((1, 1), (8, 32)), [(0,), (0,)]),
    ],
)
def test_the_deepest_stage_always_has_a_use(strides, outputs, stages):
    assert choose_stages(strides, outputs) == stages


def test_other_forms_of_outputs():
    images = torch.randn(2, 3, 64, 64)
    pyramid = build_encoder(DYVIT)(images)
    single = OutputAdapter(DYVIT.widths, DYVIT.strides, Outputs((5, 6), (8, 8), single=0))
    assert len(single.train()(images, pyramid)) == 2 and single.eval()(images, pyramid).shape[1] == 5
    tokens = OutputAdapter(DYVIT.widths, DYVIT.strides, Outputs((5,), (16,), class_token=True))
    map, token = tokens(images, pyramid)[0]
    torch.testing.assert_close(token, map.mean((2, 3)))
    first, second, _ = OutputAdapter(
        DYVIT.widths, DYVIT.strides, Outputs((5, 6), (4, 8), unused=(0,), image=True)
    )(images, pyramid)
    assert first is images and second.shape == (2, 5, 16, 16) and not second.any()


@pytest.mark.parametrize("outputs", [{"channels": [1], "strides": []}, {"channels": [1], "strides": [0]},
                                     {"channels": [1], "strides": [4], "unused": [0]},
                                     {"channels": [1], "strides": [4], "single": 1}])  # fmt: skip
def test_outputs_that_are_none_are_refused(outputs):
    from downstream.openmmlab.backbones import DyViT

    with pytest.raises(BadInput, match="outputs"):
        DyViT(preset="tiny", outputs=outputs)


# The contract


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        (PSPNET, Outputs((256, 512, 1024, 2048), (4, 8, 8, 8), unused=(0, 1))),
        ("mmseg/unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024",
         Outputs((1024, 512, 256, 128, 64), (16, 8, 4, 2, 1), unused=(0, 1, 2))),
        ("mmseg/ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024",
         Outputs((64, 128), (8, 8), single=1)),
        ("mmseg/dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512", Outputs((768,) * 4, (16,) * 4, class_token=True)),
        ("mmdet/detectors/cascade-rcnn_r50-rfp_1x_coco",
         Outputs((256, 512, 1024, 2048), (4, 8, 16, 32), image=True)),
        (YOLOX, Outputs((96, 192, 384), (8, 16, 32))),
        ("mmdet/detr/detr_r50_8xb2-150e_coco", Outputs((2048,), (32,))),
        ("mmdet/dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco",
         Outputs((256, 512, 1024, 2048), (4, 8, 16, 32))),
    ],
)  # fmt: skip
def test_a_backbone_tells_what_it_outputs(name, outputs):
    from mmengine.config import Config

    from downstream.configs.contract import backbone_outputs

    state = torch.get_rng_state()
    model = Config.fromfile(stock(name)).model
    assert backbone_outputs(model, name[:5]) == outputs
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_built_is_guessed_and_said(encoders, caplog):
    """mmpretrain, which has these backbones, is not installed."""
    with caplog.at_level(logging.INFO):
        path = stock("mmseg/convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512")
        config = coma.fit_backbone(path, encoders["patch 4"])
    assert config.model.backbone.outputs.channels == (96, 192, 384, 768)
    assert "mmpretrain is not installed and not imported" in caplog.text
    assert "assumed to have channels (96, 192, 384, 768) at strides (4, 8, 16, 32)" in caplog.text
    assert config.train_dataloader.dataset.pipeline[0] == {"type": "ReadImage"}
    assert config.optim_wrapper.constructor == "LayerDecayConstructor"
    assert set(config.optim_wrapper.paramwise_cfg) == {"decay_rate"}


def test_branches_are_refused_in_a_line(encoders):
    path = stock("mmdet/tridentnet/tridentnet_r50-caffe_1x_coco")
    with pytest.raises(BadInput, match=r"tridentnet.*TridentResNet outputs 3 maps of every image"):
        coma.fit_backbone(path, encoders["patch 4"])


# The function


def test_a_configuration_object_is_adapted_as_a_copy(encoders):
    from mmengine.config import Config

    theirs = Config.fromfile(stock(YOLOX))
    before = theirs.pretty_text
    ours = coma.fit_backbone(theirs, encoders["patch 2"], frozen_stages=1, drop_path=0.3)
    assert theirs.pretty_text == before
    assert ours.model.backbone.frozen_stages == 1 and ours.model.backbone.drop_path == 0.3
    assert ours.model.bbox_head == theirs.model.bbox_head and ours.model.neck == theirs.model.neck
    assert "LoadImageFromFile" not in str(ours.train_dataloader) and "ReadImage" in str(ours.train_dataloader)
    again = coma.fit_backbone(ours, encoders["vit 16"])
    assert again.model.backbone.type == "PlainViT"
    assert again.model.backbone.outputs == ours.model.backbone.outputs


def test_pipelines_that_hooks_switch_to_read_our_images_too(encoders):
    config = coma.fit_backbone(stock("mmdet/rtmdet/rtmdet_tiny_8xb32-300e_coco"), encoders["patch 4"])
    assert "LoadImageFromFile" not in str(config.custom_hooks)


def test_checkpoints_of_other_backbones_are_not_loaded(encoders, caplog):
    with caplog.at_level(logging.INFO):
        path = stock("mmdet/faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco")
        config = coma.fit_backbone(path, encoders["patch 4"])
    assert "model.roi_head.shared_head.init_cfg=open-mmlab://" in caplog.text
    assert "init_cfg" not in config.model.roi_head.shared_head


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((YOLOX,), {"preset": "tiny", "lr": 1}, "lr: must be among drop_path"),
        ((YOLOX,), {}, "give an artifact"),
        (("mmdet/yolox/none",), {"preset": "tiny"}, "no such file"),
        (("mmdet/common/ms_3x_coco",), {"preset": "tiny"}, r"ms_3x_coco\.py: has no model with a backbone"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
    with pytest.raises(BadInput, match=message):
        coma.fit_backbone(stock(*arguments), **options)


@pytest.mark.parametrize("name", ["patch 1", "patch 2", "patch 4", "vit 14", "vit 16"])
def test_anchor_free_heads_get_their_strides_from_any_encoder(name, encoders):
    from mmengine.registry import MODELS, init_default_scope

    config = coma.fit_backbone(stock(YOLOX), encoders[name])
    init_default_scope("mmdet")
    model = MODELS.build(config.model).eval()
    maps = model.extract_feat(torch.zeros(1, 3, 128, 160))
    strides = [stride for stride, _ in model.bbox_head.prior_generator.strides]
    assert [tuple(map.shape[-2:]) for map in maps] == [(128 // s, 160 // s) for s in strides]


# One of each kind of neck and head: a step of training, without unused parameters, and a prediction

QUICK = [YOLOX, PSPNET, "mmdet/fcos/fcos_r50-caffe_fpn_gn-head_1x_coco"]
SLOW = [
    "mmdet/rtmdet/rtmdet-ins_tiny_8xb32-300e_coco",
    "mmdet/detr/detr_r50_8xb2-150e_coco",
    "mmdet/deformable_detr/deformable-detr_r50_16xb2-50e_coco",
    "mmdet/dyhead/atss_r50_fpn_dyhead_1x_coco",
    "mmdet/faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco",
    "mmdet/ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco",
    "mmdet/yolof/yolof_r50-c5_8xb8-1x_coco",
    "mmdet/yolo/yolov3_d53_8xb8-ms-608-273e_coco",
    "mmseg/ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024",
    "mmseg/dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512",
    "mmseg/fastfcn/fastfcn_r50-d32_jpu_psp_4xb2-80k_cityscapes-512x1024",
    "mmseg/mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024",
    "mmseg/unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024",
    "mmseg/vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512",
]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_a_step_and_a_prediction(name, encoders):
    zoo.run_model(stock(name), 128, encoders["patch 4"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [YOLOX, PSPNET])
@pytest.mark.parametrize("encoder", ["patch 1", "patch 2", "vit 14"])
def test_a_step_of_other_encoders(name, encoder, encoders):
    zoo.run_model(stock(name), 64, encoders[encoder])


def test_parameters_without_a_use_are_noticed(encoders, monkeypatch):
    """The fault that the contract avoids: maps that no head looks at, with layers of their own."""
    from downstream.configs import contract

    monkeypatch.setattr(contract, "_unused", lambda model, outputs: ())
    with pytest.raises(ValueError, match=r"parameters without a gradient: backbone\.adapter"):
        zoo.run_model(stock(PSPNET), 64, encoders["patch 4"])
