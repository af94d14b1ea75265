"""Operators that stand in for mmcv's, called through mmcv: cases by hand, plain formulas, refusals."""

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from downstream_data import provided_ops

from coma.errors import BadInput
from downstream.openmmlab.mmcv_ops import OPERATORS

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # mmengine's and mmcv's own
]

WHOLE = [0.0, 0.0, 10.0, 10.0]
LOW = [0.0, 0.0, 10.0, 6.0]  # overlaps WHOLE by 60 / 100
HALF = [0.0, 0.0, 10.0, 5.0]  # overlaps WHOLE by 50 / 100, LOW by 50 / 60
APART = [20.0, 20.0, 30.0, 30.0]


@pytest.fixture(scope="module")
def ops() -> Any:
    return provided_ops()


def boxes(*corners: list[float]) -> torch.Tensor:
    return torch.tensor(corners)


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values)


# Suppression


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.5, [0, 2]), (0.6, [0, 1, 2]), (0.7, [0, 1, 2])],  # an overlap of the threshold itself stays
)
def test_nms_drops_what_overlaps_a_better_box(ops, threshold, kept):
    dets, inds = ops.nms(boxes(WHOLE, LOW, APART), scores(0.9, 0.8, 0.7), threshold)
    assert inds.tolist() == kept
    torch.testing.assert_close(dets[0], torch.tensor([*WHOLE, 0.9]))


def test_nms_answers_best_first(ops):
    assert ops.nms(boxes(LOW, APART, WHOLE), scores(0.3, 0.2, 0.9), 0.5)[1].tolist() == [2, 1]


def test_a_box_that_was_dropped_drops_no_other(ops):
    """The last overlaps LOW, which goes, by 30 / 60 and WHOLE, which stays, by 30 / 100."""
    last = [0.0, 3.0, 10.0, 6.0]
    assert ops.nms(boxes(WHOLE, LOW, last), scores(0.9, 0.8, 0.7), 0.45)[1].tolist() == [0, 2]


def test_offset_makes_boxes_wider(ops):
    """Overlaps 36 / 81 and, with a pixel more on each side, 50 / 100."""
    pair = boxes([0.0, 0, 9, 9], [0, 0, 9, 4]), scores(0.9, 0.8)
    assert ops.nms(*pair, 0.45, offset=0)[1].tolist() == [0, 1]
    assert ops.nms(*pair, 0.45, offset=1)[1].tolist() == [0]


def test_nms_takes_scores_above_a_threshold_and_at_most_so_many(ops):
    four = boxes(APART, WHOLE, LOW, [50, 50, 60, 60]), scores(0.1, 0.9, 0.8, 0.3)
    assert ops.nms(*four, 0.5, score_threshold=0.1)[1].tolist() == [1, 3]
    assert ops.nms(*four, 0.5, max_num=2)[1].tolist() == [1, 3]
    assert ops.nms(*four, 0.5)[1].tolist() == [1, 3, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nms_in_other_precisions(ops, dtype):
    given = boxes(WHOLE, HALF, APART).to(dtype), scores(0.9, 0.8, 0.7).to(dtype)
    assert ops.nms(*given, 0.4)[1].tolist() == [0, 2]
    dets, inds = ops.soft_nms(*given, method="naive")
    assert dets.dtype == dtype and inds.tolist() == [0, 2]


def test_numpy_in_numpy_out(ops):
    dets, inds = ops.nms(np.array([WHOLE, LOW]), np.array([0.9, 0.8]), 0.5)
    assert isinstance(dets, np.ndarray) and inds.tolist() == [0]


def test_nothing_to_suppress(ops):
    nothing = torch.zeros(0, 4), torch.zeros(0)
    assert ops.nms(*nothing, 0.5)[1].tolist() == []
    dets, inds = ops.soft_nms(*nothing)
    assert dets.shape == (0, 5) and inds.dtype == torch.int64


def test_classes_do_not_suppress_each_other(ops):
    three = boxes(WHOLE, LOW, LOW), scores(0.9, 0.8, 0.7)
    labels = torch.tensor([0, 1, 1])
    dets, kept = ops.batched_nms(*three, labels, {"type": "nms", "iou_threshold": 0.5})
    assert kept.tolist() == [0, 1]
    torch.testing.assert_close(dets, torch.tensor([[*WHOLE, 0.9], [*LOW, 0.8]]))
    _, kept = ops.batched_nms(*three, labels, {"type": "nms", "iou_threshold": 0.5}, class_agnostic=True)
    assert kept.tolist() == [0]


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("naive", {}, {0: 0.9, 2: 0.7}),
        ("linear", {}, {0: 0.9, 2: 0.7, 1: 0.8 * 0.5}),
        ("linear", {"iou_threshold": 0.5}, {0: 0.9, 2: 0.7, 1: 0.8 * 0.5}),
        ("linear", {"iou_threshold": 0.51}, {0: 0.9, 1: 0.8, 2: 0.7}),
        ("linear", {"min_score": 0.41}, {0: 0.9, 2: 0.7}),
        ("gaussian", {"sigma": 0.5}, {0: 0.9, 2: 0.7, 1: 0.8 * math.exp(-0.25 / 0.5)}),
        ("gaussian", {"sigma": 5}, {0: 0.9, 1: 0.8 * math.exp(-0.25 / 5), 2: 0.7}),
    ],
)
def test_soft_nms_lowers_scores(ops, method, options, expected):
    given = boxes(WHOLE, HALF, APART)
    dets, inds = ops.soft_nms(given, scores(0.9, 0.8, 0.7), method=method, **options)
    assert inds.tolist() == list(expected)
    torch.testing.assert_close(dets[:, 4], torch.tensor(list(expected.values())))
    torch.testing.assert_close(dets[:, :4], given[inds])


