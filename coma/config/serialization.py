"""Settings to plain data (dicts, lists, numbers, strings) and back: what JSON holds of a run or an artifact.

Reading is strict: unknown, missing and mistyped fields are refused by name, and no number is converted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from cattrs.strategies import configure_union_passthrough
from cattrs.v import format_exception

from coma.config import EncoderConfig, FinetuneConfig, ObjectiveConfig, PretrainConfig
from coma.errors import BadInput
from coma.paths import Address, Location, local_path, parse_location
from coma.preflight import check_regular_file
from coma.ranges import OutOfRange
from coma.registry import ARCHITECTURES, METHODS, Architecture, Method, entry_of, resolve

Settings = TypeVar("Settings", PretrainConfig, FinetuneConfig)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, accepted in ((int, int), (float, (int, float)), (bool, bool), (str, str)):
        converter.register_structure_hook(kind, _exactly(kind, accepted))
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook(Path, lambda value, _: local_path(value))
    _register_locations(converter)
    configure_union_passthrough(str | int, converter)
    _register_tagged(converter, EncoderConfig, "architecture", ARCHITECTURES)
    _register_tagged(converter, ObjectiveConfig, "method", METHODS)
    return converter


def _exactly(kind: type, accepted: type | tuple[type, ...]) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise BadInput(f"{value!r} is not of type {kind.__name__}")
        return kind(value)

    return structure


def _register_locations(converter: cattrs.Converter) -> None:
    """Stores local paths and addresses as text, addresses without their secrets."""

    def structure(value: Any, kind: Any) -> Any:
        if value is None and kind != Location:
            return None
        if not isinstance(value, str):
            raise BadInput(f"{value!r} is not a path")
        return parse_location(value)

    kinds = (Location, Location | None)
    converter.register_unstructure_hook_func(
        lambda kind: kind in (Address, *kinds), lambda value: None if value is None else str(value)
    )
    converter.register_structure_hook_func(lambda kind: kind in kinds, structure)


def _register_tagged(
    converter: cattrs.Converter, base: Any, tag: str, table: Mapping[str, Method] | Mapping[str, Architecture]
) -> None:
    """Stores settings of type `base` with a field `tag`, their key in `table`; None is stored as null."""

    def unstructure(value: Any) -> Any:
        if value is None:
            return None
        name = next(name for name, entry in table.items() if entry is entry_of(value))
        return {tag: name, **converter.unstructure(value, type(value))}

    def structure(plain: Any, kind: Any) -> Any:
        if plain is None and kind != base:
            return None
        name = plain.get(tag) if isinstance(plain, dict) else None
        if not isinstance(plain, dict) or not isinstance(name, str) or name not in table:
            raise BadInput(f"{tag} {name!r} is none of {', '.join(table)}")
        return converter.structure({k: v for k, v in plain.items() if k != tag}, resolve(table[name].config))

    kinds = (base, base | None)
    converter.register_unstructure_hook_func(lambda kind: kind in kinds, unstructure)
    converter.register_structure_hook_func(lambda kind: kind in kinds, structure)


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
    """Builds settings from plain data; unknown, missing and mistyped fields are refused.

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
    """Returns the content of a JSON file.

    Raises:
        BadInput: it cannot be read, or is no JSON; the message says what is `wanted` in its place.
    """
    check_regular_file(path, f"give {wanted}", must_exist=False)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise BadInput(f"{path}: {reason}; give {wanted}") from None
    except (ValueError, RecursionError):  # of bytes that are no text, text that is no JSON, endless numbers
        raise BadInput(f"{path}: not a readable config, its text is not JSON; give {wanted}") from None


def read_config(path: Path, kind: type[Settings] = PretrainConfig) -> Settings:
    """Returns a run's settings from `config.json`, or from the run directory that holds it.

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
