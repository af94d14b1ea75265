"""Every kind of artifact as ONNX: valid files, the sizes that were asked for, PyTorch's results."""

from dataclasses import replace
from pathlib import Path

import export_files
import onnx
import pytest
import torch
from gate_cases import BATCHES, FREE, OF_ANY_SIZE, Case
from torch import nn

from coma.config import BeyondConfig, DyViTConfig, ViTConfig
from coma.errors import BadInput, CheckFailed
from coma.runtimes.model_spec import GRAPH_KINDS, Precision, read_model_spec
from coma.runtimes.onnxruntime import OnnxRuntime
from coma.runtimes.open import open_runtime
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shape, Shapes, parse_shapes
from export.graphs.load import example_inputs, load_exportable
from export.graphs.wrappers import AdaptiveAveragePool, SegmentorGraph, replace_adaptive_pooling
from export.onnx_export import cast_weights, with_normalization, write_onnx

pytestmark = pytest.mark.filterwarnings("ignore")  # mm's packages, and torch.onnx, warn of each other

UNIT = export_files.DYVIT.unit
RUN = [Shape(1, 64, 48), Shape(2, 48, 64), Shape(3, 57, 71), Shape(1, UNIT, UNIT)]
"""Four sizes, one of them odd, one the least, and three batches."""
ERRORS = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.1}


def write(
    folder: Path,
    artifact: Path,
    graph,
    precision: Precision,
    shapes: Shapes,
    normalize_in_graph: bool = False,
) -> Path:
    exportable = load_exportable(artifact, graph)
    if normalize_in_graph:
        exportable = with_normalization(exportable)
    path = folder / f"{graph}-{precision}.onnx"
    write_onnx(cast_weights(exportable, precision), shapes, path)
    return path


def compare(artifact: Path, graph, path: Path, shape: Shape, limit: float) -> None:
    reference, runtime = TorchRuntime(load_exportable(artifact, graph)), OnnxRuntime(path, threads=1)
    inputs = example_inputs(reference.spec, shape.batch, shape.height, shape.width)
    names = [each.name for each in reference.spec.inputs]
    wanted, found = (run(**dict(zip(names, inputs, strict=True))) for run in (reference, runtime))
    assert list(found) == [each.name for each in reference.spec.outputs]
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype
        if value.is_floating_point():
            assert value.std() > 0.01, f"{name} says nothing"
            assert (found[name] - value).norm() <= limit * value.norm(), name
        else:
            assert (found[name] == value).double().mean() > 1 - 2 * max(limit, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_ANY_SIZE, ids=lambda case: case.name)
def test_files_give_what_the_model_gives_at_any_size(case, made):
    file = made(case).file
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert {imported.domain for imported in model.opset_import} == {""}
    assert all(node.domain == "" for node in model.graph.node) and not model.functions
    spec = read_model_spec(model, file.name)
    assert spec.inputs[0].axes == ("batch", 3, "height", "width")
    assert spec.precision == case.precision
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT16
        assert value.type.tensor_type.shape.dim[0].dim_param
    too_small = case.model == "segmentor, ViT"  # a pyramid of one token has no smaller map
    for shape in RUN[: len(RUN) - too_small]:
        compare(made(case).artifact, case.graph, file, shape, ERRORS[case.precision])


@pytest.mark.slow
@pytest.mark.parametrize("windows", [((4, 8), (2, 4), (2, 14), (7,))])
def test_windows_that_cross_units_do_for_maps_larger_and_smaller(windows, tmp_path):
    model = replace(export_files.DYVIT, windows=windows)
    artifact = export_files.backbone(tmp_path / "artifact", model)
    path = write(tmp_path, artifact, "encoder", "fp32", FREE)
    for shape in (Shape(1, 16, 16), Shape(2, 125, 128), Shape(1, 112, 112)):
        compare(artifact, "encoder", path, shape, 1e-4)


@pytest.mark.slow
def test_a_segmentor_on_a_plain_vit_traced_with_small_images(made):
    case = made(Case("segmentor, ViT"))
    for shape in (Shape(4, 128, 33), Shape(1, 32, 128)):
        compare(case.artifact, "segmentor", case.file, shape, 1e-4)