def test_soft_nms_lowers_a_score_once_per_better_box(ops):
    """HALF overlaps WHOLE by 1/2 and LOW by 5/6; LOW overlaps WHOLE by 3/5."""
    dets, inds = ops.soft_nms(boxes(HALF, LOW, WHOLE), scores(0.7, 0.8, 0.9))
    assert inds.tolist() == [2, 0, 1]  # 0.9, then 0.7/2 = 0.35 before 0.8 * 2/5 = 0.32
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.35, 0.8 * 2 / 5 / 6]))


def test_soft_nms_takes_the_first_box_whatever_its_score(ops):
    assert ops.soft_nms(boxes(WHOLE, APART), scores(0.01, 0.02), min_score=0.1)[1].tolist() == [1]


def test_soft_nms_offset(ops):
    pair = boxes([0.0, 0, 9, 9], [0, 0, 9, 4]), scores(0.9, 0.8)
    torch.testing.assert_close(ops.soft_nms(*pair, offset=0)[0][1, 4], torch.tensor(0.8 * (1 - 36 / 81)))
    torch.testing.assert_close(ops.soft_nms(*pair, offset=1)[0][1, 4], torch.tensor(0.8 * 0.5))


def test_boxes_without_area_overlap_nothing(ops):
    point = [3.0, 3.0, 3.0, 3.0]
    dets, inds = ops.soft_nms(boxes(point, point), scores(0.9, 0.8), method="gaussian")
    assert inds.tolist() == [0, 1]
    torch.testing.assert_close(dets[:, 4], scores(0.9, 0.8))


def test_nms_match_groups_boxes_with_what_suppresses_them(ops):
    dets = torch.cat([boxes(APART, HALF, LOW, WHOLE), scores(0.3, 0.6, 0.7, 0.8)[:, None]], dim=1)
    assert [group.tolist() for group in ops.nms_match(dets, 0.5)] == [[3, 2, 1], [0]]
    assert [group.tolist() for group in ops.nms_match(dets, 0.6)] == [[3, 2], [1], [0]]  # 0.6 reaches 0.6
    assert [group.tolist() for group in ops.nms_match(dets, 0.61)] == [[3], [2, 1], [0]]


# RoIAlign


def ramp() -> torch.Tensor:
    """10 y + x, `[1, 1, 8, 8]`: a bin's average is the value at its centre, whatever the samples."""
    line = torch.arange(8.0)
    return (10 * line[:, None] + line)[None, None]


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_roi_align_of_a_ramp(ops, sampling_ratio, scale):
    """Bins of 2 x 2 pixels with centres at y = 3 and 5, x = 2 and 4; aligned, half a pixel less of each."""
    rois = torch.tensor([[0, 1 / scale, 2 / scale, 5 / scale, 6 / scale]])
    centres = torch.tensor([[32.0, 34.0], [52.0, 54.0]])[None, None]
    bins = ops.roi_align(ramp(), rois, (2, 2), scale, sampling_ratio, "avg", False)
    torch.testing.assert_close(bins, centres)
    bins = ops.roi_align(ramp(), rois, (2, 2), scale, sampling_ratio, "avg", True)
    torch.testing.assert_close(bins, centres - 5.5)


