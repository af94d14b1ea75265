"""`coma info`: artifacts, runs, exports, images and files, whole and damaged: one line where it refuses."""

import json
import shutil
import struct

import numpy as np
import pytest
from dataset_files import save
from export_files import backbone, pretrained
from feature_files import features

from coma import cli
from coma.config import PretrainConfig, encoder_preset, method_preset
from coma.config.serialization import to_plain


def told(capsys, path) -> str:
    assert cli.main(["info", str(path)]) == 0
    return capsys.readouterr().out


def refused(capsys, path) -> str:
    code, (out, err) = cli.main(["info", str(path)]), capsys.readouterr()
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err and "fault of coma" not in err
    return err


def test_artifacts(tmp_path, capsys):
    text = told(capsys, pretrained(tmp_path / "a"))
    assert "artifact of kind pretrained" in text and "checksums  match" in text
    assert "torch 2." in text and f"coma export {tmp_path / 'a'} --out" in text
    assert told(capsys, tmp_path / "a" / "model.safetensors").splitlines()[1:] == text.splitlines()[1:]
    assert "kind backbone" in told(capsys, backbone(tmp_path / "b"))


def test_a_changed_artifact_is_refused(tmp_path, capsys):
    config = backbone(tmp_path / "a") / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"image_size": 64}))
    assert "checksum does not match" in refused(capsys, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    assert "without its model.safetensors" in refused(capsys, tmp_path / "a")


def test_runs(tmp_path, capsys):
    run = tmp_path / "my run"
    run.mkdir()
    config = PretrainConfig(model=encoder_preset("tiny", 32), objective=method_preset("cmt"))
    (run / "config.json").write_text(json.dumps(to_plain(config)))
    assert "artifact  not written yet" in told(capsys, run)
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5}\n{"step": 8, "lo')
    backbone(run / "artifact")
    text = told(capsys, run)
    assert "run directory of `coma pretrain`" in text and "cmt" in text and "7 steps, loss 0.5000" in text
    assert f"coma pretrain --resume '{run}'" in text


def test_images(tmp_path, capsys):
    save(tmp_path / "1.jpg")
    save(tmp_path / "2.jpg")
    text = told(capsys, tmp_path)
    assert "2 images" in text and f"coma pretrain {tmp_path} --out RUN" in text
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        save(tmp_path / "pets" / name / f"{number}.jpg")
    assert "classes  2: cat, dog" in told(capsys, tmp_path / "pets")


def test_exports(tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ports[:1], ports[1:]))
    onnx.save(model, tmp_path / "theirs.onnx")
    assert "not written by `coma export`" in told(capsys, tmp_path / "theirs.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 99)
    refused(capsys, tmp_path / "bad.onnx")


def test_weights(tmp_path, capsys):
    shutil.copy(backbone(tmp_path / "a") / "model.safetensors", tmp_path / "weights.safetensors")
    assert "weights without the model" in told(capsys, tmp_path / "weights.safetensors")
    (tmp_path / "weights.pth").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    assert "never runs; convert it to .safetensors, or let" in refused(capsys, tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "compare.json"])
@pytest.mark.parametrize("text", ["", "{", "[" * 9999, "[]", "{}", "7", '{"format_version": []}', "\0\xff"])
def test_hostile_json_gives_one_line(tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text, encoding="latin-1")
    for path in (tmp_path, tmp_path / name):
        if name != "compare.json":
            refused(capsys, path)
    if name == "config.json":
        (tmp_path / "model.safetensors").write_bytes(b"")
        refused(capsys, tmp_path)


@pytest.mark.parametrize(
    "name", ["x.safetensors", "x.engine", "x.npz", "x.tar", "x.onnx", "x.jpg", "x", "x\n.bin"]
)
@pytest.mark.parametrize(
    "data", [b"", b"\0" * 64, struct.pack("<Q", 2**62) + b"{}", b"PK\3\4" + b"\xff" * 40]
)
def test_hostile_files_give_one_line(tmp_path, capsys, name, data):
    (tmp_path / name).write_bytes(data)
    code, (_, err) = cli.main(["info", str(tmp_path / name)]), capsys.readouterr()
    assert "Traceback" not in err and "fault of coma" not in err
    assert code in (0, 2) and (code == 0 or err.startswith("error: "))
    (tmp_path / name).unlink()
    refused(capsys, tmp_path / "gone")


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_features(tmp_path, capsys, suffix):
    path = features(tmp_path / f"f{suffix}", np.ones((3, 4), np.float32))
    text = told(capsys, path)
    assert "features of `coma embed`" in text and "3 features of 4 float32 values" in text
    assert f"coma search {path} --duplicates" in text


def test_damaged_features_are_refused(tmp_path, capsys):
    path = features(tmp_path / "f.npz", np.ones((3, 4), np.float32))
    with np.load(path) as pack:
        np.savez(path, path=pack["path"], feature=pack["feature"][:, :2], metadata=pack["metadata"])
    assert "features of shape [2], described as [4]" in refused(capsys, path)


def test_a_head_on_frozen_features(tmp_path, capsys):
    settings = {"artifact": "a", "optimizer": {"epochs": 100.0, "steps": None, "frozen": True}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    text = told(capsys, tmp_path)
    assert "coma classify train" in text and "epochs" not in text and "no steps" in text
