"""What a command needs is checked before its first long step: packages, places, ports, devices, space."""

import shutil
import socket
import sys
from pathlib import Path

import pytest

from coma import cli
from coma.config import PretrainConfig
from coma.errors import BadInput
from coma.preflight import require_file, require_folder, require_space
from pretrain.training.run_plan import check_space

NEEDS = [
    ("demo", "gradio", "[demo]"),
    ("demo", "skimage", "[demo]"),
    ("export MISSING", "onnx", "[export]"),
    ("export MISSING", "onnxscript", "[export]"),
    ("export MISSING", "onnxruntime", "[export,onnxruntime]"),
    ("export MISSING --device cpu,openvino", "openvino", "[export,openvino]"),
    ("benchmark MISSING --device openvino-gpu", "openvino", "[export,openvino]"),
    ("embed MISSING MISSING --out f.parquet", "pyarrow", "[search]"),
    ("embed MISSING MISSING --out f.npz --ray auto", "ray", "[search,ray]"),
    ("search MISSING.parquet --outliers", "faiss", "[search]"),
    ("search MISSING.parquet --map --out out", "sklearn", "[search]"),
    *((f"detect {what}", "mmdet", "[downstream]") for what in ("train", "test", "predict")),
    *((f"segment {what}", "mmseg", "[downstream]") for what in ("train", "test", "predict")),
    ("detect train", "mmcv", "[downstream,mmcv-lite]"),
    ("segment train", "mmengine", "[downstream]"),
    ("pretrain MISSING", "tensorboard", ""),
    ("quickstart", "skimage", ""),
    ("compare MISSING --test MISSING --budget images 9", "matplotlib", ""),
    ("classify train MISSING --data MISSING --out run", "matplotlib", "[classify]"),
]


@pytest.mark.parametrize(("command", "package", "extra"), NEEDS)
def test_a_missing_package_is_told_at_once(command, package, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    name = command.split()[0]
    assert cli.main(command.split()) == 2
    shown = capsys.readouterr()
    wanted = f"'coma-dyvit{extra}'" if extra else "coma-dyvit"
    assert shown.err == f"error: coma {name} needs {package}; install it with: pip install {wanted}\n"
    assert shown.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["demo", "export", "detect train", "segment train"])
def test_help_needs_no_extra(command, monkeypatch, capsys):
    for package in ("gradio", "onnx", "onnxruntime", "mmengine", "mmcv", "mmdet", "mmseg"):
        monkeypatch.setitem(sys.modules, package, None)
    assert cli.main([*command.split(), "--help"]) == 0


def test_the_demo_looks_at_its_port_and_device_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["demo", "--port", str(port)]) == 2
    assert f"--port {port}: " in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["demo", "--port", "0", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: --device cuda: PyTorch finds no GPU\n"
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_to_are_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("gone")
    for place, message in [
        (tmp_path / "file", "file: is a file; give a folder"),
        (tmp_path / "file" / "more" / "run", "file is a file; give a folder"),
        (tmp_path / "nowhere", "is a link that leads nowhere"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/proc/nowhere/run"), "cannot be written to"),
    ]:
        with pytest.raises(BadInput, match=message):
            require_folder(place)
    with pytest.raises(BadInput, match="is a directory; give a file name"):
        require_file(tmp_path)
    require_folder(tmp_path / "new" / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]
    require_file(tmp_path / "new" / "scores.json")


def test_a_disk_without_room_for_a_run_is_told_before_it_starts(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path / "new", free // 2, "half of it")
    with pytest.raises(BadInput, match=r"all of it needs .* MB of disk, and .* MB are free; make room"):
        require_space(tmp_path / "new", free * 2, "all of it")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 10**6))
    with pytest.raises(BadInput, match=r"a run of 1,000,000 weights needs [\d.]+ MB of disk, and 1\.0 MB"):
        check_space(PretrainConfig(), 1_000_000)
