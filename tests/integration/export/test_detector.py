"""Detectors as one graph against mmdet's own predictions, and ONNX Runtime against the graph."""

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from detectors import MODELS, SMALL, Built, build, mmdet_predicts, normalised, photographs
from downstream_data import VIT
from torch import Tensor, nn

from coma.config import EncoderConfig
from coma.errors import BadInput
from downstream.tasks.detection import Detector
from export.custom_ops import translations
from export.graphs.detection_ops import anchors_at, pad_images
from export.graphs.detector import detector
from export.graphs.detector_config import read_settings

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.filterwarnings("ignore"),  # mm's packages, and torch.onnx, warn of each other
]

SIZES = [(96, 128), (64, 64), (131, 75), (40, 50)]  # one odd, one less than two units (32 px)
"""Heights and widths in pixels."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Built:
    return Built(tmp_path_factory.mktemp("detectors"))


def agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same detections, whatever the order of those that are equally likely."""
    rows, others = (as_rows(each) for each in (found, expected))
    assert len(rows) == len(others)
    if len(rows):
        distance, match = torch.cdist(rows, others, p=math.inf).min(1)
        assert distance.max() < 1e-3 and len(match.unique()) == len(match)


def as_rows(detections: tuple[Tensor, ...]) -> Tensor:
    """Returns a row for every detection of one image: all that is known of it."""
    boxes, scores, labels, *masks = detections
    there = scores > 0
    parts = [boxes, 10 * scores[:, None], 1e3 * labels[:, None], *(10 * mask.flatten(1) for mask in masks)]
    return torch.cat(parts, 1)[there]


def in_order(detections: tuple[Tensor, ...], size: tuple[int, int]) -> None:
    """Likeliest first, inside the image, and zeros after the last."""
    boxes, scores, labels, *masks = detections
    assert (scores[:, :-1] >= scores[:, 1:]).all() and scores.min() >= 0 and scores.max() <= 1
    assert boxes.min() >= 0 and boxes[..., 2].max() <= size[1] and boxes[..., 3].max() <= size[0]
    assert torch.equal(labels == -1, scores == 0) and boxes[labels == -1].eq(0).all()
    assert all(mask[labels == -1].eq(0).all() and mask.min() >= 0 and mask.max() <= 1 for mask in masks)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * each.startswith("cascade")) for each in MODELS]
)
def test_the_form_finds_what_mmdet_finds(name, models):
    model, config = models[name]
    module = detector(model, config.head)
    counts = []
    for number, size in enumerate(SIZES):
        pictures = photographs(*size, count=1 + number % 3)
        expected = mmdet_predicts(model, pictures)
        with torch.no_grad(), warnings.catch_warnings(action="error"):
            found = module(normalised(pictures, config))
        in_order(found, size)
        assert len(found) == len(expected[0]) and found[0].dtype == torch.float32
        for i, reference in enumerate(expected):
            agree(tuple(each[i] for each in found), tuple(reference.values()))
            counts.append(len(reference["scores"]))
    assert min(counts) >= 10


def test_the_model_given_stays_as_it_is(models):
    model, config = models["mask-rcnn"]
    before = copy.deepcopy(model.state_dict())
    model.train()
    module = detector(model, config.head)
    assert model.training and not any(module.training for module in module.modules())
    for weights in module.parameters():
        weights.data.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.eval()


def test_nothing_found_is_zeros_and_class_minus_one(models):
    model, config = models["mask-rcnn"]
    for least, number in ((0.9999, 0), (0.85, None)):
        head = copy.deepcopy(config.head or {})
        head["model"]["test_cfg"]["rcnn"]["score_thr"] = least
        with torch.no_grad():
            found = detector(model, head)(normalised(photographs(96, 128, 2), config))
        in_order(found, (96, 128))
        count = int((found[1] > 0).sum())
        assert count == number if number is not None else 0 < count < found[1].numel()
        assert found[1][found[1] > 0].gt(least).all() and [len(each[0]) for each in found] == [60] * 4


def test_boxes_are_float32_whatever_the_weights(models):
    model, config = models["mask-rcnn"]
    module = detector(model, config.head).to(torch.bfloat16)
    with torch.no_grad():
        found = module(normalised(photographs(64, 96, 2), config))
    assert [each.dtype for each in found] == [torch.float32, torch.float32, torch.int64, torch.float32]
    in_order(found, (64, 96))
    assert (found[0] * 2 % 1 != 0).any()  # not rounded to what bfloat16 knows of 64 pixels


