"""Ways to degrade an image other than masks: zoom in, zoom out, distort, blur, take the colour away.

From "Beyond Masking" (Tian et al. 2022, arXiv 2203.14313, sec. 3.2), with the numbers of the authors'
public code, given there for 224 px and here for any size: a border of 1/9 of the view (288 px around 224), a
picture shrunk to 5/7 (160 of 224), a fisheye centred in U(-1, 1)^2 of strength U(0.15, 0.25), a 7 x 7 kernel
of weights N(1/49, 0.02), channel weights U(0, 0.667). Our own: a kernel is divided by its sum, so that
blurring changes no brightness, and edges are mirrored under it.

All work on whole batches on their device. What is random is a function of the sample's seed, as masks are
(see `masking.sampling`): a sample is degraded alike in any batch, on any process.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from coma.config.objectives import Padding
from coma.errors import BadInput
from coma.masking.sampling import uniform

Kind = Literal["zoom-in", "zoom-out", "distort", "blur", "decolor"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SALTS = {kind: 0x6465 + number for number, kind in enumerate(KINDS)}  # apart from those of masks
_KERNEL = 7


def degrade(images: Tensor, seeds: Tensor, kind: Kind, padding: Padding = "zeros") -> tuple[Tensor, Tensor]:
    """Degrade a batch.

    Args:
        images: `[b, c, H, W]`, floating point, plain or normalised pixels; models are trained on normalised
            ones. That matters for "decolor" alone: its weights do not add up to 1, the others' do.
        seeds: int64 `[b]`; one of them fixes what happens to its image.
        kind: How.
        padding: What "distort" shows beyond the image.

    Returns:
        What a model is shown, and what it is to make of it: the images as they were. Both are `[b, c, H, W]`,
        but for "zoom-in", whose input is the centre, smaller by `border(H)` and `border(W)` on every side.
        Both are of the images' type, though halves are computed in float32.

    Raises:
        BadInput: an unknown kind, whole numbers, "decolor" of other than 3 channels, or images too small.
    """
    if kind not in KINDS:
        raise BadInput(f"no degradation {kind!r}; there are: {', '.join(KINDS)}")
    if not images.is_floating_point():
        raise BadInput(f"images to be degraded are floating point, not {images.dtype}")
    height, width = images.shape[-2:]
    if min(height, width) <= _KERNEL // 2:
        raise BadInput(f"images of {height} x {width} px are too small to degrade")
    if kind == "zoom-in":
        return centre(images, border(height), border(width)), images
    bend = partial(distort, padding=padding)
    change = {"zoom-out": zoom_out, "distort": bend, "blur": blur, "decolor": decolor}[kind]
    with torch.autocast(images.device.type, enabled=False):  # it would convolve in halves
        shown = change(images.to(torch.promote_types(images.dtype, torch.float32)), seeds)
    return shown.to(images.dtype), images


def border(length: int) -> int:
    """Returns how much zooming in crops at either end of a side: 1/9, at least 1; 32 of 288 px, 1 of 9 units.

    Written for exported graphs too, to which a length is not known: `max` would decide it once for all.
    """
    return cast("int", torch.sym_max(1, (2 * length + 9) // 18))


def centre(images: Tensor, rows: int, cols: int) -> Tensor:
    """`[..., H, W]` without `rows` at top and bottom and `cols` at left and right."""
    height, width = images.shape[-2:]
    if height <= 2 * rows or width <= 2 * cols:
        raise BadInput(f"nothing is left of {height} x {width} without {rows} rows and {cols} columns a side")
    return images.narrow(-2, rows, height - 2 * rows).narrow(-1, cols, width - 2 * cols)


def zoom_out(images: Tensor, seeds: Tensor) -> Tensor:
    """Shrink `[b, c, H, W]` to 5/7, put it at a random place of its old frame, mirror it outwards."""
    height, width = images.shape[-2:]
    inner = round(height * 5 / 7), round(width * 5 / 7)
    small = F.interpolate(images, inner, mode="bilinear", antialias=True, align_corners=False)
    draws = uniform(seeds, 2, _SALTS["zoom-out"])
    rows, cols = (
        _mirrored(length, size, (draws[:, axis] * (length - size + 1)).long())
        for axis, (length, size) in enumerate(zip((height, width), inner, strict=True))
    )
    b, c = images.shape[:2]
    small = small.gather(2, rows[:, None, :, None].expand(b, c, height, inner[1]))
    return small.gather(3, cols[:, None, None, :].expand(b, c, height, width))


def distort(images: Tensor, seeds: Tensor, padding: Padding) -> Tensor:
    """A fisheye: seen at p is the image at p + (centre - p) |centre - p| strength, sides being 2 long."""
    height, width = images.shape[-2:]
    draws = uniform(seeds, 3, _SALTS["distort"])
    middle = (2 * draws[:, :2] - 1)[:, None, None]  # b 1 1 2: x, y
    strength = (0.15 + 0.1 * draws[:, 2])[:, None, None, None]
    y, x = (torch.linspace(-1, 1, size, device=images.device) for size in (height, width))
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
    towards = middle - places  # b h w 2
    grid = places + towards * towards.norm(dim=-1, keepdim=True) * strength
    mode = {"zeros": "zeros", "edge": "border"}[padding]
    return F.grid_sample(images, grid.to(images.dtype), padding_mode=mode, align_corners=True)


def blur(images: Tensor, seeds: Tensor) -> Tensor:
    """Blur `[b, c, H, W]` by one random 7 x 7 kernel an image, the same for its channels."""
    b, c, height, width = images.shape
    kernels = blur_kernels(seeds).to(images.dtype).repeat_interleave(c, dim=0)[:, None]
    padded = F.pad(images, (_KERNEL // 2,) * 4, mode="reflect")
    blurred = F.conv2d(padded.reshape(1, b * c, *padded.shape[-2:]), kernels, groups=b * c)
    return blurred.view(b, c, height, width)


def blur_kernels(seeds: Tensor) -> Tensor:
    """Kernels `[b, 7, 7]` of weights N(1/49, 0.02), by Box and Muller (1958), divided by their sums."""
    count = _KERNEL * _KERNEL
    radius, angle = uniform(seeds, 2 * count, _SALTS["blur"]).chunk(2, dim=1)
    normal = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
    weights = 1 / count + 0.02 * normal
    return (weights / weights.sum(dim=1, keepdim=True)).view(-1, _KERNEL, _KERNEL)


def decolor(images: Tensor, seeds: Tensor) -> Tensor:
    """Three channels to one grey, by random weights that add up to about 1, shown three times.

    Raises:
        BadInput: other than 3 channels.
    """
    if images.shape[1] != 3:
        raise BadInput(f"decolor takes images of 3 channels, not {images.shape[1]}")
    weights = 0.667 * uniform(seeds, 3, _SALTS["decolor"])
    grey = (images * weights[:, :, None, None].to(images.dtype)).sum(dim=1, keepdim=True)
    return grey.expand_as(images)


def _mirrored(length: int, size: int, offset: Tensor) -> Tensor:
    # b length: where each of `length` places looks in `size` that begin at `offset` and are mirrored outwards
    place = torch.arange(length, device=offset.device) - offset[:, None]
    place = place.remainder(2 * size)
    return torch.where(place < size, place, 2 * size - 1 - place)
