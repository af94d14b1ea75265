"""`import coma`: every public name resolves, the stub says the same, and the import costs nothing."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import coma

STUB = Path(coma.__file__).with_suffix(".pyi")


def test_the_stub_and_all_agree():
    imports = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    stub = {alias.name: str(node.module) for node in imports for alias in node.names}
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    assert sorted(stub) == sorted(coma.__all__)
    for name, module in stub.items():
        ours = getattr(coma, name)
        assert getattr(importlib.import_module(module), name) is ours
    assert (STUB.parent / "py.typed").exists()


def test_importing_takes_no_torch_and_no_time():
    code = (
        "import sys, time; before = time.process_time(); import coma; "
        "print(time.process_time() - before, 'torch' in sys.modules, 'pretrain' in sys.modules)"
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, *loaded = done.stdout.split()
        assert loaded == ["False", "False"]
        times.append(float(seconds))
    assert min(times) < 0.1


def test_a_room_that_is_not_installed_gives_no_name(monkeypatch):
    monkeypatch.setattr(coma.metadata, "entry_points", lambda **_: ())  # pyright: ignore
    monkeypatch.delitem(vars(coma), "pretrain", raising=False)
    with pytest.raises(AttributeError, match="pretrain"):
        _ = coma.pretrain
