"""The gate: it passes what is right and catches what was made wrong on purpose."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import export_files
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from coma.data.transforms import normalize
from coma.errors import BadInput
from coma.runtimes.model_spec import GraphKind, Precision, Preprocessing, TensorSpec, read_model_spec
from coma.runtimes.onnxruntime import OnnxRuntime
from coma.runtimes.preprocessing import fit_within, resize_image, to_input
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shape, Shapes
from export.graphs.load import load_exportable
from export.image_sets import read_image_set
from export.onnx_export import load_onnx, save_onnx, write_onnx
from export.preprocessing import Photographs, evenly_spaced, open_images
from export.verify.bisect import locate
from export.verify.detections import add_detections, match
from export.verify.errors import OutputError, OutputErrors, cosine, split_pixels
from export.verify.parity import _Comparison, verify
from export.verify.shapes import shapes_to_run
from export.verify.task_metrics import top1
from export.verify.tolerances import TOLERANCES, tolerance_of
from export.verify.verdict import find_failures

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself

SHAPES = Shapes(Shape(1, 48, 48), Shape(2, 48, 48), Shape(4, 48, 48))


@pytest.fixture(scope="module")
def made(once) -> Path:
    """A classifier's artifact and its ONNX file."""

    def fill(folder: Path) -> None:
        artifact = export_files.classifier(folder / "artifact")
        write_onnx(load_exportable(artifact, "classifier"), SHAPES, folder / "c.onnx")

    return once("gate", fill)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(read_image_set(Photographs(), 3, 6).pictures)


def gate(folder: Path, file: Path, pictures):
    reference = TorchRuntime(load_exportable(folder / "artifact", "classifier"))
    return verify(reference, OnnxRuntime(file, threads=1), SHAPES, pictures)


def changed(folder: Path, target: Path, change) -> Path:
    model = load_onnx(folder / "c.onnx")
    change(model)
    save_onnx(model, target)
    return target


