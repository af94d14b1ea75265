"""mmcv's compiled operators over whole maps, implemented with torchvision and torch.

    operator                                 from
    deform_conv, modulated_deform_conv       torchvision
    ms_deform_attn                           mmcv's own formula in torch, which it uses on CPUs alone
    carafe, carafe_naive, psamask            torch, here
    masked_im2col and col2im                 torch, here

Calling conventions are those of mmcv 2.1.0 (`mmcv/ops/csrc`): outputs are arguments, filled in place, and a
gradient is the automatic one of the forward formula. Half precision is computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, *_: Tensor, **geometry: int
) -> None:
    """Deformable convolution (Dai et al. 2017, arXiv 1703.06211).

    Args:
        input: `[b, c, h, w]`.
        weight: `[d, c / group, kH, kW]`.
        offset: `[b, 2 * deformable_group * kH * kW, h', w']`, row and column of every sample in turn.
        output: `[b, d, h', w']`, overwritten.
        geometry: dW, dH (strides), padW, padH, dilationW, dilationH, and sizes that the tensors have as well.
    """
    output.copy_(_deform_conv(geometry, *_wide(input, offset, weight)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    *_: Tensor,
    **geometry: int,
) -> None:
    """Overwrites the gradients of `deform_conv_forward` by input and offset."""
    _gradients(
        lambda x, o: _deform_conv(geometry, x, o, *_wide(weight)),
        (input, offset), grad_output, (grad_input, grad_offset),
    )  # fmt: skip


def deform_conv_backward_parameters(
    input: Tensor, offset: Tensor, grad_output: Tensor, grad_weight: Tensor, *_: Tensor, **geometry: int
) -> None:
    """Overwrites the gradient of `deform_conv_forward` by the weight."""
    x, o = _wide(input, offset)
    _gradients(lambda w: _deform_conv(geometry, x, o, w), (grad_weight.new_zeros(grad_weight.shape),),
               grad_output, (grad_weight,))  # fmt: skip


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Modulated deformable convolution (Zhu et al. 2018, arXiv 1811.11168, sec. 3.2).

    As `deform_conv_forward`, where every sample is multiplied by its `mask`, `[b, deformable_group * kernel_h
    * kernel_w, h', w']`; `bias` is `[d]`, or empty. Offsets and mask of a larger map than the output's, as
    mmdet's DyHead gives them, are read as mmcv reads them: the first ones of each image in memory.
    """
    output.copy_(_modulated(geometry, with_bias, *_wide(input, offset, mask, weight, bias)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Overwrites the gradients of `modulated_deform_conv_forward`."""
    inputs, gradients = [input, offset, mask, weight], [grad_input, grad_offset, grad_mask, grad_weight]
    if with_bias:
        inputs, gradients = [*inputs, bias], [*gradients, grad_bias]
    _gradients(lambda *given: _modulated(geometry, with_bias, *given), inputs, grad_output, gradients)


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al. 2020, arXiv 2010.04159, eq. 3).

    Args:
        value: `[b, n, heads, c]`, the positions of all levels.
        shapes: Height and width of every level, int64 `[levels, 2]`.
        starts: First position of every level; follows from `shapes`.
        locations: `[b, queries, heads, levels, points, 2]`, x and y in 0..1.
        weights: `[b, queries, heads, levels, points]`.
        im2col_step: Images at a time; without effect.

    Returns:
        `[b, queries, heads * c]`.
    """
    return _deform_attention(shapes, *_wide(value, locations, weights)).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    im2col_step: int,
) -> None:
    """Overwrites the gradients of `ms_deform_attn_forward`."""
    _gradients(
        lambda *given: _deform_attention(shapes, *given),
        (value, locations, weights), grad_output, (grad_value, grad_locations, grad_weights),
    )  # fmt: skip


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Content-aware upsampling (Wang et al. 2019, arXiv 1905.02188, eq. 2).

    Args:
        features: `[b, c, h, w]`.
        masks: Weights of the neighbours of every new place, `[b, group_size * kernel_size^2, H, W]`.
        output: `[b, c, H, W]` with H = h * scale_factor, overwritten.
        kernel_size: Side of the neighbourhood.
        group_size: Groups of channels with weights of their own.
        scale_factor: New places along each side of an old one.
    """
    x, weights = _wide(features, masks)
    output.copy_(_carafe(x, weights, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Overwrites the gradients of `carafe_naive_forward`."""
    _gradients(
        lambda x, m: _carafe(x, m, kernel_size, group_size, scale_factor),
        (features, masks), grad_output, (grad_input, grad_masks),
    )  # fmt: skip


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    **sizes: int,
) -> None:
    """Does what `carafe_naive_forward` does, and keeps `features` for the backward pass in `rfeatures`."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, **sizes)


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    **sizes: int,
) -> None:
    """Overwrites the gradients of `carafe_forward`."""
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, **sizes)


def psamask_forward(input: Tensor, output: Tensor, psa_type: int, h_mask: int, w_mask: int, **_: int) -> None:
    """Spreads the attention of every place over the map (PSANet, Zhao et al. 2018, ECCV, sec. 3.2).

    Args:
        input: `[b, h_mask * w_mask, h, w]`: attention over the neighbourhood of every place.
        output: `[b, h * w, h, w]`, overwritten; zero outside the neighbourhood.
        psa_type: 0 collects: output `[b, q, p]` is the attention of p to q; 1 distributes: of q to p.
        h_mask: Height of the neighbourhood.
        w_mask: Its width.
    """
    output.copy_(_psamask(input, psa_type, h_mask, w_mask))


def psamask_backward(
    grad_output: Tensor, grad_input: Tensor, psa_type: int, h_mask: int, w_mask: int, **_: int
) -> None:
    """Overwrites the gradient of `psamask_forward` by its input."""
    _gradients(lambda x: _psamask(x, psa_type, h_mask, w_mask), (torch.zeros_like(grad_input),), grad_output,
               (grad_input,))  # fmt: skip


def masked_im2col_forward(
    features: Tensor,
    rows: Tensor,
    columns: Tensor,
    data_col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Overwrites `data_col` `[c * kernel_h * kernel_w, n]` with the neighbourhoods of n places of a map."""
    patches = F.unfold(features, (kernel_h, kernel_w), padding=(pad_h, pad_w))[0]
    width = features.shape[-1] + 2 * pad_w - kernel_w + 1
    data_col.copy_(patches[:, rows * width + columns])


