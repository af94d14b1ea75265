"""Faults from outside: full disks, refused graphs, two exports at once, hostile files, signals."""

import errno
import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import export_files
import onnx
import pytest
import torch
from export_files import VIT, export

from coma import atomic_io
from coma.cli import main
from coma.errors import BadInput, CheckFailed
from coma.runtimes.manifest import NAME, STAGED, Manifest
from coma.runtimes.open import open_runtime
from export import candidates, onnx_export
from export.output import exclusive
from export.pipeline import require
from export.tensorrt import rtx

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["classifier-fp16.unverified.onnx", STAGED, "report.md"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(run_folder, monkeypatch, capsys, name):
    folder, opened = run_folder / "export", {}
    before = content(folder)

    def opens(path, *rest):
        number = os_open(path, *rest)
        opened[number] = Path(path).name
        return number

    def writes(number, data):
        if opened.get(number) == f".{name}.part":
            raise OSError(errno.ENOSPC, "No space left on device")
        return os_write(number, data)

    os_open, os_write = os.open, os.write
    monkeypatch.setattr(atomic_io.os, "open", opens)
    monkeypatch.setattr(atomic_io.os, "write", writes)
    assert export(run_folder / "artifact", "--precision", "fp16") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"error: {folder / name}: No space left on device; free some space there, or give another"
    )
    after = content(folder)
    if name == "report.md":  # written last: the file was already kept
        assert after.keys() - before.keys() == {"classifier-fp16.onnx"}
    else:
        assert {**after, "report.md": b""} == {**before, "report.md": b""}
    monkeypatch.undo()
    open_runtime(folder / "classifier.onnx")


@pytest.mark.parametrize("fault", ["checker", "tracer"])
def test_a_graph_that_cannot_be_made_is_refused_and_the_others_are_made(tmp_path, monkeypatch, capsys, fault):
    artifact = export_files.classifier(tmp_path / "artifact", VIT)

    def refuses(model, **_):
        if any(each.data_type == onnx.TensorProto.FLOAT16 for each in model.graph.initializer):
            raise onnx.checker.ValidationError("Nodes in a graph must be topologically sorted\nand more")

    def breaks(module, *rest, **options):
        if next(module.parameters()).dtype == torch.float16:
            try:
                raise TypeError("cannot multiply these")
            except TypeError as cause:
                raise torch.onnx.OnnxExporterError("Failed\nNext steps: read a long page") from cause
        return exports(module, *rest, **options)

    exports = torch.onnx.export
    if fault == "checker":
        monkeypatch.setattr(onnx.checker, "check_model", refuses)
    else:
        monkeypatch.setattr(torch.onnx, "export", breaks)
    wanted = {
        "checker": (
            "classifier-fp16.onnx: the graph is not valid ONNX: Nodes in a graph must be",
            "classifier.onnx",
        ),
        "tracer": (
            "classifier-fp16.onnx: the graph cannot be traced: cannot multiply these",
            "classifier.onnx",
        ),
    }
    message, kept = wanted[fault]
    assert export(artifact, "--precision", "fp32,fp16") == 1
    error = capsys.readouterr().err
    assert f"error: refused: {message}" in error
    manifest = Manifest.read(tmp_path / "export", "")
    assert manifest and [each.file for each in manifest.files] == [kept]
    assert len(manifest.rejected) == 1
    assert {path.name for path in (tmp_path / "export").iterdir()} == {kept, NAME, "report.md", "report.png"}


def test_a_folder_takes_one_export_at_a_time(run_folder, capsys):
    with exclusive(run_folder / "export"):
        assert export(run_folder / "artifact") == 2
    assert "another coma export writes to this folder; wait until it has ended" in capsys.readouterr().err


def test_a_killed_export_leaves_no_lock_and_its_unfinished_files_are_removed(run_folder, caplog):
    folder = run_folder / "export"
    code = "import sys, time; from pathlib import Path; from export.output import exclusive\n"
    code += "with exclusive(Path(sys.argv[1])): print('locked', flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"locked\n"
        with pytest.raises(BadInput, match="another coma export"), exclusive(folder):
            pass
        other.kill()
    left = (
        "classifier-int8.unverified.onnx",
        "encoder.onnx.base",
        STAGED,
        f".{STAGED}.part",
        ".report.md.part",
    )
    for name in (*left, "mine.unverified.onnx", "notes.part"):
        (folder / name).touch()
    assert export(run_folder / "artifact", "--precision", "fp16") == 0
    names = {path.name for path in folder.iterdir()}
    assert not names & set(left) and {"mine.unverified.onnx", "notes.part"} <= names
    assert "removed 5 unfinished files of an export that was killed" in caplog.text
    manifest = Manifest.read(folder, "")
    assert manifest and [each.file for each in manifest.files] == ["classifier.onnx", "classifier-fp16.onnx"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with exclusive(tmp_path):
        assert "cannot be locked (No locks available); run only one export there at a time" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["traced", "renamed"])
