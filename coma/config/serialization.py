"""Settings to plain data (dicts, lists, numbers, strings) and back: what JSON holds of a run or an artifact.

Reading is strict: unknown, missing and mistyped fields are refused by name, and no number is converted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from cattrs.strategies import configure_union_passthrough
from cattrs.v import format_exception

from coma.config import (
    BalancedCoMAConfig,
    BeyondConfig,
    CMTConfig,
    CoMAConfig,
    DyViTConfig,
    EncoderConfig,
    FinetuneConfig,
    MAEConfig,
    ObjectiveConfig,
    PretrainConfig,
    ViTConfig,
)
from coma.errors import BadInput
from coma.paths import local_path
from coma.ranges import OutOfRange

Settings = TypeVar("Settings", PretrainConfig, FinetuneConfig)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, accepted in ((int, int), (float, (int, float)), (bool, bool), (str, str)):
        converter.register_structure_hook(kind, _exactly(kind, accepted))
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook(Path, lambda value, _: local_path(value))
    configure_union_passthrough(str | int, converter)
    _register_union(converter, EncoderConfig, "architecture", {"dyvit": DyViTConfig, "vit": ViTConfig})
    methods = {
        "coma": CoMAConfig,
        "mae": MAEConfig,
        "beyond": BeyondConfig,
        "cmt": CMTConfig,
        "coma-balanced": BalancedCoMAConfig,
    }
    _register_union(converter, ObjectiveConfig, "method", methods)
    return converter


def _exactly(kind: type, accepted: type | tuple[type, ...]) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise BadInput(f"{value!r} is not of type {kind.__name__}")
        return kind(value)

    return structure


def _register_union(converter: cattrs.Converter, union: Any, tag: str, kinds: dict[str, type]) -> None:
    """Members of `union` are told apart by a field `tag`; None is stored as null."""
    names = {kind: name for name, kind in kinds.items()}

    def unstructure(value: Any) -> Any:
        return value and {tag: names[type(value)], **converter.unstructure(value, type(value))}

    def structure(plain: Any, _: Any) -> Any:
        name = plain.get(tag) if isinstance(plain, dict) else None
        if name not in kinds:
            raise BadInput(f"{tag} {name!r} is none of {', '.join(kinds)}")
        return converter.structure({k: v for k, v in plain.items() if k != tag}, kinds[name])

    for kind in (union, union | None):
        converter.register_unstructure_hook(kind, unstructure)
    converter.register_structure_hook(union, structure)
    converter.register_structure_hook(union | None, lambda plain, _: plain and structure(plain, union))


def to_plain(value: Any, kind: Any = None) -> Any:
    """Dataclasses to dicts, lists, numbers and strings; give `kind` for a bare member of a union."""
    return _converter().unstructure(value, kind)


def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in plain.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def from_plain(plain: Any, kind: Any, *, source: str) -> Any:
    """The inverse of `to_plain`; unknown, missing and mistyped fields are refused.

    Raises:
        BadInput: naming `source` and every field that does not fit.
    """
    try:
        return _converter().structure(plain, kind)
    except cattrs.BaseValidationError as error:
        problems = "; ".join(cattrs.transform_error(error, format_exception=_explain))
        raise BadInput(f"{source}: {problems.replace(' @ $.', ', in ').replace(' @ $', '')}") from None
    except (BadInput, TypeError, KeyError, ValueError) as error:
        raise BadInput(f"{source}: {_explain(error, None)}") from None


def _explain(error: BaseException, kind: type | None) -> str:
    if isinstance(error, OutOfRange):
        return error.in_file
    return str(error) if isinstance(error, BadInput) else format_exception(error, kind)


def read_json(path: Path, wanted: str) -> Any:
    """What a JSON file holds.

    Raises:
        BadInput: it cannot be read, or is no JSON; the message says what is `wanted` in its place.
    """
    if path.exists() and not path.is_file():
        raise BadInput(f"{path}: is not a regular file; give {wanted}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise BadInput(f"{path}: {reason}; give {wanted}") from None
    except (ValueError, RecursionError):  # of bytes that are no text, text that is no JSON, endless numbers
        raise BadInput(f"{path}: not a readable config, its text is not JSON; give {wanted}") from None


def read_config(path: Path, kind: type[Settings] = PretrainConfig) -> Settings:
    """A run's settings from `config.json`, or from the run directory that holds it.

    Raises:
        BadInput: no such file, not JSON, or fields that do not fit, as those of another kind of run.
    """
    path = path / "config.json" if path.is_dir() else path
    plain = read_json(path, "a run directory or its config.json")
    if isinstance(plain, dict) and "format_version" in plain:
        raise BadInput(f"{path}: is of an artifact, not of a run; give a run directory or its config.json")
    finetuned = isinstance(plain, dict) and "artifact" in plain
    if finetuned != (kind is FinetuneConfig):
        made_by = "classify train" if finetuned else "pretrain"
        raise BadInput(f"{path}: is of a run of `coma {made_by}`; give it to that command")
    return from_plain(plain, kind, source=str(path))