def weight_of(model: onnx.ModelProto, scope: str) -> onnx.TensorProto:
    """The matrix that the module of this path multiplies with."""
    stored = {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        scopes = {prop.key: prop.value for prop in node.metadata_props}
        if node.op_type in ("MatMul", "Gemm") and f"'{scope}'" in scopes.get(
            "pkg.torch.onnx.name_scopes", ""
        ):
            for name in node.input:
                if name in stored and len(stored[name].dims) == 2:
                    return stored[name]
    raise AssertionError(f"no weight of {scope}")


def test_what_is_right_passes(made, pictures):
    verdict = gate(made, made / "c.onnx", pictures)
    assert verdict.passed and verdict.images == 6
    assert verdict.outputs["logits"].cosine > 0.999999
    assert {shape.batch for shape in verdict.shapes} == {1, 2, 3, 4}
    plain = json.loads(json.dumps(verdict.to_dict()))
    assert list(plain["by_shape"]) == plain["shapes"] == [str(shape) for shape in verdict.shapes]
    worst = max(errors["logits"]["relative"] for errors in plain["by_shape"].values())
    assert plain["outputs"]["logits"]["relative"] == worst


def test_pytorchs_outputs_are_computed_once_and_kept_while_they_are_needed(made, pictures):
    calls = []

    class Counted(TorchRuntime):
        def __call__(self, images, **others):
            calls.append(tuple(images.shape))
            return super().__call__(images, **others)

    reference = Counted(load_exportable(made / "artifact", "classifier"))
    verify(reference, OnnxRuntime(made / "c.onnx", threads=1), SHAPES, pictures)
    assert calls == [(1, 3, 48, 48)] * len(pictures)
    wanted = _Comparison(reference, reference, None, pictures, again=2)
    for number in (0, 1, 2, 3, 0):
        wanted._run_reference(number, 48, 48)
    assert set(wanted._known) == {0, 1} and len(calls) == len(pictures) + 4
    wanted._run_reference(1, 32, 64)
    assert set(wanted._known) == {1} and calls[-1] == (1, 3, 32, 64)


def test_a_corrupted_weight_is_refused_and_named(made, pictures, tmp_path):
    scope = "classifier.stages.2.blocks.0.mlp.fc1"

    def corrupt(model):
        weight = weight_of(model, scope)
        values = onnx.numpy_helper.to_array(weight).copy()
        values[:, : len(values) // 2] *= -3
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    file = changed(made, tmp_path / "c.onnx", corrupt)
    verdict = gate(made, file, pictures)
    assert not verdict.passed and "cosine" in verdict.failures[0]
    exportable = load_exportable(made / "artifact", "classifier")
    rule = exportable.spec.preprocessing
    images = to_input([resize_image(pictures[0], rule)], rule)
    finding = locate(exportable.module, load_onnx(file), (images,), 2e-5)
    assert finding and finding.module == scope
    assert finding.before == "classifier.stages.2.blocks.0.norm2" and scope in str(finding)
    assert locate(exportable.module, load_onnx(made / "c.onnx"), (images,), 2e-5) is None


def test_nan_is_refused(made, pictures, tmp_path):
    def spoil(model):
        weight = weight_of(model, "classifier.head")
        values = onnx.numpy_helper.to_array(weight).copy()
        values.flat[0] = np.nan
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    verdict = gate(made, changed(made, tmp_path / "c.onnx", spoil), pictures)
    assert verdict.failures == ("logits holds NaN or infinite values (at 1 x 48 x 48)",)
    assert verdict.to_dict()["outputs"]["logits"]["max"] is None


def test_a_baked_batch_is_refused(made, pictures, tmp_path):
    def bake(model):
        shape = model.graph.input[0].type.tensor_type.shape.dim[0]
        shape.Clear()
        shape.dim_value = 2

    verdict = gate(made, changed(made, tmp_path / "c.onnx", bake), pictures)
    assert any("cannot be run at 1 x 48 x 48" in failure for failure in verdict.failures)


def test_a_metric_of_labelled_images(made, tmp_path):
    runtime = OnnxRuntime(made / "c.onnx", threads=1)
    names = export_files.CLASSES
    rule = runtime.spec.preprocessing
    pictures = list(read_image_set(Photographs(), 3, 6).pictures)
    for number, pixels in enumerate(pictures):
        guess = names[int(runtime(to_input([resize_image(pixels, rule)], rule))["logits"].argmax())]
        label = guess if number < 4 else names[(names.index(guess) + 1) % 3]
        (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / label / f"{number}.png")
    (tmp_path / "data" / "cup").mkdir(exist_ok=True)
    source = open_images(tmp_path / "data")
    if source.labels is None:
        pytest.fail("the folder has labels")
    (tmp_path / "data" / names[0]).mkdir(exist_ok=True)
    (tmp_path / "data" / names[0] / "broken.png").write_bytes(b"no picture")
    scores, selection = top1(runtime, open_images(tmp_path / "data"), 100)
    assert scores == {"top-1": pytest.approx(100 * 4 / 6)}
    assert (selection.used, list(selection.left_out)) == (6, [f"{names[0]}/broken.png"])
    (tmp_path / "data" / names[0] / "broken.png").unlink()
    with pytest.raises(BadInput, match="no labels"):
        top1(runtime, Photographs(), 10)
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    (tmp_path / "other" / names[0]).mkdir(exist_ok=True)
    shutil.copy(next(tmp_path.glob("data/*/*.png")), tmp_path / "other" / names[0] / "x.png")
    (tmp_path / "other" / names[0]).rename(tmp_path / "other" / "dog")
    with pytest.raises(BadInput, match="the model does not have the classes dog; it has"):
        top1(runtime, open_images(tmp_path / "other"), 10)


def test_detections_are_matched_whatever_their_order():
    wanted = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [20, 20, 41, 40], [0, 0, 0, 0]]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.0]),
        "labels": torch.tensor([0, 1, 1, -1]),
    }
    swapped = {name: each[[1, 0, 2, 3]] for name, each in wanted.items()}
    assert match(wanted, swapped).tolist() == [1, 0, 2, -1]
    other = {**wanted, "labels": torch.tensor([2, 1, 1, -1])}
    assert match(wanted, other).tolist() == [-1, 1, 2, -1]
    gone = {**wanted, "scores": torch.zeros(4)}
    errors = OutputErrors()
    add_detections(errors, wanted, gone, "detections")
    assert errors.of("labels").agreement == 0
    moved = {**wanted, "boxes": wanted["boxes"] + 1.5}
    assert (match(wanted, moved) >= 0).sum() < 3
    flat = {**wanted, "boxes": wanted["boxes"] * torch.tensor([1, 0, 1, 0])}  # boxes without area
    assert match(flat, flat).tolist() == [0, 1, 2, -1]


