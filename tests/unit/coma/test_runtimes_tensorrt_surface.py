"""Every name of TensorRT's Python API that is used exists in 10.13, 10.16, 11.0, 11.4 and in TensorRT-RTX.

Names are found by reading the source, so code is covered that only a GPU could run.
"""

import ast
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from tensorrt_files import needs_rtx

from coma.runtimes.tensorrt.discovery import load_library

ROOT = Path(__file__).parents[3]
FILES = [
    *sorted((ROOT / "export/tensorrt").glob("*.py")),
    *sorted((ROOT / "coma/runtimes/tensorrt").glob("*.py")),
]
SURFACES = json.loads((ROOT / "tests/golden/tensorrt_surfaces.json").read_text())
OBJECTS = {
    "trt": "tensorrt",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "network_input": "ITensor",
    "parser": "OnnxParser",
    "fault": "ParserError",
    "config": "IBuilderConfig",
    "ranges": "IOptimizationProfile",
    "cache": "ITimingCache",
    "other": "ITimingCache",
    "memory": "IHostMemory",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}
"""What our names for TensorRT's objects are, by name, in every file of ours that uses it."""
PLAIN = {"logger", "monitor", "cuda", "module", "flag", "severity", "names"}
"""Names of type Any as well that are none of TensorRT's: our own, or read only here."""


def used(source: str) -> set[tuple[str, str]]:
    """Every (class, name) of TensorRT's that a file uses; raises on an object whose class is not known."""
    found = set()
    for each in ast.walk(ast.parse(source)):
        if isinstance(each, ast.Attribute) and (owner := _class(each.value)) and each.attr[:2] != "__":
            found.add((owner, each.attr))
        elif isinstance(each, ast.Assign) and _class(_root(each.value)):
            assert all(_is_known(target) for target in each.targets), ast.unparse(each)
        elif isinstance(each, ast.arg | ast.AnnAssign) and each.annotation is not None:
            name = each.arg if isinstance(each, ast.arg) else _name(each.target)
            known = ast.unparse(each.annotation) != "Any" or name in {*OBJECTS, *PLAIN}
            assert known, f"{name}: Any: whose is it?"
        elif isinstance(each, ast.Call) and ast.unparse(each.func) in ("getattr", "hasattr", "setattr"):
            assert not _class(_root(each.args[0])), f"{ast.unparse(each)} hides a name"
    return found


def _is_known(target: ast.expr) -> bool:
    """Whether what is assigned to has a class in our list, or is itself an attribute of TensorRT's."""
    owner = target.value if isinstance(target, ast.Attribute) else None
    return _name(target) in {*OBJECTS, *PLAIN} or (owner is not None and _class(owner) is not None)


def _name(expression: ast.expr) -> str:
    return ast.unparse(expression).rpartition(".")[2].lstrip("_")


def _class(expression: ast.expr) -> str | None:
    """TensorRT's class of a name of ours, or of an enumeration of the module."""
    if isinstance(expression, ast.Attribute) and _class(expression.value) == "tensorrt":
        return expression.attr
    return OBJECTS.get(_name(expression)) if isinstance(expression, ast.Name | ast.Attribute) else None


def _root(expression: ast.expr) -> ast.expr:
    """Whose method or attribute this is."""
    while isinstance(expression, ast.Call):
        expression = expression.func
    return expression.value if isinstance(expression, ast.Attribute) else expression


def missing(names: Iterable[tuple[str, str]], surface: str) -> set[str]:
    absent = set()
    for owner, name in names:
        known = SURFACES["classes"].get(owner, {"all": []})
        if name not in known["all"] and name not in known.get("only", {}).get(surface, []):
            absent.add(f"{owner}.{name}")
    return absent


@pytest.mark.parametrize("surface", SURFACES["surfaces"])
def test_what_is_used_of_tensorrt_exists(surface: str):
    names = set().union(*(used(file.read_text()) for file in FILES))
    assert len(names) > 50
    assert missing(names, surface) == set()


@needs_rtx
def test_what_is_used_of_tensorrt_exists_in_what_is_installed():
    trt = load_library("tensorrt_rtx").module
    for owner, name in set().union(*(used(file.read_text()) for file in FILES)):
        assert hasattr(trt if owner == "tensorrt" else getattr(trt, owner), name), f"{owner}.{name}"


@pytest.mark.parametrize(
    ("planted", "name", "last"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "BuilderFlag.FP16", "10.16.1.11"),
        ("builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))",
         "NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "10.16.1.11"),
        ("config.int8_calibrator = None", "IBuilderConfig.int8_calibrator", "10.16.1.11"),
        ("size = self._engine.device_memory_size", "ICudaEngine.device_memory_size", "10.16.1.11"),
        ("builder.platform_has_fast_fp16", "Builder.platform_has_fast_fp16", "10.16.1.11"),
        ("parser.supports_model(data)", "OnnxParser.supports_model", "10.16.1.11"),
        ("context.execute_async_v2(bindings)", "IExecutionContext.execute_async_v2", None),
        ("engine.get_binding_index(name)", "ICudaEngine.get_binding_index", None),
        ("trt.IInt8EntropyCalibrator2()", "tensorrt.IInt8EntropyCalibrator2", None),
    ],
)  # fmt: skip
def test_a_removed_name_is_caught(planted: str, name: str, last: str | None):
    names = used(planted.replace("size =", "memory ="))
    assert name in missing(names, "11.0.0.114") & missing(names, "11.4.0.106")
    assert (name in missing(names, "10.16.1.11")) == (last is None)


@pytest.mark.parametrize(
    "hidden",
    ["thing = builder.create_network()", "def f(thing: Any): ...", "getattr(trt.BuilderFlag, name)"],
)
def test_an_object_under_an_unknown_name_is_caught(hidden: str):
    with pytest.raises(AssertionError):
        used(hidden)
