"""Weights in a file beside the ONNX file, as for models above 2 GB; here the limit is lowered."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_files import VIT, classifier, export

from coma.cli import main
from coma.errors import BadInput
from coma.runtimes.manifest import NAME, Entry, Manifest
from coma.runtimes.onnx_file import WEIGHTS_FILE
from coma.runtimes.onnxruntime import _open
from coma.runtimes.open import open_runtime
from export import external_data
from export.onnx_export import load_onnx, save_onnx
from export.quantization import quantize_fp8, quantize_int8

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself


@pytest.fixture(autouse=True)
def low_limit(monkeypatch):
    monkeypatch.setattr(external_data, "_MOST_BYTES", 20_000)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An export of a classifier whose weights are in a file."""
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_data, "_MOST_BYTES", 20_000)
        assert export(classifier(run / "artifact", VIT)) == 0
    return run


@pytest.fixture
def run_folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def entries(run: Path) -> list[Entry]:
    manifest = Manifest.read(run / "export", "")
    assert manifest
    return [*manifest.files, *manifest.rejected]


def weights_in(run: Path) -> set[str]:
    return {path.name for path in (run / "export").iterdir() if path.name.endswith((".data", ".part"))}


def listed(run: Path) -> set[str]:
    return {name for entry in entries(run) for name in entry.weights}


def test_a_file_with_weights_beside_it_gives_the_outputs_of_one_that_holds_them(made, exported):
    (entry,) = entries(made)
    assert weights_in(made) == set(entry.weights) and len(entry.weights) == 1
    folder = made / "export"
    (weights,) = entry.weights
    assert WEIGHTS_FILE.fullmatch(weights) and weights.startswith("classifier.")
    assert weights.split(".")[1] == entry.weights[weights][:16]
    assert entry.bytes == sum((folder / name).stat().st_size for name in (entry.file, weights))
    assert len((folder / entry.file).read_bytes()) < (exported / "export" / entry.file).stat().st_size
    onnx.checker.check_model(str(folder / entry.file), full_check=True)
    images = torch.randn(1, 3, 48, 48)
    (folder.parent / "link.onnx").symlink_to(folder / entry.file)
    for path in (folder / entry.file, folder.parent / "link.onnx"):
        for device in ("cpu", "openvino"):
            ours, whole = (
                open_runtime(each, device)(images) for each in (path, exported / "export" / entry.file)
            )
            torch.testing.assert_close(ours["logits"], whole["logits"], rtol=0, atol=1e-6)
    (folder.parent / "link.onnx").unlink()


@pytest.mark.slow
def test_16_bits_pass_the_gate_with_both_runtimes(tmp_path, capsys):
    artifact = classifier(tmp_path / "artifact", VIT)
    assert export(artifact, "--precision", "fp32,fp16", "--device", "cpu,openvino") == 0
    assert all(len(each.weights) == 1 for each in entries(tmp_path))
    assert weights_in(tmp_path) == listed(tmp_path)  # without those of the emulation
    quick = ("--batch", "1", "--benchmark-seconds", "0.01", "--device", "cpu,openvino")
    assert main(["benchmark", str(artifact), *quick]) == 0
    assert capsys.readouterr().out.count("classifier-fp16.onnx") >= 2


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_fp8])
def test_8_bits_are_those_of_a_file_that_holds_its_weights(made, exported, tmp_path, quantize, monkeypatch):
    images = {"images": np.random.default_rng(0).normal(size=(1, 3, 48, 48)).astype(np.float32)}
    outputs = []
    for run in (exported, made):
        monkeypatch.setattr(external_data, "_MOST_BYTES", 8_000 if run is made else 10**9)
        copy = shutil.copytree(run / "export", tmp_path / run.name)
        quantize(copy / "classifier.onnx", copy / "classifier-8.onnx", [images])
        assert any(copy.glob("classifier-8.*.data")) == (run is made)
        session = _open(copy / "classifier-8.onnx", "8 bits", "cpu", None, fp8_products=True)
        outputs.append(session.run(None, images)[0])
    np.testing.assert_array_equal(*outputs)


