"""Suppression and RoIAlign as loops of basic ONNX operators, for compilers without those operators.

TensorRT-RTX has neither NonMaxSuppression nor RoiAlign. The functions here give the same results, whatever
the boxes are: loops end when nothing is left to do, not after a number of rounds that is usually enough.

    boxes     b n 4       corners x1 y1 x2 y2
    scores    b c n       above 0 for every box that counts
    regions   r           regions of all images of a batch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from onnx import GraphProto, ModelProto
from onnxscript import BOOL, FLOAT, INT64, opset18, script

op: Any = opset18  # its type stubs do not cover optional results


@script(default_opset=op)
def suppress_together(boxes: FLOAT, scores: FLOAT, iou: float, least: float) -> BOOL:
    """Greedy suppression of many boxes of one class, all in every round.

    A box stays if no box that overlaps it, stays itself and is before it (by a higher score, or by a lower
    number at the same score) exists. Starting from all boxes, a round applies this rule to the boxes that
    stayed in the round before. After k rounds all boxes with fewer than k others before them in any chain of
    overlaps are decided as in the greedy algorithm; so the rounds end with its result, when one changes
    nothing, at the latest after n. Takes n * n values of memory.

    Args:
        boxes: `[b, n, 4]`.
        scores: `[b, 1, n]`.
        iou: Intersection over union above which a box is suppressed.
        least: Minimum score, exclusive.

    Returns:
        `[b, 1, n]`, true for the boxes that stay.
    """
    zero = op.Constant(value_float=0.0)
    half = op.Constant(value_float=0.5)
    x1, y1, x2, y2 = op.Split(boxes, axis=2, num_outputs=4)  # b n 1
    u1, v1, u2, v2 = op.Split(op.Transpose(boxes, perm=[0, 2, 1]), axis=1, num_outputs=4)  # b 1 n
    common = op.Max(op.Min(x2, u2) - op.Max(x1, u1), zero) * op.Max(op.Min(y2, v2) - op.Max(y1, v1), zero)
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - common
    overlaps = common / union > op.Constant(value_float=iou)
    column = op.Transpose(scores, perm=[0, 2, 1])  # b n 1
    length = op.Squeeze(op.Shape(scores, start=2, end=3))
    number = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    is_lower = number < op.Unsqueeze(number, op.Constant(value_ints=[1]))
    is_before = op.Or(scores > column, op.And(scores == column, is_lower))
    rivals = op.Cast(op.And(overlaps, is_before), to=FLOAT.dtype)  # b n n: of the box of the row
    counts = op.Cast(column > op.Constant(value_float=least), to=FLOAT.dtype)
    stays = op.Identity(counts)
    changed = half > zero
    while changed:
        now = op.Where(op.MatMul(rivals, stays) > half, zero, counts)
        changed = op.ReduceMax(op.Abs(now - stays), keepdims=0) > half
        stays = op.Identity(now)
    return op.Transpose(stays, perm=[0, 2, 1]) > half


@script(default_opset=op)
def suppress_in_turn(boxes: FLOAT, scores: FLOAT, iou: float, least: float, limit: int) -> BOOL:
    """Greedy suppression by its definition: every round takes the best box of each class.

    Args:
        boxes: `[b, n, 4]`, shared by the classes.
        scores: `[b, c, n]`.
        iou: Intersection over union above which a box is suppressed.
        least: Minimum score, exclusive; not negative.
        limit: Maximum number of boxes of a class that stay: the number of rounds.

    Returns:
        `[b, c, n]`, true for the boxes that stay.
    """
    zero = op.Constant(value_float=0.0)
    gone = op.Constant(value_float=-1.0)
    x1, y1, x2, y2 = op.Split(op.Transpose(boxes, perm=[0, 2, 1]), axis=1, num_outputs=4)  # b 1 n
    areas = (x2 - x1) * (y2 - y1)
    length = op.Squeeze(op.Shape(scores, start=2, end=3))
    number = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    left = op.Where(scores > op.Constant(value_float=least), scores, gone)
    stays = left * zero
    for _ in range(op.Constant(value_int=limit)):
        is_left = op.ReduceMax(left, op.Constant(value_ints=[2]), keepdims=1) > zero  # b c 1
        index = op.ArgMax(left, axis=2, keepdims=1)
        u1, v1, u2, v2 = op.Split(op.GatherND(boxes, index, batch_dims=1), axis=2, num_outputs=4)  # b c 1
        common = op.Max(op.Min(x2, u2) - op.Max(x1, u1), zero) * op.Max(op.Min(y2, v2) - op.Max(y1, v1), zero)
        overlaps = common / ((u2 - u1) * (v2 - v1) + areas - common) > op.Constant(value_float=iou)
        taken = op.And(number == index, is_left)
        stays = stays + op.Cast(taken, to=FLOAT.dtype)
        left = op.Where(op.Or(op.And(overlaps, is_left), taken), gone, left)
        none_left = op.Not(op.ReduceMax(left, keepdims=0) > zero)
        if none_left:
            break
    return stays > op.Constant(value_float=0.5)


@script(default_opset=op)
def average_samples(
    pixels: FLOAT,
    start: FLOAT,
    side: FLOAT,
    samples: FLOAT,
    extent: FLOAT,
    origin: INT64,
    height: int,
    width: int,
) -> FLOAT:
    """Averages bilinear samples in every bin of a region (RoIAlign, arXiv 1703.06870, sec. 3).

    Every round takes one sample of each bin. There are as many rounds as the bins of any region have samples.

    Args:
        pixels: Pixels of all maps of a batch `[p, c]`.
        start: Top and left of the regions, in pixels of their map `[r, 2]`.
        side: Height and width of a bin `[r, 2]`.
        samples: Number of samples of a bin, vertically and horizontally `[r, 2]`.
        extent: Height and width of the map that a region is taken from `[r, 2]`.
        origin: Number of the first pixel of that map `[r, 1]`.
        height: Number of bins, vertically.
        width: Number of bins, horizontally.

    Returns:
        `[r, c, height, width]`; 0 where there is no sample.
    """
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    half = op.Constant(value_float=0.5)
    none = op.Constant(value_int=0)
    zeroth = op.Constant(value_ints=[0])
    next = op.Constant(value_int=1)
    rows = op.Cast(op.Range(none, op.Constant(value_int=height), next), to=FLOAT.dtype)
    columns = op.Cast(op.Range(none, op.Constant(value_int=width), next), to=FLOAT.dtype)
    top, left = op.Split(start, axis=1, num_outputs=2)  # r 1
    bin_height, bin_width = op.Split(side, axis=1, num_outputs=2)
    down, across = op.Split(samples, axis=1, num_outputs=2)
    bottom, right = op.Split(extent - one, axis=1, num_outputs=2)
    row_length = op.Cast(op.Unsqueeze(right + one, op.Constant(value_ints=[2])), to=INT64.dtype)  # r 1 1
    first = op.Unsqueeze(origin, op.Constant(value_ints=[2]))
    count = down * across  # r 1
    high = op.Max(down, one)
    wide = op.Max(across, one)
    shape = op.Concat(
        op.Shape(start, end=1),
        op.Unsqueeze(op.Constant(value_int=height), zeroth),
        op.Unsqueeze(op.Constant(value_int=width), zeroth),
        op.Shape(pixels, start=1),
        axis=0,
    )
    total = op.Expand(zero, shape)  # r h w c
    most = op.ReduceMax(count, keepdims=0)
    for step in range(op.Cast(most, to=INT64.dtype)):
        number = op.Cast(step, to=FLOAT.dtype)
        line = op.Floor((number + half) / wide)  # r 1
        y = top + rows * bin_height + (line + half) * bin_height / high  # r h
        x = left + columns * bin_width + (number - line * wide + half) * bin_width / wide  # r w
        # A sample more than one pixel outside counts 0; one less far outside is moved to the border.
        is_inside = op.And(op.And(y >= -one, y <= bottom + one), number < count)
        weight_y = op.Cast(is_inside, to=FLOAT.dtype)
        weight_x = op.Cast(op.And(x >= -one, x <= right + one), to=FLOAT.dtype)
        y = op.Min(op.Max(y, zero), bottom)
        x = op.Min(op.Max(x, zero), right)
        row = op.Floor(y)
        column = op.Floor(x)
        south = y - row
        east = x - column
        next_row = op.Cast(op.Min(row + one, bottom), to=INT64.dtype)
        next_column = op.Cast(op.Min(column + one, right), to=INT64.dtype)
        upper = first + op.Unsqueeze(op.Cast(row, to=INT64.dtype), op.Constant(value_ints=[2])) * row_length
        lower = first + op.Unsqueeze(next_row, op.Constant(value_ints=[2])) * row_length  # r h 1
        west = op.Unsqueeze(op.Cast(column, to=INT64.dtype), op.Constant(value_ints=[1]))  # r 1 w
        beside = op.Unsqueeze(next_column, op.Constant(value_ints=[1]))
        north_share = op.Unsqueeze((one - south) * weight_y, op.Constant(value_ints=[2, 3]))  # r h 1 1
        south_share = op.Unsqueeze(south * weight_y, op.Constant(value_ints=[2, 3]))
        west_share = op.Unsqueeze((one - east) * weight_x, op.Constant(value_ints=[1, 3]))  # r 1 w 1
        east_share = op.Unsqueeze(east * weight_x, op.Constant(value_ints=[1, 3]))
        north = west_share * op.Gather(pixels, upper + west) + east_share * op.Gather(pixels, upper + beside)
        under = west_share * op.Gather(pixels, lower + west) + east_share * op.Gather(pixels, lower + beside)
        total = total + (north_share * north + south_share * under)
        is_last = number + one >= most
        if is_last:  # always given: TensorRT's parser takes no Loop without a condition
            break
    mean = total / op.Unsqueeze(op.Max(count, one), op.Constant(value_ints=[2, 3]))
    return op.Transpose(mean, perm=[0, 3, 1, 2])


ROUNDS = 300
"""Maximum number of rounds of `suppress_in_turn`; with more, `suppress_together` is faster."""


def keep(boxes, scores, iou_threshold: float, score_threshold: float, limit: int):
    """Translates `custom_ops.nms_keep`; takes the same arguments."""
    if limit > ROUNDS:
        return suppress_together(boxes, scores, iou=iou_threshold, least=score_threshold)
    return suppress_in_turn(boxes, scores, iou=iou_threshold, least=score_threshold, limit=limit)


def pool(
    maps: Sequence[Any],
    regions,
    level,
    scales: Sequence[float],
    size: Sequence[int],
    samples: int,
    aligned: bool,
):
    """Translates `custom_ops.pool_regions`; takes the same arguments."""
    first, second = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    rows = []
    for x in maps:
        wanted = op.Concat(first, op.Constant(value_ints=[-1]), op.Shape(x, start=1, end=2), axis=0)
        rows.append(op.Reshape(op.Transpose(x, perm=[0, 2, 3, 1]), wanted))  # b h*w c
    lengths = [op.Shape(each, start=1, end=2) for each in rows]
    pixels = op.Concat(*rows, axis=1) if len(rows) > 1 else rows[0]
    number = op.Cast(level, to=INT64.dtype)
    image, left, top, right, bottom = op.Split(regions, num_outputs=5, axis=1)  # r 1
    origins = [first]
    for length in lengths[:-1]:
        origins.append(op.Add(origins[-1], length))
    origin = op.Add(
        op.Unsqueeze(op.Gather(op.Concat(*origins, axis=0), number), second),
        op.Mul(op.Cast(image, to=INT64.dtype), op.Shape(pixels, start=1, end=2)),
    )
    extents = op.Concat(*(op.Unsqueeze(op.Shape(x, start=2), first) for x in maps), axis=0)
    scale = op.Unsqueeze(op.Gather(op.Constant(value_floats=list(scales)), number), second)
    start = op.Mul(op.Concat(top, left, axis=1), scale)
    extent = op.Sub(op.Mul(op.Concat(bottom, right, axis=1), scale), start)
    if aligned:
        start = op.Sub(start, op.Constant(value_float=0.5))
    else:
        extent = op.Max(extent, op.Constant(value_float=1.0))
    side = op.Div(extent, op.Constant(value_floats=[float(bins) for bins in size]))
    if samples > 0:
        counts = op.Expand(op.Constant(value_float=float(samples)), op.Shape(side))
    else:
        counts = op.Ceil(side)
    return average_samples(
        op.Reshape(pixels, op.Concat(op.Constant(value_ints=[-1]), op.Shape(pixels, start=2), axis=0)),
        start,
        side,
        counts,
        op.Cast(op.Gather(extents, number), to=FLOAT.dtype),
        origin,
        height=size[0],
        width=size[1],
    )


def declare_loop_types(model: ModelProto) -> None:
    """Declares the types that the bodies of loops take, in place; OpenVINO reads no loops without them."""
    from onnx.shape_inference import infer_shapes

    for body, inferred in zip(_bodies(model.graph), _bodies(infer_shapes(model).graph), strict=True):
        for value, known in zip(body.input, inferred.input, strict=True):
            value.type.tensor_type.elem_type = known.type.tensor_type.elem_type


def _bodies(graph: GraphProto) -> Iterator[GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from _bodies(attribute.g)