@pytest.mark.slow
def test_a_model_that_zooms_in_draws_borders_of_any_width(tmp_path):
    method = BeyondConfig(decoder=export_files.OBJECTIVE.decoder)
    model = ViTConfig(patch=8, dim=16, depth=1, heads=2)
    artifact = export_files.pretrained(tmp_path / "artifact", model, method)
    shapes = Shapes(Shape(1, 24, 24), Shape(2, 64, 48), Shape(4, 256, 256))
    path = write(tmp_path, artifact, "reconstructor", "fp32", shapes)
    for shape in (*RUN[:3], Shape(1, 24, 24), Shape(2, 121, 250)):  # borders of 1, 2 and 3 units
        compare(artifact, "reconstructor", path, shape, 1e-4)
    images, visible = torch.randn(1, 3, 40, 40), torch.zeros(1, 5, 5, dtype=torch.bool)
    visible[:, 1:3, 1:4] = True
    runtime = OnnxRuntime(path, threads=1)
    filled = runtime(images, visible=visible)["reconstruction"]
    visible[:, 0] = True  # the model saw nothing there, whatever the mask says
    assert torch.equal(runtime(images, visible=visible)["reconstruction"], filled)


def test_static_shapes_are_static_and_others_refused(tmp_path):
    artifact = export_files.classifier(tmp_path / "artifact", export_files.VIT)
    fixed = Shape(2, 48, 48)
    path = write(tmp_path, artifact, "classifier", "fp32", Shapes(fixed, fixed, fixed))
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [2, 3, 48, 48]
    compare(artifact, "classifier", path, fixed, 1e-4)
    with pytest.raises(BadInput, match=r"takes images float32 \[2, 3, 48, 48\], given was \[1, 3, 48, 48\]"):
        OnnxRuntime(path)(torch.zeros(1, 3, 48, 48))


@pytest.mark.slow
def test_pixels_in_and_mean_inside(tmp_path):
    artifact = export_files.pretrained(tmp_path / "artifact", export_files.VIT)
    batch = Shapes(Shape(1, 48, 48), Shape(2, 48, 48), Shape(4, 48, 48))
    path = write(tmp_path, artifact, "reconstructor", "fp16", batch, normalize_in_graph=True)
    runtime, reference = open_runtime(path), open_runtime(artifact, graph="reconstructor")
    pixels = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (export_files.MEAN, export_files.STD))
    visible = torch.rand(3, 3, 3) < 0.5
    wanted = reference((pixels / 255 - mean) / std, visible=visible)["reconstruction"]
    found = runtime(pixels, visible=visible)["reconstruction"]
    torch.testing.assert_close(found / 255, wanted * std + mean, atol=5e-3, rtol=0)


@pytest.mark.slow
def test_a_model_without_a_mask_takes_pixels_too(made):
    case = made(Case("classifier", "fp32", BATCHES, pixels=True))
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (export_files.MEAN, export_files.STD))
    wanted = open_runtime(case.artifact)((pixels / 255 - mean) / std)["logits"]
    torch.testing.assert_close(open_runtime(case.file)(pixels)["logits"], wanted, atol=1e-4, rtol=1e-3)


def test_more_channels(tmp_path):
    model = replace(export_files.DYVIT, channels=5)
    config = export_files.about("backbone", model, mean=(0.5,) * 5, std=(0.2,) * 5)
    from coma.artifact import save_artifact
    from coma.models import build_encoder

    save_artifact(tmp_path / "a", tensors=build_encoder(model).state_dict(), config=config)
    path = write(tmp_path, tmp_path / "a", "encoder", "fp32", Shapes(*[Shape(1, 32, 32)] * 3))
    assert OnnxRuntime(path)(torch.zeros(1, 5, 32, 32))["pooled"].shape == (1, 64)


@pytest.mark.slow
def test_a_batch_that_was_baked_in_is_caught(tmp_path):
    class Baked(nn.Module):
        def __init__(self, graph: nn.Module) -> None:
            super().__init__()
            self.model = graph

        def forward(self, images):
            return (self.model(images)[0].reshape(2, -1),)

    artifact = export_files.classifier(tmp_path / "artifact", export_files.VIT)
    exportable = load_exportable(artifact, "classifier")
    baked = replace(exportable, module=Baked(exportable.module))
    with pytest.raises(CheckFailed, match="batch should be dynamic and is fixed at 2"):
        write_onnx(baked, Shapes(Shape(1, 48, 48), Shape(2, 48, 48), Shape(4, 48, 48)), tmp_path / "b.onnx")
    assert not list(tmp_path.glob("b.onnx*"))