def changes_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changes_a_byte, r"or its weights in classifier\.\w+\.data have \(by the SHA-256"),
        (Path.unlink, "or its weights in"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "or its weights in"),
    ],
)
def test_weights_that_changed_are_refused(run_folder, spoil, message, capsys):
    folder = run_folder / "export"
    spoil(folder / listed(run_folder).pop())
    with pytest.raises(BadInput, match=message):
        open_runtime(folder / "classifier.onnx")
    assert main(["info", str(folder)]) == 0
    assert "changed since" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/etc/passwd", "keeps weights in other files"),
        ("../artifact/model.safetensors", "keeps weights in other files"),
        ("./{name}", "keeps weights in other files"),
        ("", "keeps weights in other files"),
        ("report.md", "keeps weights in other files"),
        ("weights\n.0123456789abcdef.data", "keeps weights in other files"),
        ("link.0123456789abcdef.data", "is a link; copy both files together"),
        ("none.0123456789abcdef.data", "is missing; copy both files together"),
    ],
)
def test_hostile_locations_are_refused(run_folder, location, message):
    folder = run_folder / "export"
    name = listed(run_folder).pop()
    (folder / "link.0123456789abcdef.data").symlink_to(folder / name)
    (folder / NAME).unlink()
    location = location.format(name=name)
    for everywhere in (True, False):
        model = load_onnx(folder / "classifier.onnx")
        for tensor in model.graph.initializer if everywhere else model.graph.initializer[:]:
            for each in tensor.external_data:
                if each.key == "location":
                    each.value = location
        if not everywhere:  # in an attribute alone
            model = load_onnx(folder / "classifier.onnx")
            tensor = model.graph.node.add(op_type="Constant", output=["hostile"]).attribute.add(
                name="value", type=onnx.AttributeProto.TENSOR
            ).t  # fmt: skip
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.float32)))
            tensor.ClearField("raw_data")
            tensor.data_location = tensor.EXTERNAL
            for key, value in (("location", location), ("offset", "0"), ("length", "4")):
                tensor.external_data.add(key=key, value=value)
            message = "keeps weights in other files"  # two of them
        save_onnx(model, folder / "hostile.onnx")
        for device in ("cpu", "openvino"):
            with pytest.raises(BadInput, match=message):
                open_runtime(folder / "hostile.onnx", device)


@pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("offset", "99999999"), ("length", "1e3")])
def test_places_outside_the_weights_are_refused(run_folder, key, value):
    folder = run_folder / "export"
    (folder / NAME).unlink()
    model = load_onnx(folder / "classifier.onnx")
    tensor = next(each for each in model.graph.initializer if each.external_data)
    next(each for each in tensor.external_data if each.key == key).value = value
    save_onnx(model, folder / "classifier.onnx")
    with pytest.raises(BadInput, match="is too short; export it again"):
        open_runtime(folder / "classifier.onnx")


def test_weights_come_and_go_with_their_file(run_folder, monkeypatch):
    """Over an export of the same, a rejected one, one that fits into its file, and a killed one."""
    artifact, before = run_folder / "artifact", weights_in(run_folder)
    assert export(artifact) == 0
    assert weights_in(run_folder) == listed(run_folder) == before
    (run_folder / "export" / ".classifier-fp16.0123456789abcdef.data.part").touch()
    (run_folder / "export" / "classifier.fedcba9876543210.data").touch()
    write = external_data._write_weights

    def wrong(tensors, path):
        values = np.frombuffer(tensors[0].raw_data, np.float32) * 1.5
        tensors[0].raw_data = values.tobytes()
        write(tensors, path)

    monkeypatch.setattr(external_data, "_write_weights", wrong)
    assert export(artifact) == 1
    assert len(weights_in(run_folder)) == 2 and weights_in(run_folder) == listed(run_folder)
    open_runtime(run_folder / "export" / "classifier.onnx")  # the former one
    monkeypatch.setattr(external_data, "_MOST_BYTES", 10**9)
    assert export(artifact) == 0
    assert weights_in(run_folder) == listed(run_folder) == set()
    open_runtime(run_folder / "export" / "classifier.onnx")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_no_weights(run_folder, monkeypatch, error):
    from export.gate import Gate

    before = (run_folder / "export" / "classifier.onnx").read_bytes()
    known = weights_in(run_folder)

    def interrupted(*_args, **_more):
        assert len(weights_in(run_folder)) == 2
        raise error

    monkeypatch.setattr(external_data, "_LEAST_BYTES", 2000)  # other tensors, another file
    monkeypatch.setattr(Gate, "verify_onnx", interrupted)
    assert export(run_folder / "artifact") in (1, 130)
    assert weights_in(run_folder) == listed(run_folder) == known
    assert (run_folder / "export" / "classifier.onnx").read_bytes() == before
    open_runtime(run_folder / "export" / "classifier.onnx")