def test_detections_with_low_scores_are_counted_apart():
    wanted = detections(0.9, 0.2, 0.1, 0.0)
    found = {**wanted, "labels": torch.tensor([0, 1, 0, 0])}
    errors = OutputErrors()
    add_detections(errors, wanted, found, "detections")
    assert errors.of("labels").agreement == 1
    assert errors.of("labels below 0.3").agreement == 0.5
    assert errors.of("scores").compared == 2


def test_cosine_is_scipys():
    from scipy.spatial.distance import cosine as distance

    a, b = torch.randn(50).double(), torch.randn(50).double()
    assert cosine(a, b) == pytest.approx(1 - distance(a.numpy(), b.numpy()))
    assert cosine(torch.zeros(3), torch.zeros(3)) == 1
    difference = OutputError()
    difference.add(a, b)
    error = (a - b).abs()
    assert difference.max == pytest.approx(error.max().item())
    assert difference.mean == pytest.approx(error.mean().item())


def test_hidden_and_visible_pixels_of_a_reconstruction_are_judged_apart():
    images = torch.arange(32.0).view(2, 4, 4)
    visible = torch.tensor([[True, False], [True, True]])
    hidden, seen = split_pixels(images, visible, 2)
    torch.testing.assert_close(hidden, images[:, :2, 2:].reshape(2, 4))
    assert seen.shape == (2, 12) and not set(hidden.flatten().tolist()) & set(seen.flatten().tolist())
    torch.testing.assert_close(
        split_pixels(images[:, :3, :3], visible, 2)[0], images[:, :2, 2:3].reshape(2, 2)
    )


def test_a_wrong_scale_is_refused_though_its_cosine_is_1(made, pictures, tmp_path):
    def scale(model):
        for node in model.graph.node:
            for place, name in enumerate(node.output):
                if name == "logits":
                    node.output[place] = "unscaled"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.1, np.float32), "more"))
        model.graph.node.append(onnx.helper.make_node("Mul", ["unscaled", "more"], ["logits"]))

    verdict = gate(made, changed(made, tmp_path / "c.onnx", scale), pictures)
    assert verdict.outputs["logits"].cosine > 0.9999
    assert len(verdict.failures) == 1 and "relative error 0.1 is above 2e-05" in verdict.failures[0]


def test_outputs_of_another_size_or_type_are_refused(made, pictures, tmp_path):
    def twice(model):
        for node in model.graph.node:
            for place, name in enumerate(node.output):
                if name == "logits":
                    node.output[place] = "once"
        model.graph.node.append(onnx.helper.make_node("Concat", ["once", "once"], ["logits"], axis=1))
        model.graph.output[0].type.tensor_type.ClearField("shape")

    verdict = gate(made, changed(made, tmp_path / "c.onnx", twice), pictures)
    assert "logits is torch.float32" in verdict.failures[0] and "PyTorch's" in verdict.failures[0]


def detections(*scores: float) -> dict[str, torch.Tensor]:
    """Boxes that lie apart, of the class 0."""
    corners = 20.0 * torch.arange(len(scores))[:, None].expand(-1, 4)
    boxes = corners + torch.tensor([0.0, 0.0, 10.0, 10.0])
    return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.zeros(len(scores)).long()}


