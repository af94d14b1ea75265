"""OpenVINO beside ONNX Runtime: PyTorch's results for every kind of file, in the file's precision."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from export_files import export
from gate_cases import FASTER, MASK, OF_ANY_SIZE, RETINANET
from onnx import TensorProto, helper

from coma.cli import main
from coma.errors import BadInput, CheckFailed
from coma.runtimes import names, openvino
from coma.runtimes.base import Runtime
from coma.runtimes.manifest import Manifest
from coma.runtimes.model_spec import METADATA, ModelSpec, Preprocessing, TensorSpec, to_json
from coma.runtimes.onnxruntime import OnnxRuntime
from coma.runtimes.open import open_runtime
from coma.runtimes.openvino import OpenVINORuntime
from coma.runtimes.pytorch import TorchRuntime
from export.gate import Gate
from export.graphs.load import load_exportable, named_examples
from export.onnx_export import load_onnx
from export.verify.opened_file import open_file
from export.verify.parity import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch.onnx and mm's packages warn of each other
    pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed (extra openvino)"),
]


def agree(reference: Runtime, file: Path, limit: float) -> None:
    """Compares OpenVINO with the reference at free sizes, odd ones too."""
    runtime = OpenVINORuntime(file, threads=1)
    for batch, height, width in ((1, 64, 48), (2, 48, 64), (3, 57, 71)):
        inputs = named_examples(reference.spec, batch, height, width)
        wanted, found = reference(**inputs), runtime(**inputs)
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
            if value.is_floating_point():
                assert (found[name] - value).norm() <= limit * value.norm(), name
            else:
                assert (found[name] == value).double().mean() > 1 - 2 * max(limit, 0.01)


def test_a_file_that_was_verified_with_both_says_so_and_runs_with_both(
    run_folder, caplog, capsys, monkeypatch
):
    scores = {"torch": 97.0, "ONNX": 97.05, "OpenVINO": 96.95}
    monkeypatch.setattr(Gate, "_score", lambda _, each: ({"top-1": scores[each.title.split()[0]]}, None))
    (run_folder / "artifact").rename(run_folder / "a")
    assert export(run_folder / "a", "--device", "cpu,openvino", "--out", str(run_folder / "both")) == 0
    file = run_folder / "both" / "classifier.onnx"
    manifest = Manifest.read(file.parent, "")
    assert manifest and manifest.files[0].runtime.startswith("ONNX Runtime")
    (also,) = manifest.files[0].also_verified.values()
    assert also["passed"] and also["outputs"]["logits"]["relative"] < 2e-5
    metric = {name.split()[0]: found["top-1"] for name, found in manifest.files[0].metric.items()}
    assert metric == {"torch": 97.0, "file": 97.05, "OpenVINO": 96.95}
    report = (file.parent / "report.md").read_text()
    assert "; OpenVINO 2" in report and "top-1 97.05 (+0.05); OpenVINO 2" in report
    assert ", cpu: top-1 96.95 (-0.05)" in report
    images = {"images": torch.randn(1, 3, 48, 48)}
    found = open_runtime(file, "openvino")(**images)["logits"]
    torch.testing.assert_close(found, open_runtime(file)(**images)["logits"], rtol=1e-4, atol=1e-5)
    assert "was verified with" not in caplog.text
    capsys.readouterr()
    command = ["benchmark", str(run_folder / "a"), "--exports", str(file.parent), "--batch", "1"]
    out = run_folder / "r.json"
    quick = ["--benchmark-seconds", "0.01", "--threads", "1", "--out", str(out)]
    assert main([*command, "--device", "cpu,openvino", *quick]) == 0
    rows = [(row["name"], row["runtime"].split()[0]) for row in json.loads(out.read_text())["rows"]]
    assert set(rows) == {("torch eager", "torch"), *((file.name, name) for name in ("ONNX", "OpenVINO"))}


def test_a_file_that_was_verified_with_another_library_is_opened_with_a_warning(exported, caplog):
    open_runtime(exported / "export" / "classifier.onnx", "openvino")
    assert "classifier.onnx: was verified with ONNX Runtime" in caplog.text
    assert "not with OpenVINO; export it again with --device openvino" in caplog.text


def test_what_openvino_computes_wrongly_is_refused(run_folder, monkeypatch, capsys):
    run = OpenVINORuntime.__call__

    def wrong(self, images, **others):
        return {name: value * 1.001 for name, value in run(self, images, **others).items()}

    monkeypatch.setattr(OpenVINORuntime, "__call__", wrong)
    assert export(run_folder / "artifact", "--device", "cpu,openvino") == 1
    assert "classifier.onnx: OpenVINO 2" in capsys.readouterr().err
    manifest = Manifest.read(run_folder / "export", "")
    assert manifest and any("OpenVINO" in each for each in manifest.rejected[0].verification["failures"])


def test_missing_packages_and_devices_are_one_line(exported, monkeypatch, capsys):
    file = exported / "export" / "classifier.onnx"
    with pytest.raises(BadInput, match=r"openvino-gpu: OpenVINO finds no Intel GPU.*, only CPU \("):
        open_runtime(file, "openvino-gpu")
    with pytest.raises(BadInput, match="an artifact runs on cpu or cuda"):
        open_runtime(exported / "artifact", "openvino")
    assert export(exported / "artifact", "--device", "cpu,coreml") == 2
    assert "--device 'cpu,coreml': give some of cpu, cuda, tensorrt, openvino" in capsys.readouterr().err
    openvino._core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BadInput, match=r"openvino is not installed; pip install 'coma-dyvit\[openvino\]'"):
        open_runtime(file, "openvino")


def test_its_import_sends_nothing():
    openvino._library()
    assert sys.modules["openvino_telemetry"] is None  # what reports the import to its makers


def test_an_fp32_file_is_computed_in_fp32(exported, monkeypatch):
    file, images = exported / "export" / "classifier.onnx", {"images": torch.randn(4, 3, 48, 48)}
    images["images"] = images["images"][:1]
    reference = TorchRuntime(load_exportable(exported / "artifact", "classifier"))(**images)["logits"]

    def error() -> float:
        return float((OpenVINORuntime(file)(**images)["logits"] - reference).norm() / reference.norm())

    assert error() < 1e-5
    if "BF16" in openvino._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        monkeypatch.setattr(openvino, "_inference_precision", lambda *_: "bf16")  # what it would choose
        assert error() > 1e-4


@pytest.mark.parametrize(
    ("plugin", "precision", "hint"),
    [
        *(("CPU", precision, "f32") for precision in ("fp32", "fp16", "int8+fp16", "int8")),
        *(("GPU", "fp16", "f16"), ("CPU", "bf16", "bf16"), ("GPU", "bf16", "f32")),
    ],
)
def test_the_precision_that_it_is_asked_for(plugin, precision, hint):
    listed = {"CPU": ["FP32", "FP16", "BF16", "INT8"], "GPU": ["FP32", "FP16", "INT8"]}
    core = SimpleNamespace(get_property=lambda name, _: listed[name])
    assert openvino._inference_precision(core, plugin, precision) == hint


@pytest.mark.slow
def test_a_detector_in_16_bits_is_compared_by_its_detections(made, pictures):
    case = made(replace(FASTER, precision="fp16"))
    opened = [
        open_file(case.file, load_onnx(case.file), "detector", "fp16", device)
        for device in ("cpu", "openvino")
    ]
    assert [each.steps is None for each in opened] == [False, True]
    for each in opened:
        result = verify(
            case.reference, each.runtime, FASTER.shapes, pictures, steps=each.steps, tolerance=each.tolerance
        )
        assert result.passed, result.failures


def test_files_that_are_none_and_images_that_do_not_fit_are_refused(exported, tmp_path):
    bad = tmp_path / "x.onnx"
    bad.write_bytes(b"no model")
    with pytest.raises(BadInput, match=r"x\.onnx: "):
        OpenVINORuntime(bad)
    model = onnx.load(exported / "export" / "classifier.onnx")
    model.graph.node[3].domain = "of.nobody"
    model.opset_import.append(helper.make_opsetid("of.nobody", 1))
    onnx.save(model, bad)
    with pytest.raises(CheckFailed, match=r"x\.onnx: OpenVINO cannot load it: .*of\.nobody"):
        OpenVINORuntime(bad)
    runtime = OpenVINORuntime(exported / "export" / "classifier.onnx")
    with pytest.raises(BadInput, match="the classifier takes images float32"):
        runtime(torch.zeros(1, 4, 48, 48))


def concatenated(convolution: bool) -> bytes:
    """A graph whose convolution, or matrix product, reads quantised maps that were concatenated."""
    random = np.random.default_rng(0)
    stored = {
        "w": random.integers(-127, 128, (8, 16, 3, 3) if convolution else (16, 8)).astype(np.int8),
        "w_scale": random.uniform(0.01, 0.02, 8).astype(np.float32),
        "w_zero": np.zeros(8, np.int8),
        "scale": np.array(0.03, np.float32),
        "zero": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("Neg", ["images"], ["other"]),
        helper.make_node("Concat", ["images", "other"], ["maps"], axis=1),
        helper.make_node("QuantizeLinear", ["maps", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["v"], axis=int(not convolution)),
    ]
    if convolution:
        nodes.append(helper.make_node("Conv", ["x", "v"], ["logits"], pads=[1] * 4, kernel_shape=[3, 3]))
    else:
        nodes += [
            helper.make_node("Transpose", ["x"], ["last"], perm=[0, 2, 3, 1]),
            helper.make_node("MatMul", ["last", "v"], ["product"]),
            helper.make_node("Transpose", ["product"], ["logits"], perm=[0, 3, 1, 2]),
        ]
    axes = ("batch", 8, "height", "width")
    spec = ModelSpec(
        graph="segmentor",
        precision="int8",
        inputs=(TensorSpec("images", "float32", axes),),
        outputs=(TensorSpec("logits", "float32", axes),),
        preprocessing=Preprocessing("none", None, (0.5,) * 8, (0.5,) * 8),
        unit=4,
        class_names=None,
        source="",
        versions={},
    )
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in ("images", "logits")]
    kept = [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], kept)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    helper.set_model_props(model, {METADATA: to_json(spec)})
    return model.SerializeToString()


@pytest.mark.parametrize("convolution", [True, False])
def test_what_it_would_compute_wrongly_in_int8_is_computed_in_fp32(convolution, monkeypatch):
    graph = concatenated(convolution)
    images = torch.randn(2, 8, 16, 12, generator=torch.Generator().manual_seed(0))
    wanted = OnnxRuntime(graph)(images)["logits"]

    def error(runtime) -> float:
        return float((runtime(images)["logits"] - wanted).norm() / wanted.norm())

    runtime = OpenVINORuntime(graph)
    assert error(runtime) < 1e-4
    assert runtime.title.endswith("int8 computed in fp32") == convolution
    if convolution and "amx_int8" not in Path("/proc/cpuinfo").read_text():
        monkeypatch.setattr(openvino, "_is_wrong_in_int8", lambda _: False)
        assert error(OpenVINORuntime(graph)) > 0.1  # the workaround can go once this fails


@pytest.mark.parametrize(
    ("runtime", "device", "message"),
    [
        ("openvino", "cuda", "--device cuda: --runtime openvino runs on a CPU"),
        (
            "openvino-gpu",
            "cpu",
            "--device cpu: .* a CPU, openvino-gpu on an Intel GPU",
        ),
        ("openvino-gpu", "auto", "OpenVINO finds no Intel GPU"),
    ],
)
def test_commands_refuse_devices_that_it_does_not_run_on(exported, runtime, device, message):
    from coma.runtimes.find import open_model

    with pytest.raises(BadInput, match=message):
        open_model(exported / "export", "classifier", runtime, device)
    title = open_model(exported / "artifact", "classifier", "openvino", "cpu").title
    assert title.startswith("OpenVINO") and names.library_of("openvino") == "OpenVINO"


@pytest.mark.slow
@pytest.mark.openmmlab
@pytest.mark.parametrize("case", OF_ANY_SIZE, ids=lambda case: case.name)
def test_every_kind_gives_what_pytorch_gives(case, made):
    file, limit = made(case).file, {"fp32": 1e-5, "fp16": 0.02, "int8": 0.05}[case.precision]
    if case.precision == "int8":  # equal but for roundings
        agree(OnnxRuntime(file, threads=1), file, limit)
    else:
        agree(made(case).reference, file, limit)


@pytest.mark.slow
@pytest.mark.openmmlab
@pytest.mark.parametrize(
    "case",
    [FASTER, RETINANET, *(replace(case, plugin_free=True) for case in (FASTER, MASK))],
    ids=lambda case: case.name,
)
def test_detectors_give_what_onnx_runtime_gives(case, made):
    file = made(case).file
    runtime, reference = OpenVINORuntime(file, threads=1), OnnxRuntime(file, threads=1)
    for size in ((2, 3, 64, 64), (1, 3, 64, 96)):
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
        wanted, found = reference(images), runtime(images)
        assert torch.equal(found["labels"], wanted["labels"]) and (wanted["scores"] > 0).sum() > 3
        for each in set(wanted) - {"labels"}:
            torch.testing.assert_close(found[each], wanted[each], rtol=1e-4, atol=1e-3)
