"""Models and exported files on a GPU beside PyTorch on a CPU. Skipped without one."""

import pytest
import torch
from export_files import backbone, pretrained

from coma.runtimes.onnxruntime import OnnxRuntime, providers
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shape, Shapes
from export.graphs.load import load_exportable
from export.onnx_export import write_onnx

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # the exporter's own


@pytest.mark.parametrize("graph", ["encoder", "reconstructor"])
def test_pytorch_computes_there_what_it_does_on_a_cpu(accelerator, tmp_path, graph):
    artifact = backbone(tmp_path / "a") if graph == "encoder" else pretrained(tmp_path / "a")
    images = torch.randn(2, 3, 48, 48)
    others = {} if graph == "encoder" else {"visible": torch.rand(2, 3, 3) > 0.5}
    here = TorchRuntime(load_exportable(artifact, graph))(images, **others)
    there = TorchRuntime(load_exportable(artifact, graph), accelerator.type)(images, **others)
    for name, expected in here.items():
        assert there[name].device.type == accelerator.type
        torch.testing.assert_close(there[name].cpu(), expected, rtol=1e-3, atol=1e-3)


def test_onnx_runtime_computes_there_what_pytorch_does(accelerator, tmp_path):
    if accelerator.type not in providers():
        pytest.skip(f"this ONNX Runtime offers {', '.join(providers())}")
    exportable = load_exportable(backbone(tmp_path / "a"), "encoder")
    path, side = tmp_path / "encoder.onnx", 48
    write_onnx(exportable, Shapes(Shape(1, side, side), Shape(2, side, side), Shape(2, side, side)), path)
    images = torch.randn(2, 3, side, side)
    expected = TorchRuntime(load_exportable(tmp_path / "a", "encoder"))(images)
    found = OnnxRuntime(path, accelerator.type)(images.to(accelerator))  # type: ignore[arg-type]
    for name, each in expected.items():
        torch.testing.assert_close(found[name].cpu(), each, rtol=1e-3, atol=1e-3)