def judged(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    errors = OutputErrors()
    add_detections(errors, wanted, found, "detections")
    return find_failures({SHAPES.opt: errors}, "detector", TOLERANCES["fp32"])


def test_invented_repeated_and_misjudged_detections_are_refused():
    wanted = detections(0.9, 0.8, 0.7)
    assert judged(wanted, wanted) == []
    assert "labels" in judged(wanted, detections(0.9, 0.8, 0.7, 0.6))[0]
    repeated = {name: torch.cat([values, values[:1]]) for name, values in wanted.items()}
    assert "labels" in judged(wanted, repeated)[0]
    assert "labels" in judged(wanted, {name: values[:2] for name, values in wanted.items()})[0]
    halved = wanted | {"scores": wanted["scores"] / 2}
    assert judged(wanted, halved) == ["scores: relative error 0.5 is above 0.001 (at 2 x 48 x 48)"]


def test_limits_depend_on_precision():
    def failures(error: OutputError, precision: Precision = "int8", graph: GraphKind = "encoder"):
        return find_failures({SHAPES.opt: OutputErrors({"x": error})}, graph, TOLERANCES[precision])

    known = OutputError(cosine=0.995, compared=1, largest=2.0)
    assert failures(known) == []
    assert failures(known, "fp16") == ["x: cosine 0.995000 is below 0.999 (at 2 x 48 x 48)"]
    assert "no values to compare" in failures(OutputError())[0]
    silent = OutputError()
    silent.add(torch.zeros(3), torch.zeros(3))  # equal, and of no worth
    assert "the comparison is empty" in failures(silent)[0]
    assert "PyTorch detected nothing" in failures(OutputError("detections"), graph="detector")[0]
    assert tolerance_of("fp32", gpu=True).relative > tolerance_of("fp32").relative
    assert tolerance_of("int8", gpu=True) == tolerance_of("int8") == TOLERANCES["int8"]


def test_the_shape_of_the_largest_error_is_named():
    small, large = Shape(1, 16, 16), Shape(1, 32, 48)
    errors = {small: OutputErrors(), large: OutputErrors()}
    errors[small].add({"x": torch.ones(4)}, {"x": torch.ones(4)})
    errors[large].add({"x": torch.ones(4)}, {"x": 1.1 * torch.ones(4)})
    assert find_failures(errors, "encoder", TOLERANCES["fp32"])[0].endswith("(at 1 x 32 x 48)")


def test_every_batch_and_size_is_run():
    free = Shapes(Shape(1, 32, 32), Shape(4, 96, 64), Shape(8, 256, 256))
    run = shapes_to_run(free, 32)
    assert run[0] == Shape(1, 96, 64) and all(free.allows(shape) for shape in run)
    assert {shape.batch for shape in run if (shape.height, shape.width) == (96, 64)} == {1, 2, 3, 4, 8}
    sizes = {(shape.height, shape.width) for shape in run}
    assert {(32, 32), (256, 256), (78, 78), (45, 135), (135, 45)} < sizes
    assert any(height % 2 and height != width for height, width in sizes)
    largest = Shapes(Shape(1, 32, 32), Shape(1, 64, 64), Shape(1, 64, 64))  # the usual is the most
    assert any(shape.height % 2 and shape.height != shape.width for shape in shapes_to_run(largest, 32))
    fixed = Shape(3, 64, 64)
    assert shapes_to_run(Shapes(fixed, fixed, fixed), 32) == (fixed,)
    batches = shapes_to_run(Shapes(Shape(4, 64, 64), Shape(6, 64, 64), Shape(16, 64, 64)), 32)
    assert [shape.batch for shape in batches] == [4, 5, 6, 16]


def test_images_are_prepared_as_in_evaluation():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    rule = Preprocessing("centre-square", (40, 40), (0.5,) * 3, (0.25,) * 3)
    image = resize_image(pixels, rule)
    assert torch.equal(image, torch.from_numpy(pixels[:, 10:50].copy()).permute(2, 0, 1))
    expected = normalize(image[None], rule.mean, rule.std)
    torch.testing.assert_close(to_input([image], rule), expected)
    assert to_input([image], replace(rule, normalize_in_graph=True)).dtype == torch.uint8
    assert resize_image(pixels, Preprocessing("none", None, (0.5,) * 3, (0.2,) * 3)).shape == (3, 40, 60)


@pytest.mark.parametrize(("size", "scale"), [((480, 640), (800, 1333)), ((375, 500), (240, 400))])
def test_keep_ratio_is_openmmlabs(size, scale):
    import mmcv

    pixels = np.asarray(Image.fromarray(read_image_set(Photographs(), 3, 1).pictures[0]).resize(size[::-1]))
    wanted = np.asarray(mmcv.imrescale(pixels, (scale[1], scale[0])))
    rule = Preprocessing("keep-ratio", scale, (0.5,) * 3, (0.2,) * 3)
    found = resize_image(pixels, rule).permute(1, 2, 0).numpy()
    assert found.shape == wanted.shape and fit_within(size[0], size[1], scale) == wanted.shape[:2]
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert resize_image(pixels[:1].repeat(9, axis=1), rule).shape == (3, 1, scale[1])


def test_images_are_evenly_spaced():
    found = [evenly_spaced(*numbers) for numbers in ((3, 9), (9, 3), (4, 1), (0, 2))]
    assert found == [[0, 1, 2], [0, 4, 8], [0], []]


def test_ports_in_json_come_back(made):
    spec = read_model_spec(load_onnx(made / "c.onnx"), "c")
    assert spec.outputs == (TensorSpec("logits", "float32", ("batch", 3)),)
    assert spec.class_names == export_files.CLASSES
