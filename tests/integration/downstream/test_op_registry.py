"""When operators stand in for mmcv's: once, said so, and never for those that are there."""

import importlib
import logging
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from downstream_data import provided_ops

from coma.errors import BadInput
from downstream.openmmlab.op_registry import register_ops

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # mmengine's and mmcv's own
]


@pytest.fixture(scope="module")
def ops() -> Any:
    return provided_ops()


@pytest.fixture
def mmcv(ops, monkeypatch, tmp_path) -> ModuleType:
    """A package in mmcv's place whose files are in `tmp_path`, without operators so far."""
    package = ModuleType("mmcv")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "mmcv", package)
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    return package


def test_the_module_is_one_to_everyone_who_looks(ops):
    loader = importlib.import_module("mmcv.utils.ext_loader")
    assert loader.check_ops_exist()
    module = sys.modules["mmcv._ext"]
    assert module.__spec__ is not None and module.__spec__.name == module.__name__ == "mmcv._ext"
    assert hasattr(module, "carafe_forward") and not hasattr(module, "__path__")
    assert "torchvision" in ops.get_compiler_version()


def test_it_is_announced_once(mmcv, caplog):
    with caplog.at_level(logging.INFO):
        register_ops()
        first = sys.modules["mmcv._ext"]
        register_ops()
    assert [record.name for record in caplog.records] == ["downstream.openmmlab.op_registry"]
    assert "torchvision" in caplog.text
    assert sys.modules["mmcv._ext"] is first is vars(mmcv)["_ext"]


def test_operators_that_are_loaded_are_left_alone(mmcv, monkeypatch, caplog):
    loaded = ModuleType("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", loaded)
    with caplog.at_level(logging.INFO):
        register_ops()
    assert sys.modules["mmcv._ext"] is loaded and not hasattr(loaded, "nms")
    assert not caplog.records


def test_operators_that_are_installed_are_left_alone(mmcv, tmp_path, caplog):
    (tmp_path / "_ext.py").write_text("compiled = True")
    with caplog.at_level(logging.INFO):
        register_ops()
    assert sys.modules["mmcv._ext"].compiled and not hasattr(sys.modules["mmcv._ext"], "nms")
    assert not caplog.records


def test_operators_that_cannot_be_loaded_are_said_so(mmcv, tmp_path):
    (tmp_path / "_ext.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    with pytest.raises(BadInput, match=r"cannot be loaded \(undefined symbol: _ZN3c10\).*another torch"):
        register_ops()
    assert "mmcv._ext" not in sys.modules


def test_without_any_mmcv_it_says_what_to_install(mmcv, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(BadInput, match=r"pip install mmcv-lite==2\.1\.0"):
        register_ops()


def test_what_an_mmcv_misses_is_not_taken_for_mmcv(mmcv, monkeypatch, tmp_path):
    (tmp_path / "mmcv.py").write_text("import mmengine_that_is_not_there")
    monkeypatch.delitem(sys.modules, "mmcv")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="mmengine_that_is_not_there"):
        register_ops()


def test_what_adapts_configurations_imports_nothing_of_openmmlab():
    code = "import downstream.configs.load, downstream.configs.adapt, sys\n"
    code += "print({'mmcv', 'mmengine', 'mmdet', 'mmseg'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
