"""int8, fp8 and bf16 graphs of a small DyViT, on crops of photographs."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from graph_runs import run  # noqa: E402
from onnx import ModelProto, TensorProto, helper, numpy_helper  # noqa: E402
from skimage import data  # noqa: E402

from coma.config import DyViTConfig  # noqa: E402
from coma.errors import BadInput, CheckFailed  # noqa: E402
from coma.models import build_encoder  # noqa: E402
from export.half_precision_emulation import emulate  # noqa: E402
from export.quantization import precision_summary, quantize_fp8, quantize_int8  # noqa: E402
from export.quantization.calibration import BINS, MagnitudeHistogram  # noqa: E402
from export.quantization.qdq import INT8, attention_matmuls, fp8_codes  # noqa: E402

MODEL = DyViTConfig(
    patch=2, dim=16, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), windows=((4, 8), (4,), (4,), (0,))
)
SIDE = 48
PAIRS = ("QuantizeLinear", "DequantizeLinear")


class Exported(nn.Module):
    """float32 in and out, whatever is between."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = build_encoder(MODEL).eval()
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):  # as wide as trained ones
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        self.dtype = dtype
        self.to(dtype)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.float() for each in self.encoder(images.to(self.dtype)))


def crops(count: int, seed: int) -> np.ndarray:
    """Crops of an astronaut and a cat, normalised: float32 [count, 3, SIDE, SIDE]."""
    rng, photographs = np.random.default_rng(seed), (data.astronaut(), data.chelsea())
    found = []
    for number in range(count):
        photograph = photographs[number % 2]
        top, left = (int(rng.integers(0, size - 4 * SIDE)) for size in photograph.shape[:2])
        found.append(photograph[top : top + 4 * SIDE : 4, left : left + 4 * SIDE : 4])
    return ((np.stack(found).transpose(0, 3, 1, 2) / 255 - 0.45) / 0.25).astype(np.float32)


def calibration() -> Iterator[dict[str, np.ndarray]]:
    yield from ({"images": crops(4, seed)} for seed in range(4))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The encoder in fp32, fp16 and bf16, dynamic in its batch."""
    folder = tmp_path_factory.mktemp("exports")
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, on its own workings
            torch.onnx.export(
                Exported(dtype),
                (torch.zeros(2, 3, SIDE, SIDE),),
                str(folder / f"{name}.onnx"),
                dynamo=True,
                dynamic_shapes=({0: "batch"},),
                opset_version=18,
                external_data=False,
                verbose=False,
                input_names=["images"],
            )
    model = onnx.load(folder / "fp32.onnx")
    helper.set_model_props(model, {"coma": "fp32", "other": "stays"})
    onnx.save(model, folder / "fp32.onnx")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def eight_bits(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("eight")
    files = {name: folder / f"{name}.onnx" for name in ("int8", "fp8")}
    quantize_int8(exports["fp32"], files["int8"], calibration())
    quantize_fp8(exports["fp32"], files["fp8"], calibration())
    return files


def worst_cosine(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Returns the least cosine of all outputs, less what all places have in common."""

    def varying(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x - x.mean((0, 2, 3), keepdims=True)

    pairs = [(varying(a), varying(b)) for a, b in zip(found, wanted, strict=True)]
    return min(float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "kind"), [("int8", TensorProto.INT8), ("fp8", TensorProto.FLOAT8E4M3FN)]
)
def test_pairs_stand_before_layers_with_weights_and_in_fp8_before_attention(
    exports: dict[str, Path], eight_bits: dict[str, Path], precision: str, kind: int
) -> None:
    source, graph = onnx.load(exports["fp32"]).graph, onnx.load(eight_bits[precision]).graph
    constants = {each.name: each for each in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    layers = attention = 0
    for node in graph.node:
        dequantised = [name for name in node.input if name in made_by and made_by[name].op_type == PAIRS[1]]
        if not dequantised or node.op_type in PAIRS:
            continue
        assert node.op_type in ("MatMul", "Gemm") and list(node.input[:2]) == dequantised
        activation, weight = (made_by[name] for name in dequantised)
        if weight.input[0] in made_by:
            attention += 1
            continue
        layers += 1
        assert made_by[activation.input[0]].op_type == PAIRS[0]
        assert made_by[activation.input[0]].input[1:] == activation.input[1:]
        assert constants[activation.input[1]].dims == []
        stored, scale, zero = (constants[name] for name in weight.input)
        assert stored.data_type == zero.data_type == kind
        per_channel = [stored.dims[weight.attribute[0].i]] if precision == "int8" else []
        assert list(scale.dims) == list(zero.dims) == per_channel
    zeros = [numpy_helper.to_array(constants[node.input[2]]) for node in graph.node if node.op_type in PAIRS]
    assert not any(each.astype(np.float32).any() for each in zeros)

    weights = {each.name for each in source.initializer}
    products = [node for node in source.node if node.op_type in ("MatMul", "Gemm")]
    linear = [node for node in products if node.input[1] in weights]
    assert layers == len(linear) - 1 > 15  # all but the stem
    assert len(products) - len(linear) >= 8  # attention, whose long sequences are quantised in fp8
    found = [] if precision == "int8" else list(attention_matmuls(onnx.load(exports["fp32"])))
    assert attention == len(found) < len(products) - len(linear) and bool(found) == (precision == "fp8")
    rest = [node.op_type for node in graph.node if node.op_type not in PAIRS]
    assert rest == [node.op_type for node in source.node]


@pytest.mark.slow
def test_weights_are_kept_in_eight_bits(exports: dict[str, Path], eight_bits: dict[str, Path]) -> None:
    before = precision_summary(onnx.load(exports["fp32"]))
    for precision, kind in (("int8", "int8"), ("fp8", "float8e4m3fn")):
        after = precision_summary(onnx.load(eight_bits[precision]))
        assert after["float_layers"] == ["encoder.stem"]
        attention = 0 if kind == "int8" else len(list(attention_matmuls(onnx.load(exports["fp32"]))))
        assert after["operators"][kind]["MatMul"] == len(before["float_layers"]) - 1 + attention
        assert after["operators"]["float"]["Softmax"] == before["operators"]["float"]["Softmax"]
        assert "MatMul" in after["operators"]["float"]
        assert after["weight_bytes"][kind] > 20_000
        assert after["weight_bytes"]["float"] < 0.2 * before["weight_bytes"]["float"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.998), ("fp8", 0.985)])
