"""Settings to plain data (dicts, lists, numbers, strings) and back: what files hold of a run or an artifact.

Reading is strict: unknown, missing and mistyped fields are refused by name, and no number is converted.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from cattrs.errors import AttributeValidationNote, IterableValidationNote
from cattrs.strategies import configure_union_passthrough
from cattrs.v import format_exception

from coma.config import (
    EncoderConfig,
    FinetuneConfig,
    ObjectiveConfig,
    PretrainConfig,
    decoder_dim,
    encoder_preset,
    method_preset,
)
from coma.config.settings_file import Key, read_settings
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.paths import Address, Location, local_path, parse_location
from coma.ranges import SIDE, OutOfRange
from coma.registry import ARCHITECTURES, METHODS, Architecture, Method, entry_of, resolve

Settings = TypeVar("Settings", PretrainConfig, FinetuneConfig)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, accepted in ((int, int), (float, (int, float)), (bool, bool), (str, str)):
        converter.register_structure_hook(kind, _exactly(kind, accepted))
    converter.register_unstructure_hook(Path, str)
    converter.register_unstructure_hook(ImageSize, lambda size: size.plain)
    converter.register_structure_hook(ImageSize, lambda value, _: ImageSize.of(value))
    text = _exactly(str, str)
    converter.register_structure_hook(Path, lambda value, _: local_path(text(value, _)))
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


def from_plain(plain: Any, kind: Any, *, source: str, lines: Callable[[], Mapping[Key, int]] = dict) -> Any:
    """Builds settings from plain data; unknown, missing and mistyped fields are refused.

    Args:
        plain: Dicts, lists, numbers and strings.
        kind: Class of the settings.
        source: File or place that they come from, for messages.
        lines: Returns the lines of the keys in that file, where they are known; called for a message.

    Raises:
        BadInput: naming `source` and every field that does not fit, and for unknown fields the nearest one.
    """
    try:
        if not isinstance(plain, dict):
            raise BadInput("is not a group of settings")
        return _converter().structure(plain, kind)
    except (cattrs.BaseValidationError, BadInput, TypeError, KeyError, ValueError) as error:
        known = lines()
        problems = "; ".join(_line_of(key, known) + text for key, text in _problems(error, (), None))
        raise BadInput(f"{source}: {problems}") from None


def _problems(error: BaseException, key: Key, kind: Any) -> Iterator[tuple[Key, str]]:
    """Yields what does not fit: the key, and a message that names it."""
    if isinstance(error, cattrs.BaseValidationError):
        for each in error.exceptions:
            notes = [note for note in getattr(each, "__notes__", ()) if isinstance(note, _NOTES)]
            for note in notes[:1]:
                name = note.name if isinstance(note, AttributeValidationNote) else note.index
                yield from _problems(each, (*key, str(name)), note.type)
            if not notes:
                yield from _problems(each, key, None)
    elif isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [field.name for field in fields(error.cl)]
        for name in sorted(map(str, error.extra_fields)):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            yield (*key, name), f"no setting {'.'.join((*key, name))}; {hint}"
    elif isinstance(error, OutOfRange):
        yield (*key, error.name.rpartition(".")[2].replace("-", "_")), error.in_file
    else:
        text = _explain(error, kind)
        yield key, f"{'.'.join(key)}: {text}" if key else text


def _explain(error: BaseException, kind: Any) -> str:
    text = str(error)
    if isinstance(error, BadInput):
        return text
    if " not in literal " in text:  # cattrs has no class for this error
        value, _, literal = text.partition(" not in literal ")
        return f"{value!r} is none of {literal.partition('[')[2].rstrip('])')}"
    return "is not a group of settings" if is_dataclass(kind) else format_exception(error, kind)


_NOTES = AttributeValidationNote, IterableValidationNote


def _line_of(key: Key, lines: Mapping[Key, int]) -> str:
    """Returns the line of a key, or of the nearest one around it, for a message."""
    known = next((key[:end] for end in range(len(key), 0, -1) if key[:end] in lines), None)
    return f"line {lines[known]}: " if known else ""


def read_config(
    path: Path, kind: type[Settings] = PretrainConfig, *, image_size: ImageSize | None = None
) -> Settings:
    """Returns a run's settings from a file in JSON, YAML or TOML, or from a run directory's config.json.

    A file may leave settings out, and name presets: `model: tiny`, `objective: mae`. A preset of a model
    suits images of `image_size` pixels, or else of the size in the file.

    Raises:
        BadInput: no such file, one in another format, or fields that do not fit, as those of another kind of
            run.
    """
    path = path / "config.json" if path.is_dir() else path
    plain, lines = read_settings(path, "a run directory, its config.json, or settings in YAML or TOML")
    if isinstance(plain, dict) and "format_version" in plain:
        raise BadInput(f"{path}: is of an artifact, not of a run; give a run directory or its config.json")
    finetuned = isinstance(plain, dict) and "artifact" in plain
    if finetuned != (kind is FinetuneConfig):
        made_by = "classify train" if finetuned else "pretrain"
        raise BadInput(f"{path}: is of a run of `coma {made_by}`; give it to that command")
    if isinstance(plain, dict) and not finetuned:
        try:
            plain = _with_presets(plain, image_size)
        except BadInput as error:
            key = ("model" if "model" in str(error) else "objective",)
            raise BadInput(f"{path}: {_line_of(key, lines())}{error}") from None
    return from_plain(plain, kind, source=str(path), lines=lines)


def _with_presets(plain: dict[str, Any], size: ImageSize | None) -> dict[str, Any]:
    """Returns the settings with presets of model and objective written out, or the default ones.

    Raises:
        BadInput: no preset has that name.
    """
    model, objective, data = plain.get("model", "small"), plain.get("objective", "coma"), plain.get("data")
    width = 512
    if isinstance(model, str):
        encoder = encoder_preset(model, size or _size_in(data) or 224)
        model, width = to_plain(encoder, EncoderConfig), decoder_dim(encoder)
    if isinstance(objective, str):
        objective = to_plain(method_preset(objective, decoder_dim=width), ObjectiveConfig)
    return {**plain, "model": model, "objective": objective}


def _size_in(data: Any) -> ImageSize | None:
    """Returns the image size in the settings of the data; None if there is none, or no valid one."""
    with suppress(BadInput):
        size = ImageSize.of(data.get("image_size") if isinstance(data, dict) else None)
        SIDE.check("image_size", size)
        return size
    return None