def export(module: nn.Module, path: Path, axes: dict[int, str], size: tuple[int, int] = (96, 128)) -> Path:
    program = torch.onnx.export(
        module,
        (torch.randn(2, 3, *size),),
        input_names=["images"],
        dynamo=True,
        dynamic_shapes=(axes,),
        opset_version=18,
        external_data=False,
        custom_translation_table=translations(),
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    return path


FEW_LEVELS = {
    "rpn_head.anchor_generator.scales": [2],
    "rpn_head.anchor_generator.strides": [16, 32, 64],
    "roi_head.bbox_roi_extractor.featmap_strides": [16, 32],
    "roi_head.bbox_roi_extractor.finest_scale": 20,
}
"""Smaller graphs, which take less time to export."""
OF_MASKS = {
    "roi_head.mask_roi_extractor.featmap_strides": [16, 32],
    "roi_head.mask_roi_extractor.finest_scale": 20,
    "roi_head.mask_head.num_convs": 1,
}
OF_DYVIT = {"backbone.out_indices": (2, 3), "neck.in_channels": [32, 64], "neck.num_outs": 3}
OF_VIT = {"neck.start_level": 2, "neck.num_outs": 3}
TWO_STAGES = {"roi_head.num_stages": 2, "roi_head.bbox_head.1.reg_class_agnostic": False}
RETINA = {"bbox_head.anchor_generator.strides": [16, 32, 64], "bbox_head.stacked_convs": 1}
SHALLOW = replace(VIT, depth=1)
ANY = {0: "batch", 2: "height", 3: "width"}
EXPORTS: dict[str, tuple[Detector, EncoderConfig, dict[str, Any], dict[int, str]]] = {
    "faster-rcnn, any batch": ("faster-rcnn", SHALLOW, FEW_LEVELS | OF_VIT, {0: "batch"}),
    "cascade, any size": ("cascade-mask-rcnn", SMALL, FEW_LEVELS | OF_MASKS | OF_DYVIT | TWO_STAGES, ANY),
    "retinanet, any size": ("retinanet", SHALLOW, RETINA | OF_VIT, ANY),
}


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * each.endswith("any size")) for each in EXPORTS]
)
def test_onnx_runtime_finds_the_same(name, tmp_path):
    preset, encoder, changes, axes = EXPORTS[name]
    model, config = build(tmp_path / "artifact", preset, encoder, changes)
    module = detector(model, config.head or {})
    path = export(module, tmp_path / "model.onnx", axes)
    check_file(path, masks="mask" in preset)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for number, size in enumerate(SIZES if axes is ANY else [(96, 128)] * 3):
        batch = 1 + number % 3
        images = normalised(photographs(*size, count=batch), config)
        with torch.no_grad():
            expected = module(images)
        found = tuple(torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()}))
        assert [each.dtype for each in found] == [each.dtype for each in expected]
        in_order(found, size)
        assert (expected[1] > 0).sum(1).min() >= 10
        for i in range(batch):
            agree(tuple(each[i] for each in found), tuple(each[i] for each in expected))


def check_file(path: Path, masks: bool) -> None:
    """Standard operators of opset 18, and outputs of one length."""
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert {each.domain: each.version for each in file.opset_import} == {"": 18} and not file.functions
    assert all(node.domain == "" for node in file.graph.node)
    assert all(len(get(node, "perm")) <= 8 for node in file.graph.node if node.op_type == "Transpose")
    shapes = [each.type.tensor_type.shape.dim for each in file.graph.output]
    lengths = [[axis.dim_param or axis.dim_value for axis in shape] for shape in shapes]
    assert lengths == [["batch", 60, 4], ["batch", 60], ["batch", 60], ["batch", 60, 28, 28]][: 3 + masks]


def get(node: onnx.NodeProto, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(each) for each in node.attribute if each.name == name)


def test_padding_is_at_the_right_and_bottom():
    padded = pad_images(torch.ones(1, 1, 5, 8), 4, value=7.0)
    assert padded.shape == (1, 1, 8, 8) and padded[0, 0, :5].eq(1).all() and padded[0, 0, 5:].eq(7).all()