def test_runtimes_refuse_what_does_not_fit(tmp_path):
    artifact = export_files.pretrained(tmp_path / "artifact")
    runtime = open_runtime(artifact, graph="reconstructor")
    images, visible = torch.zeros(1, 3, 48, 48), torch.ones(1, 3, 3, dtype=torch.bool)
    with pytest.raises(BadInput, match="takes images and visible, given were images"):
        runtime(images)
    with pytest.raises(BadInput, match="float32"):
        runtime(images.double(), visible=visible)
    with pytest.raises(BadInput, match="smaller than the mask unit"):
        runtime(torch.zeros(1, 3, 8, 48), visible=visible)
    with pytest.raises(BadInput, match="batch is 1 elsewhere"):
        runtime(images, visible=visible.expand(2, -1, -1))
    with pytest.raises(BadInput, match="no such file"):
        open_runtime(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(BadInput, match=r"bad\.onnx: not a readable ONNX file"):
        open_runtime(tmp_path / "bad.onnx")
    with pytest.raises(BadInput, match=r"fell back|has no"):
        OnnxRuntime(write(tmp_path, artifact, "encoder", "fp32", Shapes(*[Shape(1, 32, 32)] * 3)), "cuda")


def test_a_strangers_file_is_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1])], [value("y", 1, [1])])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=opset), tmp_path / "x.onnx")
    with pytest.raises(BadInput, match="holds no specification of a model"):
        open_runtime(tmp_path / "x.onnx")


def test_graphs_of_kinds(tmp_path):
    assert GRAPH_KINDS["pretrained"] == ("encoder", "reconstructor") and GRAPH_KINDS["backbone"] == (
        "encoder",
    )
    assert (
        load_exportable(export_files.pretrained(tmp_path / "p"), "reconstructor").spec.graph
        == "reconstructor"
    )
    export_files.backbone(tmp_path / "b")
    with pytest.raises(BadInput, match="has no detector"):
        load_exportable(tmp_path / "b", "detector")


@pytest.mark.parametrize("side", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(7, 7), (3, 13), (12, 5)])
def test_adaptive_pooling_is_torchs(side, size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(AdaptiveAveragePool(side)(x), nn.AdaptiveAvgPool2d(side)(x))


def test_adaptive_pooling_is_replaced_everywhere_or_refused():
    module = nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d((2, 2))), nn.AdaptiveAvgPool2d(3))
    x = torch.randn(1, 2, 7, 5)
    wanted = module(x)
    replace_adaptive_pooling(module)
    assert not any(isinstance(part, nn.AdaptiveAvgPool2d) for part in module.modules())
    torch.testing.assert_close(module(x), wanted)
    with pytest.raises(BadInput, match="square outputs"):
        replace_adaptive_pooling(nn.Sequential(nn.AdaptiveAvgPool2d((2, 3))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "CascadeEncoderDecoder"}, "CascadeEncoderDecoder"),
        ({"type": "EncoderDecoder", "test_cfg": {"mode": "slide"}}, "slide"),
        ({"type": "EncoderDecoder", "decode_head": {"num_classes": 2, "out_channels": 1}}, "one output"),
    ],
)
def test_other_segmentors_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        SegmentorGraph(nn.Module(), settings)


def test_shapes_are_read_as_written():
    shapes = parse_shapes("1x3x64x64:8x3x64x96:32x3x64x128", 3)
    assert shapes == Shapes(Shape(1, 64, 64), Shape(8, 64, 96), Shape(32, 64, 128))
    assert shapes.dynamic == {"batch", "width"}
    assert parse_shapes("2x64x64", 3).dynamic == frozenset()
    assert shapes.allows(Shape(9, 64, 70)) and not shapes.allows(Shape(9, 65, 70))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3x64", "is not NxCxHxW"),
        ("1x4x64x64", "4 channels, but the model takes 3"),
        ("axbxc", "is not NxCxHxW"),
        ("1x64x64:2x64x64", "give one shape, or three"),
        ("4x64x64:2x64x64:8x64x64", "ascending"),
        ("0x64x64", "at least 1"),
    ],
)
def test_shapes_that_are_none(text, message):
    with pytest.raises(BadInput, match=message):
        parse_shapes(text, 3)


def test_images_below_a_unit_are_refused(tmp_path):
    exportable = load_exportable(export_files.backbone(tmp_path / "a"), "encoder")
    with pytest.raises(BadInput, match="smaller than the encoder's mask unit"):
        write_onnx(exportable, Shapes(*[Shape(1, 8, 64)] * 3), tmp_path / "a.onnx")


def test_default_model_has_crossing_windows():
    assert DyViTConfig().windows[2] == (2, 14)  # which the test of crossing windows stands for