def test_outputs_are_near_to_fp32_at_any_batch_size(
    exports: dict[str, Path], eight_bits: dict[str, Path], precision: str, bound: float
) -> None:
    model = onnx.load(eight_bits[precision])
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for count in (1, 2, 3):
        images = crops(count, seed=90 + count)
        found, wanted = run(eight_bits[precision], images), run(exports["fp32"], images)
        assert [each.shape for each in found] == [each.shape for each in wanted]
        assert bound < worst_cosine(found, wanted) < 1 - 1e-7  # it is not fp32 that ran

    scales = [each for each in model.graph.initializer if each.name.endswith(f"/{precision}/scale")]
    worst = max(scales, key=lambda each: numpy_helper.to_array(each).item())
    worst.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(worst) / np.float32(8), worst.name))
    assert worst_cosine(run(model, images), wanted) < bound


def test_every_output_channel_of_every_kind_of_layer_has_its_scale(tmp_path: Path) -> None:
    rng, sizes = np.random.default_rng(0), 10.0 ** np.arange(-4, 4)
    weights = {
        "conv": rng.normal(size=(8, 3, 3, 3)) * sizes[:, None, None, None],
        "upright": rng.normal(size=(27, 8)) * sizes,
        "turned": rng.normal(size=(8, 27)) * sizes[:, None],
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["of conv"], "first"),
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "upright"], ["of upright"], "second"),
        helper.make_node("Gemm", ["flat", "turned"], ["of turned"], "third", transB=1),
        helper.make_node("Transpose", ["flat"], ["columns"]),
        helper.make_node("Gemm", ["flat", "columns"], ["of columns"], "of activations alone"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 3, 3])
    results = [
        helper.make_tensor_value_info(
            f"of {name}", TensorProto.FLOAT, ["batch", 8] + [1, 1] * (name == "conv")
        )
        for name in weights
    ]
    constants = [numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()]
    graph = helper.make_graph(nodes, "main", [x], results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    images = rng.normal(size=(64, 3, 3, 3)).astype(np.float32)
    done = quantize_int8(source, target, [{"x": images}], "minmax", exclude_first=False)
    assert done.layers == ("first", "second", "third")
    stored = {each.name: each for each in onnx.load(target).graph.initializer}
    for name, axis in (("conv", 0), ("upright", 1), ("turned", 0)):
        others = tuple(i for i in range(weights[name].ndim) if i != axis)
        scale = numpy_helper.to_array(stored[f"{name}/int8/{axis}/scale"])
        assert np.allclose(scale * 127, np.abs(weights[name]).max(others), rtol=1e-6)
    for exact, rounded in zip(run(source, images, "x"), run(target, images, "x"), strict=True):
        exact, rounded = exact.reshape(64, 8), rounded.reshape(64, 8)
        assert (np.linalg.norm(exact - rounded, axis=0) < 0.02 * np.linalg.norm(exact, axis=0)).all()
    assert stored.keys().isdisjoint(weights)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_methods_of_calibration(exports: dict[str, Path], tmp_path: Path, method) -> None:
    seen: list[int] = []
    done = quantize_int8(
        exports["fp32"], tmp_path / "out.onnx", calibration(), method, percentile=99, progress=seen.append
    )
    images = crops(4, seed=99)
    assert seen == [1, 2, 3, 4] and done.excluded == ("encoder.stem",)
    assert worst_cosine(run(tmp_path / "out.onnx", images), run(exports["fp32"], images)) > 0.99
    highest = quantize_int8(exports["fp32"], tmp_path / "out.onnx", calibration(), "minmax").ranges
    assert all(0 < done.ranges[name] <= highest[name] for name in highest)
    assert (done.ranges == highest) == (method == "minmax")


@pytest.mark.slow
def test_half_precision_around_int8(exports: dict[str, Path], tmp_path: Path) -> None:
    quantize_int8(exports["fp16"], tmp_path / "out.onnx", calibration())
    model, images = onnx.load(tmp_path / "out.onnx"), crops(3, seed=99)
    assert model.opset_import[0].version == 19
    assert precision_summary(model)["operators"]["float16"]["Softmax"]
    assert worst_cosine(run(model, images), run(exports["fp32"], images)) > 0.998


@pytest.mark.slow
def test_kept_layers_and_metadata(exports: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    done = quantize_fp8(
        exports["fp32"],
        target,
        calibration(),
        exclude=("*.merge.*", "*.gate.*"),
        exclude_first=False,
        metadata={"coma": "fp8"},
    )
    model = onnx.load(target)
    assert len(done.excluded) == 5 and done.layers[0] == "encoder.stem"
    assert tuple(precision_summary(model)["float_layers"]) == done.excluded
    assert {each.key: each.value for each in model.metadata_props} == {"coma": "fp8", "other": "stays"}
    assert all(node.metadata_props for node in model.graph.node if node.op_type == "Softmax")
    with pytest.raises(BadInput, match=r"no layer has the name 'neck\.\*'"):
        quantize_int8(exports["fp32"], target, calibration(), exclude=("neck.*",))


@pytest.mark.slow
def test_a_failure_leaves_the_target_as_it_was(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.onnx"
    target.write_text("before")
    for batches, error, message in (
        ([], BadInput, "at least one batch"),
        ([{"images": np.zeros((1, 3, 8, 8), np.float32)}], BadInput, "batch 0 does not fit"),
        ([{"images": np.full((1, 3, SIDE, SIDE), np.nan, np.float32)}], CheckFailed, "not finite"),
    ):
        for quantize in (quantize_int8, quantize_fp8):
            with pytest.raises(error, match=message):
                quantize(exports["fp32"], target, iter(batches))
    with pytest.raises(BadInput, match="bf16"):
        quantize_int8(exports["bf16"], target, calibration())
    with pytest.raises(BadInput, match="percentile"):
        quantize_int8(exports["fp32"], target, calibration(), percentile=0)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(onnx.checker, "check_model", fail)
    with pytest.raises(OSError, match="disk full"):
        quantize_int8(exports["fp32"], target, calibration())
    assert [each.name for each in tmp_path.iterdir()] == ["out.onnx"] and target.read_text() == "before"


def test_magnitudes_are_counted_over_growing_ranges() -> None:
    values = np.abs(np.random.default_rng(0).normal(size=40_000)).astype(np.float32)
    magnitudes = MagnitudeHistogram()
    magnitudes.add(np.zeros(3, np.float32))
    for part in np.split(np.sort(values), 8):
        magnitudes.add(part)
    assert magnitudes.counts.sum() == values.size and magnitudes.largest == values.max()
    width = magnitudes.top / BINS
    assert math.isclose(magnitudes.percentile(99), np.quantile(values, 0.99), abs_tol=2 * width)
    assert 2 < magnitudes.least_divergence() <= values.max()
    outlier = MagnitudeHistogram()
    outlier.add(np.append(values, np.float32(60)))
    assert outlier.least_divergence() < 10  # one value does not cost all others their resolution
    assert MagnitudeHistogram().least_divergence() == 0


def test_codes_round_to_the_nearest_and_saturate() -> None:
    values = np.array([0.5, 1.5, -2.4, 500, -500], np.float32)
    assert INT8.encode(values, np.ones(1, np.float32)).tolist() == [0, 2, -2, 127, -127]
    fp8 = fp8_codes()
    assert fp8.encode(np.array([17, 1.07, 500]), np.ones(1, np.float32)).tolist() == [16, 1.125, 448]
    assert INT8.scale(np.array([0, 127, 1e-30]), np.dtype(np.float16)).tolist() == [1, 1, 2**-24]


@pytest.mark.slow
def test_bf16_is_emulated_as_torch_computes_it(exports: dict[str, Path]) -> None:
    images = crops(3, seed=99)
    model = onnx.load(exports["bf16"])
    emulated = emulate(model, "bf16")
    onnx.checker.check_model(emulated, full_check=True)
    assert model == onnx.load(exports["bf16"])  # it is a copy that changed
    kinds = {each.data_type for each in emulated.graph.initializer}
    assert kinds == {TensorProto.FLOAT, TensorProto.INT64}

    found, exact = run(emulated, images), run(exports["fp32"], images)
    with torch.no_grad():
        torchs = [each.numpy() for each in Exported(torch.bfloat16)(torch.from_numpy(images))]
    assert 0.999 < worst_cosine(found, exact) < 1 - 1e-6  # something was rounded
    assert worst_cosine(found, torchs) > 0.9995
    of_emulation, of_torch = (1 - worst_cosine(each, exact) for each in (found, torchs))
    assert 0.5 < of_emulation / of_torch < 2  # rounded as often as torch rounds
    for each in found:
        assert np.array_equal(each, torch.from_numpy(each).bfloat16().float().numpy())


def test_every_result_is_rounded_as_torch_rounds_it() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(64, 32)).astype(np.float32), rng.normal(size=(32, 48)).astype(np.float32)
    weight = torch.from_numpy(w).bfloat16()
    scores = torch.from_numpy(x).bfloat16() @ weight
    expected = [scores.float().numpy(), scores.softmax(-1).float().numpy()]

    nodes = [
        helper.make_node("Cast", ["x"], ["short"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["short", "w"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"]),
        helper.make_node("Cast", ["scores"], ["out_scores"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["shares"], ["out_shares"], to=TensorProto.FLOAT),
    ]
    tensor_specs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, size])
        for name, size in (("x", 32), ("out_scores", 48), ("out_shares", 48))
    ]
    bits = helper.make_tensor("w", TensorProto.BFLOAT16, w.shape, weight.float().numpy().ravel())
    graph = helper.make_graph(nodes, "main", tensor_specs[:1], tensor_specs[1:], [bits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    found = run(emulate(model, "bf16"), x, "x")
    assert all((a == b).mean() > 0.99 for a, b in zip(found, expected, strict=True))  # but for orders of sums


@pytest.mark.slow
def test_fp16_runs_on_a_cpu(exports: dict[str, Path]) -> None:
    images = crops(3, seed=99)
    assert 0.99999 < worst_cosine(run(exports["fp16"], images), run(exports["fp32"], images)) < 1 - 1e-9


def test_what_cannot_be_emulated_is_refused() -> None:
    def model(inside: int, outer: int) -> ModelProto:
        def result(name: str, kind: int):
            return helper.make_tensor_value_info(name, kind, [2])

        cast = helper.make_node("Cast", ["x"], ["inner"], to=inside)
        back = helper.make_node("Cast", ["inner"], ["y"], to=outer)
        branch = helper.make_graph([cast, back], "branch", [], [result("y", outer)])
        node = helper.make_node("If", ["which"], ["z"], "choose", then_branch=branch, else_branch=branch)
        which = helper.make_tensor_value_info("which", TensorProto.BOOL, [])
        inputs = [result("x", TensorProto.FLOAT), which]
        return helper.make_model(helper.make_graph([node], "main", inputs, [result("z", outer)]))

    emulate(model(TensorProto.FLOAT16, TensorProto.FLOAT), "bf16")
    with pytest.raises(BadInput, match="If 'choose'"):
        emulate(model(TensorProto.BFLOAT16, TensorProto.FLOAT), "bf16")
    with pytest.raises(BadInput, match="outputs in bf16"):
        emulate(model(TensorProto.FLOAT, TensorProto.BFLOAT16), "bf16")
