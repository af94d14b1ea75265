"""The preprocessing of a model as an ONNX graph: from decoded images of any size to the input `images`.

torch resizes uint8 images along one axis after the other and rounds in between (ATen,
UpSampleKernelAVXAntialias), and so does this graph. Its Resize, antialiased with a = -0.5, uses the weights
of torch's bicubic filter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coma.errors import BadInput
from coma.runtimes.model_spec import ModelSpec, Preprocessing
from export.onnx_export import OPSET, check_graph

if TYPE_CHECKING:
    from onnx import ModelProto

_BICUBIC = 'mode="cubic", antialias=1, cubic_coeff_a=-0.5, exclude_outside=1'
_SIDES = """
  h = Shape<start=1, end=2>(image)
  w = Shape<start=2, end=3>(image)
  height = Cast<to=11>(h)
  width = Cast<to=11>(w)
"""  # 11 is double: sizes are computed as Python computes them
_CROP = """
  fitting_height_exactly = Div(scaled_width, cols)
  fitting_height = Round(fitting_height_exactly)
  lower = Min(height, fitting_height)
  least_height = Max(lower, one)
  crop_height = Cast<to=7>(least_height)
  fitting_width_exactly = Div(scaled_height, rows)
  fitting_width = Round(fitting_width_exactly)
  narrower = Min(width, fitting_width)
  least_width = Max(narrower, one)
  crop_width = Cast<to=7>(least_width)
  rest_height = Sub(h, crop_height)
  rest_width = Sub(w, crop_width)
  top = Div(rest_height, two)
  left = Div(rest_width, two)
  start = Concat<axis=0>(top, left)
  crop = Concat<axis=0>(crop_height, crop_width)
  end = Add(start, crop)
  part = Slice(pixels, start, end, axes)
"""
_FIT = """
  longer = Max(height, width)
  shorter = Min(height, width)
  by_longer = Div(long, longer)
  by_shorter = Div(short, shorter)
  scale = Min(by_longer, by_shorter)
  sides = Concat<axis=0>(height, width)
  scaled = Mul(sides, scale)
  shifted = Add(scaled, half)
  size = Cast<to=7>(shifted)
  resized = Resize<axes=[2, 3], mode="linear">(pixels, , , size)
  shown = Round(resized)
"""


def preprocessing_graph(spec: ModelSpec) -> ModelProto:
    """Returns the graph from `image`, uint8 `[batch, height, width, channels]`, to the `images` of a model.

    Raises:
        BadInput: the model takes images of one size only, and its preprocessing does not resize to it.
    """
    import onnx

    rule, images = spec.preprocessing, spec.inputs[0]
    batch, channels, *sides = images.axes
    if not rule.crops and any(isinstance(side, int) for side in sides):
        raise BadInput(
            "--triton-preprocess: the model takes images of one size, and its preprocessing does not resize "
            "to it; export it with a dynamic height and width"
        )
    shape = f"{batch},{channels}," + (f"{rule.size[0]},{rule.size[1]}" if rule.crops and rule.size else "h,w")
    text = f"""
<ir_version: 10, opset_import: ["" : {OPSET}]>
preprocess (uint8[{batch},height,width,{channels}] image) => ({_type(rule)}[{shape}] images)
<{", ".join(_constants(rule))}>
{{
  planes = Transpose<perm=[0, 3, 1, 2]>(image)
  pixels = Cast<to=1>(planes)
  {_resizing(rule)}
  {_normalization(rule)}
}}
"""
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    constants = [each for each in model.graph.initializer if each.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    check_graph(model)
    return model


def _type(rule: Preprocessing) -> str:
    return "uint8" if rule.normalize_in_graph else "float"


def _constants(rule: Preprocessing) -> list[str]:
    values = [
        "float low = {0}",
        "float high = {255}",
        f"float[{len(rule.mean)},1,1] mean = {{{_listed(rule.mean)}}}",
        f"float[{len(rule.std)},1,1] std = {{{_listed(rule.std)}}}",
    ]
    if rule.size and rule.crops:
        rows, cols = rule.size
        values += [
            f"double[1] rows = {{{rows}}}",
            f"double[1] cols = {{{cols}}}",
            "double[1] one = {1}",
            "int64[1] two = {2}",
            "int64[2] axes = {2, 3}",
            f"int64[1] to_height = {{{rows}}}",
            f"int64[1] to_width = {{{cols}}}",
        ]
    elif rule.size:
        short, long = rule.size
        values += [f"double[1] short = {{{short}}}", f"double[1] long = {{{long}}}", "double[1] half = {0.5}"]
    return values


def _resizing(rule: Preprocessing) -> str:
    if rule.crops and rule.size:
        return f"""{_SIDES}
  scaled_width = Mul(width, rows)
  scaled_height = Mul(height, cols)
  {_CROP}
  wide = Resize<axes=[3], {_BICUBIC}>(part, , , to_width)
  wide_in_range = Clip(wide, low, high)
  wide_rounded = Round(wide_in_range)
  resized = Resize<axes=[2], {_BICUBIC}>(wide_rounded, , , to_height)
  in_range = Clip(resized, low, high)
  shown = Round(in_range)"""
    return _SIDES + _FIT if rule.size else "shown = Identity(pixels)"


def _normalization(rule: Preprocessing) -> str:
    if rule.normalize_in_graph:
        return "images = Cast<to=2>(shown)"
    return """unit = Div(shown, high)
  centred = Sub(unit, mean)
  images = Div(centred, std)"""


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.9g}" for value in values)
