"""What each precision needs of ONNX Runtime, 16 bits emulated on a CPU, and what is not opened at all."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import export_files
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from torch import Tensor

from coma.cli import main
from coma.config import ViTConfig
from coma.errors import BadInput, CheckFailed
from coma.runtimes.model_spec import Precision, eight_bit_part, float_part
from coma.runtimes.onnxruntime import _PROVIDERS as PROVIDERS
from coma.runtimes.onnxruntime import OnnxRuntime
from coma.runtimes.open import open_runtime
from coma.runtimes.shape_ranges import parse_shapes
from export import candidates
from export.candidates import UNVERIFIED
from export.config import file_name
from export.gate import REJECTED
from export.graphs.load import load_exportable
from export.half_precision_emulation import Half, emulate
from export.verify.opened_file import OpenedFile, open_file
from export.verify.tolerances import TOLERANCES

onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself

LAYER, NEXT = "stages.2.blocks.0.mlp.fc1", "stages.2.blocks.0.mlp.fc2"
TYPES: dict[Half, tuple[int, torch.dtype]] = {
    "fp16": (TensorProto.FLOAT16, torch.float16),
    "bf16": (TensorProto.BFLOAT16, torch.bfloat16),
}
FP32 = TensorProto.FLOAT


def node(kind: str, inputs: str, output: str, **attributes) -> NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def graph(nodes: list[NodeProto], shape: tuple[int, ...], **weights: Tensor) -> ModelProto:
    """From `x` to `y`, both float32 and of one shape; weights in their own types."""
    values = [helper.make_tensor_value_info(name, FP32, shape) for name in "xy"]
    kinds = {each: code for code, each in TYPES.values()} | {torch.float32: FP32}
    stored = [
        helper.make_tensor(name, kinds[each.dtype], each.shape, each.float().flatten().tolist())
        for name, each in weights.items()
    ]
    main = helper.make_graph(nodes, "main", values[:1], values[1:], stored)
    return helper.make_model(main, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def outcome(model: ModelProto, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def test_a_precision_says_what_is_quantised_and_what_the_rest_is():
    parts = {each: (eight_bit_part(each), float_part(each)) for each in get_args(Precision)}
    assert parts["int8+fp16"] == ("int8", "fp16") and parts["fp8+fp16"] == ("fp8", "fp16")
    assert parts["int8"] == ("int8", "fp32") and parts["fp8"] == ("fp8", "fp32")
    assert all(parts[each] == (None, each) for each in ("fp32", "fp16", "bf16"))
    assert set(TOLERANCES) == set(parts)
    assert len({file_name("encoder", each) for each in parts}) == len(parts)


@pytest.mark.slow
def test_eight_bits_around_fp16_pass_the_gate_which_emulates_them(tmp_path, photographs):
    model = ViTConfig(patch=16, dim=64, depth=2, heads=2)
    artifact, folder = export_files.classifier(tmp_path / "artifact", model), tmp_path / "export"
    images = ("--verify", str(photographs), "--calibrate", str(photographs))
    images += ("--verify-images", "2", "--calibrate-images", "2", "--benchmark-seconds", "0")
    flags = ("--shapes", "1x96x96", "--precision", "fp8+fp16,int8+fp16", *images)
    assert main(["export", str(artifact), *flags]) == 0
    kept = json.loads((folder / "manifest.json").read_text())["files"]
    entries = {each["precision"]: each for each in kept}
    files = {"classifier-fp8-fp16.onnx", "classifier-int8-fp16.onnx"}
    assert {each["file"] for each in entries.values()} == files
    left = {each.name for each in folder.iterdir()} - {"manifest.json", "report.md", "report.png"}
    assert left == files  # the fp16 file that they were made of is removed
    for precision, products, attention in (("int8", 12 - 4, 4), ("fp8", 12, 0)):
        found = entries[f"{precision}+fp16"]
        assert found["runtime"].endswith(", cpu, fp16 emulated")
        operators = found["numbers"]["operators"]
        name = {"fp8": "float8e4m3fn"}.get(precision, precision)
        assert operators[name]["MatMul"] == products and operators["float16"].get("MatMul", 0) == attention
        assert operators["float16"]["Softmax"] == 2 and "Softmax" not in operators["float"]
        pixels = torch.randn(1, 3, 96, 96)
        there = open_runtime(folder / found["file"])(pixels)["logits"]  # as it is
        wanted = open_runtime(artifact)(pixels)["logits"]
        assert 0 < (there - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("kind", ["Mul", "MatMul"])
def test_fp16_overflows_as_in_torch_and_not_as_on_a_cpu(kind):
    weight, back = (scale * torch.eye(4).half() for scale in (300, 1 / 300))
    if kind == "Mul":
        weight, back = weight.diagonal(), back.diagonal()
    nodes = [
        node("Cast", "x", "short", to=TensorProto.FLOAT16),
        node(kind, "short weight", "large"),
        node(kind, "large back", "small"),
        node("Cast", "small", "y", to=FP32),
    ]
    model = graph(nodes, (2, 4), weight=weight, back=back)
    x = torch.tensor([[1.0, 2, 3, 4], [1, 200, 230, -1000]])
    times = torch.mul if kind == "Mul" else torch.matmul
    wanted = times(times(x.half(), weight), back).float()
    assert not wanted[1].isfinite().all()
    torch.testing.assert_close(outcome(emulate(model, "fp16"), x), wanted, equal_nan=True)
    assert outcome(model, x).isfinite().all()  # else there is nothing to emulate any more


@pytest.mark.parametrize("precision", TYPES)
def test_results_are_rounded_as_torch_rounds_them(precision):
    kind, dtype = TYPES[precision]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=generator) for _ in range(2))
    weight, scale, shift = weight.to(dtype), torch.ones(64, dtype=dtype), torch.zeros(64, dtype=dtype)
    nodes = [
        node("Cast", "x", "short", to=kind),
        node("MatMul", "short weight", "product"),
        node("LayerNormalization", "product scale shift", "normal", epsilon=1e-6),
        node("Softmax", "normal", "share"),
        node("Cast", "share", "y", to=FP32),
    ]
    model = graph(nodes, (64, 64), weight=weight, scale=scale, shift=shift)
    normal = torch.layer_norm(x.to(dtype) @ weight, (64,), scale, shift, 1e-6)
    wanted = normal.softmax(-1).float()
    found = outcome(emulate(model, precision), x)
    assert (found == wanted).double().mean() > 0.97  # but for orders of sums
    assert torch.equal(found, found.to(dtype).float())


def test_what_a_file_computes_in_fp32_does_not_overflow():
    scale, shift = torch.ones(4), torch.zeros(4)
    nodes = [
        node("Cast", "x", "short", to=TensorProto.FLOAT16),
        node("LayerNormalization", "short scale16 shift16", "normal16"),  # its own sums are fp32 anyway
        node("Cast", "normal16", "normal", to=FP32),
        node("Cast", "short", "wide", to=FP32),
        node("Mul", "wide wide", "squares"),
        node("LayerNormalization", "squares scale shift", "normal_squares"),
        node("Add", "normal normal_squares", "y"),
    ]
    weights = {"scale": scale, "shift": shift, "scale16": scale.half(), "shift16": shift.half()}
    x = torch.tensor([[1e4, -2e4, 3e4, 5.0]])
    assert x.half().square().isinf().any()
    wanted = torch.layer_norm(x, (4,)) + torch.layer_norm(x * x, (4,))
    found = outcome(emulate(graph(nodes, (1, 4), **weights), "fp16"), x)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number, pixels in enumerate((data.chelsea(), data.coffee())):
        Image.fromarray(pixels[:96, :96]).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def made(once, photographs) -> Path:
    """Exports of a classifier in which one layer gives more than fp16 holds, and the next takes it back.

    In bf16 that layer is wrong; in fp8 so small a model loses too much.
    """
    return once("precisions", lambda folder: fill(folder, photographs)) / "export"


def fill(folder: Path, photographs: Path) -> None:
    artifact = export_files.classifier(folder / "artifact")
    weights = load_file(artifact / "model.safetensors")
    for name, scale in ((f"{LAYER}.weight", 3e4), (f"{LAYER}.bias", 3e4), (f"{NEXT}.weight", 1 / 3e4)):
        weights[name] *= scale
    save_file(weights, artifact / "model.safetensors")
    spec = json.loads((artifact / "config.json").read_text())
    del spec["checksums"]  # the weights are changed on purpose
    (artifact / "config.json").write_text(json.dumps(spec))
    with torch.no_grad():
        model, images = load_exportable(artifact, "classifier").module, torch.randn(1, 3, 48, 48)
        assert model(images)[0].isfinite().all() and not model.half()(images)[0].isfinite().all()

    written = candidates.write_onnx

    def corrupt(exportable, shapes, path, *rest):
        if exportable.spec.precision == "bf16":
            exportable.module.get_submodule(f"classifier.{LAYER}").weight.data.mul_(-2)
        return written(exportable, shapes, path, *rest)

    images = ("--verify", str(photographs), "--calibrate", str(photographs))
    images += ("--verify-images", "2", "--calibrate-images", "2")
    settings = ("--shapes", "1x48x48", "--benchmark-seconds", "0", "--precision", "fp32,fp16,bf16,fp8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "write_onnx", corrupt)
        assert main(["export", str(artifact), *settings, *images]) == 1


def refused(folder: Path) -> dict[str, dict]:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [each["precision"] for each in manifest["files"]] == ["fp32"]
    return {each["precision"]: each for each in manifest["rejected"]}


def copied(folder: Path, precision: str, target: Path) -> Path:
    """A refused file under a name of its own."""
    name = f"classifier-{precision}.onnx"
    return Path(shutil.copy(folder / f"{name}{REJECTED}", target / name))


def test_what_overflows_in_fp16_is_refused_on_a_cpu(made):
    found = refused(made)["fp16"]
    assert found["verification"]["failures"] == ["logits holds NaN or infinite values (at 1 x 48 x 48)"]
    assert found["runtime"].endswith(", cpu, fp16 emulated")


def test_the_layer_is_named_in_every_precision(made):
    for precision in ("fp16", "bf16"):
        assert f"the error starts in classifier.{LAYER} (" in refused(made)[precision]["error"]
    assert "the error starts in classifier." in refused(made)["fp8"]["error"]


def test_fp16_is_compared_emulated_and_timed_as_it_is(made, tmp_path):
    def opened(precision: Precision) -> OpenedFile:
        file = copied(made, precision, tmp_path)
        return open_file(file, onnx.load(file), "classifier", precision)

    images = torch.randn(1, 3, 48, 48)
    fp16 = opened("fp16")
    assert fp16.timed and fp16.timed(images)["logits"].isfinite().all() and "emulated" not in fp16.timed.title
    assert not fp16.runtime(images)["logits"].isfinite().all() and "fp16 emulated" in fp16.runtime.title
    bf16 = opened("bf16")
    assert bf16.timed is None and "bf16 emulated" in bf16.runtime.title
    fp8 = opened("fp8")
    assert fp8.timed is fp8.runtime and "emulated" not in fp8.runtime.title


def test_files_run_as_their_precision_needs_or_say_what_they_need(made, tmp_path):
    images = torch.randn(1, 3, 48, 48)
    wanted = open_runtime(made.parent / "artifact")(images)["logits"]
    found = open_runtime(copied(made, "fp8", tmp_path))(images)["logits"]
    assert torch.cosine_similarity(found, wanted).item() > 0.8
    with pytest.raises(BadInput, match=r"classifier-bf16\.onnx: .* no bf16 on a CPU; use a GPU"):
        open_runtime(copied(made, "bf16", tmp_path))


def test_a_file_that_changed_since_it_was_verified_is_not_opened(made, tmp_path):
    file = Path(shutil.copy(made / "classifier.onnx", tmp_path))
    manifest = Path(shutil.copy(made / "manifest.json", tmp_path))
    content = bytearray(file.read_bytes())
    weights = onnx.load(file).graph.initializer
    place = content.index(max((each.raw_data for each in weights), key=len))
    content[place + 3] ^= 0x40  # an exponent
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"classifier\.onnx: has changed since its verification.*again"):
        open_runtime(file)
    OnnxRuntime(file)  # nothing else would have noticed
    file.write_bytes((made / file.name).read_bytes())
    open_runtime(file)
    manifest.write_text('{"files": [')
    with pytest.raises(BadInput, match=r"manifest\.json: not readable"):
        open_runtime(file)
    for of_others in ('{"name": "a page"}', "[]", '{"files": ["x", {"file": "other.onnx", "sha256": ""}]}'):
        manifest.write_text(of_others)
        open_runtime(file)


def test_what_waits_for_its_gate_or_failed_is_not_opened(made, tmp_path):
    waiting = shutil.copy(made / "classifier.onnx", tmp_path / f"classifier{UNVERIFIED}.onnx")
    with pytest.raises(BadInput, match="was not verified"):
        open_runtime(waiting)
    OnnxRuntime(waiting)  # as the gate itself does
    for name in (f"classifier-fp16.onnx{REJECTED}", f"classifier-fp16{REJECTED}.onnx"):
        with pytest.raises(BadInput, match="failed verification"):
            open_runtime(made / name)


def test_devices_that_are_not_there(made):
    for path in (made.parent / "artifact", made / "classifier.onnx"):
        with pytest.raises(BadInput, match="device 'gpu': give one of cpu, cuda, tensorrt"):
            open_runtime(path, "gpu")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="cuda: PyTorch finds no GPU"):
            open_runtime(made.parent / "artifact", "cuda")
        with pytest.raises(BadInput, match="cuda: "):
            open_runtime(made / "classifier.onnx", "cuda")


class Fake:
    """ONNX Runtime with every provider, whose sessions use one."""

    __version__ = "1"
    SessionOptions = onnxruntime.SessionOptions

    def __init__(self, used: str) -> None:
        self.used = used
        self.asked: list[Any] = []

    def get_available_providers(self) -> list[str]:
        return list(PROVIDERS.values())

    def InferenceSession(self, *_, providers) -> SimpleNamespace:
        if self.used == "none":
            raise RuntimeError("no kernel\nat some line")
        self.asked += providers
        return SimpleNamespace(get_providers=lambda: [self.used])


@pytest.fixture
def fake(monkeypatch) -> Fake:
    found = Fake(PROVIDERS["cuda"])
    monkeypatch.setattr("coma.runtimes.onnxruntime._library", lambda: found)
    monkeypatch.setattr("coma.runtimes.onnxruntime.load_library", lambda flavour: found.asked.append(flavour))
    return found


ON_CUDA = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "device_id": "0"}


def test_fp32_is_not_multiplied_with_fewer_bits_on_a_gpu(made, fake):
    OnnxRuntime(made / "classifier.onnx", "cuda")
    assert fake.asked == [(PROVIDERS["cuda"], ON_CUDA)]


def test_tensorrts_libraries_are_loaded_before_its_provider(made, fake, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake.used = PROVIDERS["tensorrt"]
    OnnxRuntime((made / "classifier.onnx").read_bytes(), "tensorrt")
    asked = [(PROVIDERS["tensorrt"], {"device_id": "0"}), (PROVIDERS["cuda"], ON_CUDA)]
    assert fake.asked == ["tensorrt", *asked]
    assert not list(tmp_path.iterdir())
    fake.used = PROVIDERS["cuda"]
    with pytest.raises(BadInput, match=r"fell back to CUDA.*the libraries of TensorRT 10 were not found"):
        OnnxRuntime(made / "classifier.onnx", "tensorrt")


def test_tensorrts_provider_is_told_the_shapes_in_the_manifest(run_folder, fake, monkeypatch):
    fake.used, asked = PROVIDERS["tensorrt"], []
    options = "coma.runtimes.onnxruntime.provider_options"
    monkeypatch.setattr(options, lambda path, spec, shapes: asked.append((path, shapes)) or {"some": "1"})
    file, record = run_folder / "export" / "classifier.onnx", run_folder / "export" / "manifest.json"
    for listed, read in (
        (["1 x 48 x 48", "2 x 48 x 48", "4 x 64 x 80"], "1x48x48:2x48x48:4x64x80"),
        (["1 x 48 x 48", "1 x 48 x 48", "4 x 64 x 80"], "1x48x48:1x48x48:4x64x80"),
        (["1 x 48 x 48", "4 x 64 x 80"], "1x48x48:1x48x48:4x64x80"),
        (["2 x 48 x 48"], "2x48x48"),
    ):
        manifest = json.loads(record.read_text())
        manifest["files"][0]["shapes"] = listed
        record.write_text(json.dumps(manifest))
        open_runtime(file, "tensorrt")
        assert asked.pop() == (file, parse_shapes(read, 3))
        assert (PROVIDERS["tensorrt"], {"some": "1", "device_id": "0"}) in fake.asked
    for listed in ([], ["1 x 48"], ["4 x 48 x 48", "1 x 48 x 48"]):
        manifest["files"][0]["shapes"] = listed
        record.write_text(json.dumps(manifest))
        with pytest.raises(BadInput, match=r"manifest\.json: shapes of classifier\.onnx: .*export it again"):
            open_runtime(file, "tensorrt")


def test_without_tensorrts_package_its_libraries_may_be_elsewhere(made, fake, monkeypatch):
    def missing(_) -> None:
        raise BadInput("TensorRT is not installed")

    fake.used = PROVIDERS["tensorrt"]
    monkeypatch.setattr("coma.runtimes.onnxruntime.load_library", missing)
    OnnxRuntime(made / "classifier.onnx", "tensorrt")


def test_a_file_that_does_not_load_is_no_mistake_of_the_users(made, fake):
    fake.used = "none"
    with pytest.raises(CheckFailed, match=r"classifier\.onnx: ONNX Runtime cannot load it: no kernel$"):
        OnnxRuntime(made / "classifier.onnx", "cuda")


def test_failures_on_a_gpu_are_told_as_those_on_a_cpu_are(made, monkeypatch):
    def fail(*_) -> None:
        raise RuntimeError("out of memory\nat some line")

    runtime = OnnxRuntime(made / "classifier.onnx")
    binding = SimpleNamespace(bind_input=lambda *_: None, bind_output=lambda *_: None)
    session = SimpleNamespace(run=fail, run_with_iobinding=fail, io_binding=lambda: binding)
    monkeypatch.setattr(runtime, "_session", session)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    images = torch.zeros(1, 3, 48, 48)
    for run in (runtime, lambda images: runtime._run_bound({"images": images})):
        with pytest.raises(BadInput, match=r"could not run images \[1, 3, 48, 48\]: out of memory$"):
            run(images)