@pytest.mark.parametrize(("sampling_ratio", "value"), [(0, 0.25), (1, 1.0), (2, 0.25), (3, 25 / 81)])
def test_roi_align_takes_as_many_samples_as_asked_for(ops, sampling_ratio, value):
    """One bright pixel in the middle of a bin of 2 x 2 pixels; 3 samples a side see 1/3, 1, 1/3 of it."""
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 3, 3] = 1
    rois = torch.tensor([[0.0, 2, 2, 4, 4]])
    bins = ops.roi_align(x, rois, (1, 1), 1.0, sampling_ratio, "avg", False)
    torch.testing.assert_close(bins, torch.full((1, 1, 1, 1), value))


def test_a_region_is_at_least_a_pixel_unless_aligned(ops):
    rois = torch.tensor([[0.0, 3, 3, 3, 3]])
    bins = ops.roi_align(ramp(), rois, (1, 1), 1.0, 1, "avg", False)
    assert bins.item() == 38.5
    assert ops.roi_align(ramp(), rois, (1, 1), 1.0, 1, "avg", True).item() == 27.5


def test_roi_align_takes_the_image_that_a_region_names_and_rows_before_columns(ops):
    x = torch.stack([ramp()[0], 100 + ramp()[0]])
    rois = torch.tensor([[1.0, 1, 2, 5, 6], [0, 1, 2, 5, 6]])
    bins = ops.roi_align(x, rois, (1, 2), 1.0, 0, "avg", False)
    torch.testing.assert_close(bins[:, 0], torch.tensor([[[142.0, 144.0]], [[42.0, 44.0]]]))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradient_of_roi_align_equals_finite_differences(ops, aligned, sampling_ratio):
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 0.5, 9.0, 7.0], [1, 2.0, 3.0, 12.5, 9.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: ops.roi_align(x, rois, (3, 2), 0.5, sampling_ratio, "avg", aligned), (x,)
    )


@pytest.mark.parametrize("of_boxes", ["float32", "the same"])  # mmdet gives boxes the type of the features
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_in_half_precision_rounds_once(ops, dtype, autocast, of_boxes):
    x = torch.randn(1, 3, 9, 9).to(dtype).requires_grad_()
    rois = torch.tensor([[0.0, 1, 1, 7, 6]])
    with torch.autocast("cpu", dtype, enabled=autocast):
        given = rois if of_boxes == "float32" else rois.to(dtype)
        bins = ops.roi_align(x, given, (2, 2), 1.0, 0, "avg", True)
    bins.sum().backward()
    wide = x.detach().float().requires_grad_()
    expected = ops.roi_align(wide, rois, (2, 2), 1.0, 0, "avg", True)
    expected.sum().backward()
    assert torch.equal(bins, expected.to(dtype))
    assert x.grad is not None and wide.grad is not None
    assert torch.equal(x.grad, wide.grad.to(dtype))


# Focal losses


def plain_sigmoid_focal(x, target, gamma, alpha, weight):
    """Equation 5 of arXiv 1708.02002, class by class."""
    rows = []
    for logits, label in zip(x, target.tolist(), strict=True):
        row = []
        for c, logit in enumerate(logits):
            p = 1 / (1 + torch.exp(-logit))
            if c == label:
                row.append(-alpha * (1 - p) ** gamma * torch.log(p))
            else:
                row.append(-(1 - alpha) * p**gamma * torch.log(1 - p))
        rows.append(torch.stack(row) * (1 if weight is None else weight[label]))
    return torch.stack(rows)