def masked_col2im_forward(
    col: Tensor, rows: Tensor, columns: Tensor, output: Tensor, height: int, width: int, channels: int
) -> None:
    """Writes `col` `[channels, n]` to n places of `output` `[1, channels, height, width]`."""
    output[0, :, rows, columns] = col


DENSE_OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        carafe_naive_forward,
        carafe_naive_backward,
        carafe_forward,
        carafe_backward,
        psamask_forward,
        psamask_backward,
        masked_im2col_forward,
        masked_col2im_forward,
    )
}


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Converts half precision to float32; float64 stays."""
    return [each if each.element_size() >= 4 else each.float() for each in tensors]


def _gradients(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor, into: Sequence[Tensor]
) -> None:
    """Overwrites `into` with the gradients of a formula by its inputs."""
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in _wide(*inputs)]
        output = formula(*leaves)
        found = torch.autograd.grad(output, leaves, grad_output.to(output.dtype))
    for target, gradient in zip(into, found, strict=True):
        target.copy_(gradient)


def _deform_conv(geometry: dict[str, int], x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    from torchvision.ops import deform_conv2d

    stride, padding, dilation = (
        (geometry[f"{name}H"], geometry[f"{name}W"]) for name in ("d", "pad", "dilation")
    )
    return deform_conv2d(x, offset, weight, None, stride, padding, dilation)


def _modulated(geometry: dict[str, int], with_bias: bool, *tensors: Tensor) -> Tensor:
    from torchvision.ops import deform_conv2d

    x, offset, mask, weight, *bias = tensors
    stride, padding, dilation = (
        (geometry[f"{name}_h"], geometry[f"{name}_w"]) for name in ("stride", "pad", "dilation")
    )
    added = bias[0] if with_bias else None
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    if list(offset.shape[2:]) != size:
        count = size[0] * size[1]
        offset, mask = (
            each.flatten(1)[:, : each.shape[1] * count].unflatten(1, (-1, *size)) for each in (offset, mask)
        )
    return deform_conv2d(x, offset, weight, added, stride, padding, dilation, mask)


def _deform_attention(shapes: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def _carafe(x: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    b, c, h, w = x.shape
    reach = kernel // 2
    padded = F.pad(x, (reach,) * 4).view(b, groups, c // groups, h + 2 * reach, w + 2 * reach)
    weights = masks.view(b, groups, kernel, kernel, h, scale, w, scale)
    total = x.new_zeros(b, groups, c // groups, h, scale, w, scale)
    for row in range(kernel):
        for column in range(kernel):
            seen = padded[..., row : row + h, column : column + w]
            total = total + seen[..., :, None, :, None] * weights[:, :, None, row, column]
    return total.reshape(b, c, h * scale, w * scale)


def _psamask(x: Tensor, psa_type: int, h_mask: int, w_mask: int) -> Tensor:
    b, _, h, w = x.shape
    rows = torch.arange(h, device=x.device)
    columns = torch.arange(w, device=x.device)
    down = rows[:, None] - rows + (h_mask - 1) // 2  # [to, from]
    right = columns[:, None] - columns + (w_mask - 1) // 2
    inside = ((down >= 0) & (down < h_mask))[:, None, :, None] & ((right >= 0) & (right < w_mask))[:, None]
    place = down.clamp(0, h_mask - 1)[:, None, :, None] * w_mask + right.clamp(0, w_mask - 1)[:, None]
    place, inside = place.reshape(h * w, h * w), inside.reshape(h * w, h * w)
    spread = x.flatten(2).gather(1, place.expand(b, -1, -1)) * inside  # [b, to, from]
    return (spread if psa_type == 0 else spread.transpose(1, 2)).reshape(b, h * w, h, w)