@pytest.mark.parametrize(
    "options",
    [
        {"scales": [8], "ratios": [0.5, 1.0, 2.0]},
        {"octave_base_scale": 4, "scales_per_octave": 3, "ratios": [0.5, 1.0]},
        {"scales": [2, 4], "ratios": [0.5, 3.0], "scale_major": False, "center_offset": 0.5},
        {"scales": [2], "ratios": [1.0], "base_sizes": [9, 17], "strides": [[4, 8], [16, 8]]},
    ],
)
def test_anchors_are_those_of_mmdet(options, models):
    from mmdet.models.task_modules import AnchorGenerator

    options = {"strides": [8, 16], **options}
    plain = copy.deepcopy(models["retinanet"][1].head or {})["model"]
    plain["bbox_head"]["anchor_generator"] = {"type": "AnchorGenerator", **options}
    ours = read_settings(plain).candidates
    strides = [tuple(each) if isinstance(each, list) else each for each in options["strides"]]
    theirs = AnchorGenerator(**{**options, "strides": strides})
    for level, expected in enumerate(theirs.grid_priors([(3, 5), (2, 2)], device="cpu")):
        anchors, width = torch.tensor(ours.anchors[level]), (5, 2)[level]
        found = anchors_at(torch.arange(len(expected)), anchors, ours.strides[level], width)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("retinanet", "type", "YOLOX", "of type YOLOX cannot .*FasterRCNN, MaskRCNN, CascadeRCNN, RetinaNet"),
        ("retinanet", "bbox_head.type", "SABLRetinaHead", "bbox_head of type SABLRetinaHead"),
        ("retinanet", "bbox_head.loss_cls.use_sigmoid", False, "bbox_head.loss_cls without use_sigmoid"),
        ("retinanet", "test_cfg.nms.type", "soft_nms", "test_cfg.nms of type soft_nms"),
        ("retinanet", "test_cfg.nms_pre", -1, "test_cfg.nms_pre must be at least 1"),
        ("mask-rcnn", "rpn_head.type", "CascadeRPNHead", "rpn_head of type CascadeRPNHead"),
        ("mask-rcnn", "rpn_head.anchor_generator.centers", [0], "anchor_generator.centers"),
        ("mask-rcnn", "rpn_head.anchor_generator.type", "SSDAnchorGenerator", "SSDAnchorGenerator"),
        ("mask-rcnn", "rpn_head.bbox_coder.add_ctr_clamp", True, "bbox_coder.add_ctr_clamp"),
        (
            "mask-rcnn",
            "rpn_head.bbox_coder.type",
            "TBLRBBoxCoder",
            "rpn_head.bbox_coder of type TBLRBBoxCoder",
        ),
        ("mask-rcnn", "roi_head.type", "PISARoIHead", "roi_head of type PISARoIHead"),
        ("mask-rcnn", "roi_head.shared_head", {"type": "ResLayer"}, "shared_head ResLayer"),
        ("mask-rcnn", "roi_head.bbox_head.type", "DoubleConvFCBBoxHead", "DoubleConvFCBBoxHead"),
        ("mask-rcnn", "roi_head.bbox_head.with_reg", False, "without boxes"),
        ("mask-rcnn", "roi_head.mask_head.type", "CoarseMaskHead", "mask_head of type CoarseMaskHead"),
        ("mask-rcnn", "roi_head.bbox_roi_extractor.type", "GenericRoIExtractor", "GenericRoIExtractor"),
        ("mask-rcnn", "roi_head.mask_roi_extractor.roi_layer.type", "RoIPool", "roi_layer of type RoIPool"),
        ("mask-rcnn", "roi_head.bbox_roi_extractor.roi_layer.pool_mode", "max", "pool_mode = 'max'"),
        ("mask-rcnn", "test_cfg.rcnn.nms.class_agnostic", True, "test_cfg.rcnn.nms.class_agnostic"),
        ("mask-rcnn", "test_cfg.rcnn.max_per_img", -1, "test_cfg.rcnn.max_per_img must be at least 1"),
    ],
)
def test_what_cannot_be_exported_is_named(name, place, value, message, models):
    model, config = models[name]
    head = copy.deepcopy(config.head or {})
    *path, last = place.split(".")
    node = head["model"]
    for each in path:
        node = node[each]
    node[last] = value
    with pytest.raises(BadInput, match=message):
        detector(model, head)


def test_layers_and_losses_that_cannot_be_exported_are_named(models):
    from mmcv.ops import DeformConv2d
    from mmdet.models.losses import SeesawLoss

    model, config = models["mask-rcnn"]
    deformable = copy.deepcopy(model)
    deformable.neck.fpn_convs[1].conv = DeformConv2d(32, 32, 3)
    with pytest.raises(BadInput, match=r"neck.fpn_convs.1.conv is a DeformConv2d"):
        detector(deformable, config.head)
    seesaw = copy.deepcopy(model)
    seesaw.roi_head.bbox_head.loss_cls = SeesawLoss(num_classes=3)
    with pytest.raises(BadInput, match=r"roi_head.bbox_head.loss_cls is a SeesawLoss"):
        detector(seesaw, config.head)