def test_a_signal_leaves_nothing_unfinished(run_folder, monkeypatch, capsys, number, when):
    folder = run_folder / "export"
    before, handler = content(folder), signal.getsignal(signal.SIGTERM)

    def written(*arguments):
        found = write_onnx(*arguments)
        os.kill(os.getpid(), number)
        time.sleep(5)
        return found

    def replaces(path, target):
        found = replace(path, target)
        if Path(target).name == "classifier-fp16.onnx":
            os.kill(os.getpid(), number)  # between the file and the manifest
        return found

    write_onnx, replace = candidates.write_onnx, Path.replace
    if when == "traced":
        monkeypatch.setattr(candidates, "write_onnx", written)
    else:
        monkeypatch.setattr(Path, "replace", replaces)
    assert export(run_folder / "artifact", "--precision", "fp16") == 130
    assert ("stopped by SIGTERM" if number == signal.SIGTERM else "interrupted") in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == handler
    if when == "traced":
        assert {**content(folder), "report.md": b""} == {**before, "report.md": b""}
    else:
        assert content(folder).keys() == before.keys() | {"classifier-fp16.onnx"}
        open_runtime(folder / "classifier-fp16.onnx")  # the manifest has it


def test_an_artifact_that_changes_during_the_export_ends_it(run_folder, monkeypatch, capsys):
    def changes(exportable, shapes, path, *rest):
        found = write_onnx(exportable, shapes, path, *rest)
        config = json.loads((run_folder / "artifact" / "config.json").read_text())
        config["mean"][0] += 0.1
        config.pop("checksums", None)
        (run_folder / "artifact" / "config.json").write_text(json.dumps(config))
        return found

    write_onnx = candidates.write_onnx
    monkeypatch.setattr(candidates, "write_onnx", changes)
    out = run_folder / "out"
    assert export(run_folder / "artifact", "--precision", "fp32,fp16", "--out", str(out)) == 2
    assert "has changed during the export; export it again" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"classifier.onnx", NAME, "report.md", "report.png"}


@pytest.mark.parametrize(
    ("package", "error", "message"),
    [
        (
            "onnx",
            ModuleNotFoundError("No module", name="onnx"),
            r"onnx is not installed; pip install 'coma-dyvit",
        ),
        ("onnxscript", ImportError("cannot import x"), r"onnxscript does not load \(cannot import x\); pip"),
        ("onnxruntime", ModuleNotFoundError("No module", name="onnxruntime"), "pip install onnxruntime-gpu"),
        ("onnx", TypeError("Descriptors cannot be created"), r"onnx does not load \(Descriptors cannot be"),
    ],
)
def test_missing_packages_are_said_before_anything_is_read(tmp_path, monkeypatch, package, error, message):
    def imports(name):
        if name == package:
            raise error
        return imported(name)

    imported = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", imports)
    with pytest.raises(BadInput, match=message):
        require("cpu")


def test_a_device_that_does_not_start_is_said_before_anything_is_traced(exported, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(onnx_export, "write_onnx", None)
    assert export(exported / "artifact", "--device", "cuda") == 2
    error = capsys.readouterr().err
    assert "error: cuda: " in error and "tracing" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export --shapes 1x99999999x99999999", "error: --shapes height 99999999 must be at most 16384"),
        ("export --shapes 1x48x48:2x48x48:9x16000x16000", "pixels; give at most 5.4e+08"),
        ("benchmark --batch 1,99999999999", "error: --batch: 99999999999 must be at most 1048576"),
        ("benchmark --size 16000x16000 --batch 9", "pixels; give at most 5.4e+08"),
    ],
)
def test_batches_that_no_machine_holds_are_refused_at_once(exported, capsys, arguments, message):
    command, *more = arguments.split()
    assert main([command, str(exported / "artifact"), *more]) == 2
    assert message in capsys.readouterr().err


def test_results_never_replace_a_device(exported, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/null", str(tmp_path / "pipe")):
        assert main(["benchmark", str(exported / "artifact"), "--out", place]) == 2
        assert f"--out {place}: is not a regular file; give another name" in capsys.readouterr().err
        with pytest.raises(OSError, match="not a regular file"):
            atomic_io.write_whole(Path(place), lambda file: file.write(b""))
    assert not Path("/dev/null").is_file() and not (tmp_path / "pipe").is_file()


def hangs(sender, *_):
    sender.send(("building", 1, 2))
    time.sleep(100)


def is_killed(sender, *_):
    os.kill(os.getpid(), signal.SIGKILL)


def breaks(sender, *_):
    os._exit(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("child", "message"),
    [
        (hangs, "made no progress for 0 minutes and was stopped"),
        (is_killed, "its process was killed by SIGKILL"),
        (breaks, "its process ended with exit code 3"),
    ],
)
def test_a_compiler_that_hangs_or_dies_is_a_failed_check(tmp_path, monkeypatch, child, message):
    monkeypatch.setattr(rtx, "_check", child)
    monkeypatch.setattr(rtx, "require_package", lambda _: None)
    monkeypatch.setattr(rtx, "SILENCE", 1 if child is hangs else 500)
    with pytest.raises(CheckFailed, match=message):
        rtx.check_rtx(tmp_path / "x.onnx", ())