def plain_softmax_focal(x, target, gamma, alpha, weight):
    rows = []
    for logits, label in zip(x, target.tolist(), strict=True):
        p = torch.exp(logits[label]) / torch.exp(logits).sum()
        factor = alpha if weight is None else alpha * weight[label]
        rows.append(-factor * (1 - p) ** gamma * torch.log(p))
    return torch.stack(rows)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_focal_loss_and_gradient_equal_the_formula(ops, kind, gamma, weighted):
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    target = torch.tensor([0, 2, 1, 1, 0])
    if kind == "sigmoid" and not weighted:
        target[3] = 3  # background
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) if weighted else None
    plain = plain_sigmoid_focal if kind == "sigmoid" else plain_softmax_focal
    loss = getattr(ops, f"{kind}_focal_loss")

    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = plain(theirs, target, gamma, 0.3, weight)
    torch.testing.assert_close(loss(ours, target, gamma, 0.3, weight, "none"), expected)
    value = loss(ours, target, gamma, 0.3, weight, "mean")
    torch.testing.assert_close(value, expected.sum() / 5)
    value.backward()
    (expected.sum() / 5).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_sigmoid_focal_loss_of_one_logit_by_hand(ops):
    """At logit 0, p = 1/2: yes 0.25 * 1/4 * ln 2, no 0.75 * 1/4 * ln 2."""
    loss = ops.sigmoid_focal_loss(torch.zeros(1, 2), torch.tensor([1]), 2.0, 0.25, None, "none")
    torch.testing.assert_close(loss, torch.tensor([[0.75, 0.25]]) / 4 * math.log(2))


def test_sigmoid_focal_loss_of_large_logits_is_linear(ops):
    """-log(sigmoid(-200)) is 200; in float32, sigmoid(-200) is 0 and its logarithm infinite."""
    x = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    loss = ops.sigmoid_focal_loss(x, torch.tensor([0]), 2.0, 0.25, None, "none")
    torch.testing.assert_close(loss, torch.tensor([[0.25 * 200, 0.75 * 200]]))
    loss.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[-0.25, 0.75]]))


def test_softmax_focal_loss_of_a_negative_target_is_nothing(ops):
    probabilities, target = torch.full((2, 4), 0.25), torch.tensor([-1, 2])
    none, loss, slope, grad = torch.empty(0), torch.ones(2), torch.ones(2), torch.ones(2, 4)
    OPERATORS["softmax_focal_loss_forward"](probabilities, target, none, loss, gamma=2.0, alpha=0.5)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.5 * 9 / 16 * math.log(4)]))
    OPERATORS["softmax_focal_loss_backward"](probabilities, target, none, slope, grad, gamma=2.0, alpha=0.5)
    assert grad[0].tolist() == [0, 0, 0, 0] and slope[0] == 0
    assert grad[1, 2] < 0 < grad[1, 0]


def test_softmax_focal_loss_of_certainty_has_no_nan(ops):
    x = torch.tensor([[200.0, 0.0], [200.0, 0.0]], requires_grad=True)
    ops.softmax_focal_loss(x, torch.tensor([0, 1]), 0.5, 0.25, None, "sum").backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_focal_loss_in_half_precision(ops):
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    half = ops.sigmoid_focal_loss(x.half(), target, 2.0, 0.25, None, "none")
    expected = ops.sigmoid_focal_loss(x.half().float(), target, 2.0, 0.25, None, "none")
    assert torch.equal(half, expected.half())


@pytest.mark.filterwarnings("ignore::ImportWarning")  # mmcv's own
def test_mmdet_takes_its_focal_loss_from_here(ops):
    """What its RetinaNet calls on a GPU equals what it calls on a CPU."""
    focal = importlib.import_module("mmdet.models.losses.focal_loss")
    x, target = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 4])
    ours = focal.sigmoid_focal_loss(x, target, avg_factor=3)
    expected = focal.py_sigmoid_focal_loss(x, F.one_hot(target, 5)[:, :4], avg_factor=3)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(expected, x)[0])


# Refusals


def test_other_operators_are_refused_when_called(ops):
    with pytest.raises(BadInput, match=r"box_iou_rotated needs a compiled mmcv.*MMCV_WITH_OPS=1 pip install"):
        ops.box_iou_rotated(torch.rand(2, 5), torch.rand(2, 5))


def test_max_pooling_is_refused(ops):
    with pytest.raises(BadInput, match="pool_mode='max' needs a compiled mmcv"):
        ops.roi_align(ramp(), torch.tensor([[0.0, 1, 1, 4, 4]]), (2, 2), 1.0, 0, "max", True)
