"""Operators over whole maps that stand in for mmcv's, called through mmcv: loops, exact cases, gradients."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from downstream_data import provided_ops
from torch.autograd import gradcheck

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # mmengine's and mmcv's own
]


@pytest.fixture(scope="module")
def ops() -> Any:
    return provided_ops()


def rand(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64).requires_grad_(grad)


def bilinear(image: torch.Tensor, row: float, column: float) -> torch.Tensor:
    """Value of `[c, h, w]` between pixels, zero outside."""
    total = image.new_zeros(len(image))
    top, left = math.floor(row), math.floor(column)
    for r, c in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= r < image.shape[1] and 0 <= c < image.shape[2]:
            total = total + image[:, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return total


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution_is_a_sum_over_moved_samples(ops, modulated):
    """One output place by hand, of two groups of offsets, with stride, padding and dilation."""
    x, weight, bias = rand(1, 4, 6, 7), rand(3, 4, 3, 3), rand(3)
    offset, mask = rand(1, 2 * 2 * 9, 3, 4) * 4 - 2, rand(1, 2 * 9, 3, 4)
    if modulated:
        found = ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 2, 1, 1, 1, 2)
    else:
        found = ops.deform_conv2d(x, offset, weight, 2, 1, 1, 1, 2)
    for place_row, place_column in ((0, 0), (2, 3), (1, 2)):
        expected = bias.clone() if modulated else torch.zeros(3, dtype=torch.float64)
        for half, i, j in itertools.product(range(2), range(3), range(3)):
            at = half * 9 + i * 3 + j
            dy, dx = (float(offset[0, 2 * at + k, place_row, place_column]) for k in (0, 1))
            part = x[0, 2 * half : 2 * half + 2]
            seen = bilinear(part, place_row * 2 - 1 + i + dy, place_column * 2 - 1 + j + dx)
            seen = seen * mask[0, at, place_row, place_column] if modulated else seen
            expected = expected + weight[:, 2 * half : 2 * half + 2, i, j] @ seen
        torch.testing.assert_close(found[0, :, place_row, place_column], expected)


def test_without_offsets_it_is_a_convolution(ops):
    x, weight = rand(2, 4, 6, 7), rand(6, 2, 3, 3)
    found = ops.deform_conv2d(x, x.new_zeros(2, 18, 6, 7), weight, 1, 2, 2, 2, 1)
    torch.testing.assert_close(found, F.conv2d(x, weight, None, 1, 2, 2, 2))


def test_gradients_of_deformable_convolutions(ops):
    x, weight = rand(1, 2, 4, 4, grad=True), rand(2, 2, 3, 3, grad=True)
    offset = (rand(1, 18, 4, 4) * 0.8 + 0.1).requires_grad_()  # away from the corners of the interpolation
    mask, bias = rand(1, 9, 4, 4, grad=True), rand(2, grad=True)
    assert gradcheck(lambda *given: ops.deform_conv2d(*given, 1, 1), (x, offset, weight))
    assert gradcheck(
        lambda *given: ops.modulated_deform_conv2d(*given, 1, 1, 1, 1, 1), (x, offset, mask, weight, bias)
    )
    assert gradcheck(
        lambda *given: ops.modulated_deform_conv2d(*given, None, 1, 1, 1, 1, 1), (x, offset, mask, weight)
    )


def test_offsets_of_a_larger_map_are_read_from_the_start_of_each_image(ops):
    """As mmcv's kernels do, which mmdet's DyHead counts on."""
    x, weight, bias = rand(2, 2, 3, 4), rand(2, 2, 3, 3), rand(2)
    offset, mask = rand(2, 18, 6, 8), rand(2, 9, 6, 8)
    found = ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1, 1, 1, 1)
    for image in range(2):
        first_offsets = offset[image].reshape(-1)[: 18 * 12].view(1, 18, 3, 4)
        first_mask = mask[image].reshape(-1)[: 9 * 12].view(1, 9, 3, 4)
        expected = ops.modulated_deform_conv2d(
            x[image : image + 1], first_offsets, first_mask, weight, bias, 1, 1, 1, 1, 1
        )
        torch.testing.assert_close(found[image : image + 1], expected)


def test_half_precision_is_computed_in_full(ops):
    x, offset, weight = (each.half() for each in (rand(1, 2, 5, 5), rand(1, 18, 5, 5), rand(2, 2, 3, 3)))
    found = ops.deform_conv2d(x, offset, weight, 1, 1)
    expected = ops.deform_conv2d(x.float(), offset.float(), weight.float(), 1, 1).half()
    assert found.dtype == torch.float16 and torch.equal(found, expected)


def attention_inputs(grad: bool) -> tuple[torch.Tensor, ...]:
    shapes = torch.tensor([[4, 5], [2, 3]])
    value = rand(1, 26, 2, 3, grad=grad)
    locations = (rand(1, 3, 2, 2, 2, 2) * 0.6 + 0.21).requires_grad_(grad)
    weights = rand(1, 3, 2, 2, 2, grad=grad)
    return value, shapes, torch.tensor([0, 20]), locations, weights


def test_deformable_attention_is_a_weighted_sum_of_samples(ops):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    value, shapes, starts, locations, weights = attention_inputs(grad=False)
    found = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    for query, head in itertools.product(range(3), range(2)):
        expected = torch.zeros(3, dtype=torch.float64)
        for level, point in itertools.product(range(2), range(2)):
            h, w = shapes[level].tolist()
            image = value[0, starts[level] : starts[level] + h * w, head].T.reshape(3, h, w)
            x, y = locations[0, query, head, level, point].tolist()
            expected += weights[0, query, head, level, point] * bilinear(image, y * h - 0.5, x * w - 0.5)
        torch.testing.assert_close(found[0, query, 3 * head : 3 * head + 3], expected)


def test_gradients_of_deformable_attention(ops):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    value, shapes, starts, locations, weights = attention_inputs(grad=True)
    assert gradcheck(
        lambda v, p, w: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, p, w, 64),
        (value, locations, weights),
    )


def test_carafe_weighs_the_neighbours_of_every_new_place(ops):
    x, masks = rand(1, 4, 2, 3, grad=True), rand(1, 2 * 9, 4, 6, grad=True)
    found = ops.carafe(x, masks, 3, 2, 2)
    padded = F.pad(x, (1, 1, 1, 1))
    for channel, row, column in itertools.product(range(4), range(4), range(6)):
        seen = padded[0, channel, row // 2 : row // 2 + 3, column // 2 : column // 2 + 3].reshape(-1)
        group = channel // 2
        expected = seen @ masks[0, 9 * group : 9 * group + 9, row, column]
        torch.testing.assert_close(found[0, channel, row, column], expected)
    assert gradcheck(lambda *given: ops.carafe(*given, 3, 2, 2), (x, masks))
    torch.testing.assert_close(ops.carafe_naive(x, masks, 3, 2, 2), found)


@pytest.mark.parametrize("kind", ["collect", "distribute"])
def test_psa_masks_lie_around_their_place(ops, kind):
    h, w, height, width = 3, 4, 5, 3
    x = rand(1, height * width, h, w, grad=True)
    layer = ops.PSAMask(kind, (height, width))
    found = layer(x)
    expected = torch.zeros(1, h * w, h, w, dtype=torch.float64)
    for row, column, i, j in itertools.product(range(h), range(w), range(height), range(width)):
        to_row, to_column = row + i - height // 2, column + j - width // 2
        if not (0 <= to_row < h and 0 <= to_column < w):
            continue
        seen = x[0, i * width + j, row, column].detach()
        if kind == "collect":
            expected[0, to_row * w + to_column, row, column] = seen
        else:
            expected[0, row * w + column, to_row, to_column] = seen
    torch.testing.assert_close(found, expected)
    assert gradcheck(layer, (x,))


@pytest.mark.filterwarnings("ignore:This overload of addmm:UserWarning")  # mmcv's
def test_a_masked_convolution_is_one_at_the_places_of_the_mask(ops):
    layer = ops.MaskedConv2d(3, 5, 3, padding=1).double().eval()
    x, mask = rand(1, 3, 4, 6), torch.rand(1, 4, 6) > 0.5
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask), layer(x) * mask)
