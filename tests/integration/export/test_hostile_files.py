"""Files that are not what an export wrote: renamed, cut, hostile, replaced in between."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from coma.cli import main
from coma.errors import BadInput, CheckFailed
from coma.runtimes.manifest import NAME, Manifest
from coma.runtimes.onnxruntime import OnnxRuntime
from coma.runtimes.open import open_runtime
from export.gate import REJECTED

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself


def test_only_what_the_manifest_lists_is_opened(run_folder, caplog):
    folder = run_folder / "export"
    path = folder / "classifier.onnx"
    open_runtime(path)
    for name in ("renamed.onnx", "renamed.engine"):
        other = Path(shutil.copy(path, folder / name))
        with pytest.raises(BadInput, match=r"manifest.json beside it does not list it as verified; export"):
            open_runtime(other)
    (folder.parent / "link.onnx").symlink_to(folder / "renamed.onnx")
    with pytest.raises(BadInput, match="does not list it"):
        open_runtime(folder.parent / "link.onnx")
    shutil.copy(path, folder / f"x.onnx{REJECTED}")
    (folder.parent / "good.onnx").symlink_to(folder / f"x.onnx{REJECTED}")
    with pytest.raises(BadInput, match="failed verification"):
        open_runtime(folder.parent / "good.onnx")
    assert not caplog.records
    alone = folder.parent / "alone"
    alone.mkdir()
    open_runtime(Path(shutil.copy(path, alone)))  # as an older or a copied one
    assert "so it may not have been verified" in caplog.text


def test_a_file_and_a_manifest_that_an_export_just_replaced_fit(run_folder, monkeypatch):
    folder = run_folder / "export"
    stale = Manifest.read(folder, "")
    assert stale
    stale.files[0].sha256 = "of the former file"
    read, manifests = Manifest.read, [stale]
    monkeypatch.setattr(Manifest, "read", lambda *a: manifests.pop() if manifests else read(*a))
    open_runtime(folder / "classifier.onnx")


def with_external_data(folder: Path, place: str) -> Path:
    """An ONNX file of ours whose largest weight lies elsewhere."""
    model = onnx.load(folder / "classifier.onnx")
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    (folder / "classifier.onnx").write_bytes(model.SerializeToString())
    return folder / "classifier.onnx"


def test_hostile_and_damaged_files_are_refused_in_one_line(run_folder):
    folder = run_folder / "export"
    good = (folder / "classifier.onnx").read_bytes()
    (folder / NAME).unlink()
    for place in ("/etc/passwd", "../artifact/model.safetensors", "report.md"):
        with pytest.raises(BadInput, match="keeps weights in other files"):
            open_runtime(with_external_data(folder, place))
        (folder / "classifier.onnx").write_bytes(good)
    for size in (0, 1, 1000, len(good) // 2, len(good) - 1):
        (folder / "cut.onnx").write_bytes(good[:size])
        with pytest.raises(BadInput, match=r"cut\.onnx"):
            open_runtime(folder / "cut.onnx")
    rng = np.random.default_rng(0)
    for _ in range(30):
        damaged = bytearray(good)
        for place in rng.integers(0, len(good), 40):
            damaged[place] = rng.integers(256)
        (folder / "damaged.onnx").write_bytes(damaged)
        try:
            runtime = open_runtime(folder / "damaged.onnx")
            runtime(torch.zeros(1, 3, 48, 48))
        except (BadInput, CheckFailed) as error:
            assert "\n" not in str(error)
    (folder / "folder.onnx").mkdir()
    with pytest.raises(BadInput, match=r"folder\.onnx: not an artifact"):
        open_runtime(folder / "folder.onnx")
    for name in ("pipe.onnx", "pipe.engine"):
        os.mkfifo(folder / name)
        with pytest.raises(BadInput, match="not a regular file"):
            open_runtime(folder / name)
        with pytest.raises(BadInput, match="not a regular file"):
            OnnxRuntime(folder / "pipe.onnx")
    (folder / "loop.onnx").symlink_to("loop.onnx")
    with pytest.raises(BadInput, match=r"loop\.onnx: "):
        open_runtime(folder / "loop.onnx")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plain: "[" * 100_000,
        lambda plain: json.dumps(plain | {"files": [5]}),
        lambda plain: json.dumps(plain | {"files": [plain["files"][0] | {"file": 7}]}),
        lambda plain: json.dumps(plain | {"files": [plain["files"][0] | {"file": "../../etc/passwd"}]}),
        lambda plain: json.dumps(plain | {"files": [plain["files"][0] | {"verification": {}}]}),
        lambda plain: json.dumps(plain | {"files": [plain["files"][0] | {"image_sets": {"a": 1}}]}),
        None,
    ],
)
def test_a_hostile_manifest_is_refused_in_one_line(run_folder, capsys, spoil):
    path = run_folder / "export" / NAME
    plain = json.loads(path.read_text())
    path.unlink()
    if spoil is None:
        os.mkfifo(path)
    else:
        path.write_text(spoil(plain))
    for command in ("export", "benchmark"):
        assert main([command, str(run_folder / "artifact")]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith(f"error: {path}: ")
    with pytest.raises(BadInput, match=r"manifest\.json: "):
        open_runtime(run_folder / "export" / "classifier.onnx")
