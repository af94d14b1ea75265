"""Shapes that the verification runs."""

from __future__ import annotations

import math
from dataclasses import replace

from coma.runtimes.shape_ranges import Shape, Shapes

_RATIO = 3  # longer side over shorter side of wide and tall images


def shapes_to_run(shapes: Shapes, unit: int) -> tuple[Shape, ...]:
    """Returns the shapes to verify, the optimal one first.

    The optimal size runs at batches of 1, 2, an odd number, the optimal and the maximum. Square, wide (1:3),
    tall (3:1), minimum, maximum and odd sizes run once each. Shapes that the file does not take are left out.

    Args:
        shapes: Shapes that the file takes.
        unit: Side of a mask unit in pixels.
    """
    low, opt, high = shapes.min, shapes.opt, shapes.max
    odd = next((n for n in range(max(3, low.batch), high.batch) if n % 2), low.batch)
    batches = [low.batch, 1, 2, odd, opt.batch, high.batch]
    side = round(math.sqrt(opt.height * opt.width))
    sizes = [
        (low.batch, _clamped(shapes, side, side)),
        (2, _stretched(shapes)),
        (odd, _stretched(shapes, tall=True)),
        (high.batch, (low.height, low.width)),
        (low.batch, (high.height, high.width)),
        *((low.batch, size) for size in _odd_sizes(shapes, unit)),
    ]
    wanted = [replace(opt, batch=batch) for batch in batches]
    wanted += [
        Shape(batch if low.batch <= batch <= high.batch else low.batch, *size)
        for batch, size in sizes
        if size != (opt.height, opt.width)
    ]
    return tuple(shape for shape in dict.fromkeys(wanted) if shapes.allows(shape))


def _stretched(shapes: Shapes, tall: bool = False) -> tuple[int, int]:
    """Returns a size with as many pixels as the optimal one whose sides differ by a factor of three."""
    short = round(math.sqrt(shapes.opt.height * shapes.opt.width / _RATIO))
    height, width = _clamped(shapes, *((_RATIO * short, short) if tall else (short, _RATIO * short)))
    if tall:
        return _clamped(shapes, height, height // _RATIO)
    return _clamped(shapes, width // _RATIO, width)


def _clamped(shapes: Shapes, height: int, width: int) -> tuple[int, int]:
    """Returns the nearest size that the file takes."""
    return (
        min(max(height, shapes.min.height), shapes.max.height),
        min(max(width, shapes.min.width), shapes.max.width),
    )


def _odd_sizes(shapes: Shapes, unit: int) -> list[tuple[int, int]]:
    """Returns two sizes that no stride divides: a little above the optimal one or, if none fits, below."""
    height, width = shapes.opt.height, shapes.opt.width
    above, below = height + unit // 2 + 1, max(height - unit // 2 - 1, unit)
    pairs = [[(side, max(width - 5, unit)), (max(width - 5, unit), side)] for side in (above, below)]
    fitting = [[size for size in pair if shapes.allows(Shape(shapes.min.batch, *size))] for pair in pairs]
    return fitting[0] or fitting[1]
