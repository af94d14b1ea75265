"""The contract between rooms and layers holds, and is shown to catch what it forbids."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = PROJECT["project"]["entry-points"]["coma.commands"]
HEAVY = ("gradio", "mmcv", "mmdet", "mmengine", "mmseg", "onnx", "onnxruntime", "tensorrt")


ROOMS = ("coma", "pretrain", "downstream", "export", "demo")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the packages and their contract, free to be spoilt."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def lint(folder: Path) -> tuple[int, str]:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as c; c()",
        "--no-cache",
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_the_contract_holds(copy):
    code, said = lint(copy)
    assert code == 0, said


SIDE_BY_SIDE = "rooms stand side by side on the core"
CIRCLES = "no modules import each other in a circle"


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("coma/models/dyvit.py", "import pretrain.training", SIDE_BY_SIDE),
        ("pretrain/training/trainer.py", "import export.onnx_export", SIDE_BY_SIDE),
        ("export/onnx_export.py", "def late():\n    import downstream.predict", SIDE_BY_SIDE),
        ("downstream/predict.py", "import demo.app", SIDE_BY_SIDE),
        ("export/job.py", "import pretrain.training", "export imports the core alone"),
        ("coma/config/runs.py", "from coma.data import open_source", "coma is built in layers"),
        ("coma/objectives/coma.py", "import coma.data", "coma is built in layers"),
        ("coma/odds_and_ends.py", "import coma.config", "odds_and_ends"),
        ("pretrain/odds_and_ends.py", "import coma.config", "odds_and_ends"),
        ("pretrain/training/trainer.py", "import pretrain.sweep", "pretrain is built in layers"),
        ("coma/data/sources/base.py", "from coma.data import loader", CIRCLES),
        (
            "coma/data/sources/base.py",
            "def late():\n    from coma.models import DyViT",
            "readers of images know no models",
        ),
        ("coma/artifact/save.py", "def late():\n    import onnx", "the core and pre-training need none"),
    ],
)
def test_a_planted_import_is_caught(copy, file, line, broken):
    path = copy / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n\n{line}\n")
    code, said = lint(copy)
    assert code == 1, said
    assert re.search(rf"{broken}.* BROKEN" if " " in broken else broken, said), said


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


LIGHT = ["coma", "coma.cli", "coma.config", "coma.errors"]


@pytest.mark.parametrize("module", LIGHT + [entry.partition(":")[0] for entry in COMMANDS.values()])
def test_what_the_command_line_needs_imports_without_torch(module):
    loaded = modules_after(f"import {module}")
    assert "coma" in loaded
    assert not loaded & {"torch", "torchvision", "timm", "numpy", "matplotlib", "skimage", *HEAVY}


@pytest.mark.slow
def test_training_needs_no_other_room():
    loaded = modules_after("import pretrain.training, pretrain.evaluate")
    assert "torch" in loaded
    assert not loaded & {"export", "downstream", "demo", *HEAVY}


def test_the_lock_names_versions_and_hashes_and_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock and "--index" not in lock
    locked = dict(re.findall(r"^([a-z0-9.-]+)==([^\s;]+)", lock, re.MULTILINE))
    asked = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in asked}
    assert names <= set(locked)
    assert (locked["torch"], locked["torchvision"]) == ("2.11.0", "0.26.0")
    assert lock.count("--hash=sha256:") >= len(locked)
