"""Loops in place of NonMaxSuppression and RoiAlign: torchvision's results, whatever the boxes are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from detectors import Built
from export_files import VIT, classifier, export
from gate_cases import FASTER, FREE, MASK, OF_ANY_SIZE, RETINANET
from tensorrt_files import needs_rtx
from torch import Tensor, nn

from coma.runtimes.onnx_file import read_onnx_file
from coma.runtimes.shape_ranges import Shapes
from coma.runtimes.tensorrt.profiles import profile_of
from export.custom_ops import nms_keep, pool_regions, translations
from export.tensorrt.rtx import check_rtx

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.filterwarnings("ignore"),  # mm's packages, and torch.onnx, warn of each other
]

PLUGINS = {"NonMaxSuppression", "RoiAlign"}


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))
    return [torch.from_numpy(each) for each in found]


def through_onnx(path: Path, module: nn.Module, inputs: tuple[Tensor, ...], axes: Any) -> list[Tensor]:
    program = torch.onnx.export(
        module.eval(),
        inputs,
        dynamo=True,
        opset_version=18,
        dynamic_shapes=axes,
        custom_translation_table=translations(plugin_free=True),
        verbose=False,
    )
    assert program is not None
    onnx.checker.check_model(program.model_proto, full_check=True)
    onnx.save(program.model_proto, path)
    assert not operators(path) & PLUGINS
    return run(path, *inputs)


def operators(path: Path) -> set[str]:
    """Every operator of a file, those of loops included."""
    waiting, found = [onnx.load(path).graph], set()
    while waiting:
        for node in waiting.pop().node:
            found.add(node.op_type)
            waiting += [each.g for each in node.attribute if each.HasField("g")]
    return found


class Suppression(nn.Module):
    def __init__(self, iou: float, least: float, limit: int) -> None:
        super().__init__()
        self.settings = iou, least, limit

    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        return nms_keep(boxes, scores, *self.settings)


def chain(count: int) -> Tensor:
    """Boxes of which each overlaps the one before and the one after by half: every second one stays."""
    start = torch.arange(count)[:, None] * torch.tensor([[4.0, 0.0]])
    return torch.cat((start, start + torch.tensor([[12.0, 10.0]])), 1)


@pytest.mark.parametrize("limit", [1000, 200, 7], ids=["together", "in turn", "few"])
def test_suppression_is_greedy(limit, tmp_path):
    torch.manual_seed(0)
    count, shared = 400, limit < 301
    start = torch.rand(count, 2) * 100
    crowd = torch.cat((start, start + torch.rand(count, 2) * 60), 1).round()  # ties of all kinds
    crowd[:20] = crowd[20:40]
    crowd[40:50, 2:] = crowd[40:50, :2]  # no area
    boxes = torch.stack((crowd, chain(count)))
    falling = torch.linspace(1, 0.01, count)
    scores = torch.stack((torch.rand(count).round(decimals=1), falling))[:, None]
    if shared:
        scores = torch.cat((scores, falling.flip(0).expand(2, 1, count), torch.zeros(2, 1, count)), 1)
    wanted = nms_keep(boxes, scores, 0.45, 0.05, limit)
    (found,) = through_onnx(
        tmp_path / "nms.onnx", Suppression(0.45, 0.05, limit), (boxes, scores), ({0: "b"}, {0: "b"})
    )
    assert torch.equal(found, wanted)
    assert wanted[1, 0].sum() == min(limit, len(range(0, int((falling > 0.05).sum()), 2)))
    (alone,) = run(tmp_path / "nms.onnx", boxes[1:], scores[1:])
    assert torch.equal(alone, wanted[1:])
    (nothing,) = run(tmp_path / "nms.onnx", boxes, torch.zeros_like(scores))
    assert not nothing.any()


class Pool(nn.Module):
    def __init__(self, size: list[int], samples: int, aligned: bool) -> None:
        super().__init__()
        self.settings = size, samples, aligned

    def forward(self, regions: Tensor, level: Tensor, *maps: Tensor) -> Tensor:
        scales = [1 / 4, 1 / 8, 1 / 16][: len(maps)]
        return pool_regions(list(maps), regions, level, scales, *self.settings)


@pytest.mark.parametrize(
    ("size", "samples", "aligned", "levels"),
    [([7, 7], 0, True, 3), ([3, 5], 2, False, 2), ([2, 1], 0, False, 1)],
)
def test_regions_of_any_form(size, samples, aligned, levels, tmp_path):
    torch.manual_seed(0)
    maps = [torch.randn(2, 6, 64 >> k, 96 >> k) for k in range(levels)]
    start = torch.rand(60, 2) * 250
    boxes = torch.cat((start, start + torch.rand(60, 2) * 130), 1)
    boxes[0] = torch.tensor([-40.0, 100.0, 430.0, 103.0])  # far wider than high, and over both borders
    boxes[1] = torch.tensor([60.0, -90.0, 60.5, 400.0])
    boxes[2] = torch.tensor([0.0, 0.0, 384.0, 256.0])
    boxes[3, 2:] = boxes[3, :2]
    boxes[4] = 0
    boxes[5] = torch.tensor([900.0, 900.0, 990.0, 960.0])  # outside
    regions = torch.cat((torch.arange(60)[:, None] % 2, boxes), 1)
    level = (torch.arange(60) // 2 % levels).float()
    wanted = pool_regions(maps, regions, level, [1 / 4, 1 / 8, 1 / 16][:levels], size, samples, aligned)
    axes = ({0: "r"}, {0: "r"}, tuple({2: f"h{k}", 3: f"w{k}"} for k in range(levels)))
    (found,) = through_onnx(
        tmp_path / "pool.onnx", Pool(size, samples, aligned), (regions, level, *maps), axes
    )
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    (empty,) = run(tmp_path / "pool.onnx", regions[3:5] * 0, level[3:5] * 0, *maps)
    assert torch.isfinite(empty).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", [RETINANET, FASTER, MASK], ids=lambda case: case.model)
def test_a_detector_without_plugins_is_the_detector(case, made):
    native, free = (made(each).file for each in (case, replace(case, plugin_free=True)))
    assert read_onnx_file(native)[0] == read_onnx_file(free)[0]
    assert operators(native) & PLUGINS and not operators(free) & PLUGINS
    for size in ((2, 3, 64, 64), (1, 3, 64, 96)):  # 1000 regions of each image are pooled: small ones
        images = torch.randn(size)
        for wanted, found in zip(run(native, images), run(free, images), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert (run(free, images)[1] > 0).sum() > 3


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in OF_ANY_SIZE if case.precision == "fp32"], ids=lambda case: case.name
)
def test_rtx_compiles_every_kind(case, made):
    compile_for_rtx(made(case).file, FREE)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("case", [FASTER, MASK, RETINANET], ids=lambda case: case.model)
def test_rtx_compiles_every_detector(case, made):
    compile_for_rtx(made(replace(case, plugin_free=True)).file, case.shapes)


def compile_for_rtx(path: Path, shapes: Shapes) -> None:
    """Compiles with free batch, height and width."""
    spec, _ = read_onnx_file(path)
    assert {"batch", "height", "width"} <= set(spec.inputs[0].axes)
    assert check_rtx(path, (profile_of(spec, shapes),)).layers > 100


def test_only_detectors_have_plugins(tmp_path, capsys):
    artifact = classifier(tmp_path / "artifact", VIT)
    assert export(artifact, "--plugin-free") == 2
    assert "--plugin-free has an effect on detectors only" in capsys.readouterr().err


@needs_rtx
def test_rtx_needs_a_detector_without_plugins(tmp_path, capsys):
    Built(tmp_path)["retinanet"]
    assert export(tmp_path / "retinanet", "--check", "rtx") == 2
    assert "add --plugin-free" in capsys.readouterr().err
