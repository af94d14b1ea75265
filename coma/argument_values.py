"""How flags read and show values of each type: tyro asks the rules of `RULES` in turn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.paths import Address, local_path, parse_location


def metavar(hint: Any) -> str | None:
    """Returns `N ...` for tuples of any length, instead of tyro's nested brackets; None for all others."""
    for part in (hint, *get_args(hint)):
        members = get_args(part)
        if get_origin(part) is tuple and members[-1:] == (Ellipsis,):
            inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(members[0], set()))
            return f"{inner.metavar} ..." if isinstance(inner, PrimitiveConstructorSpec) else None
    return None


def number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Whole numbers and floats; more than Python converts is refused in words."""
    if info.type not in (int, float):
        return None
    kind, what = info.type, "a whole number" if info.type is int else "a number"

    def read(words: list[str]) -> Any:
        try:
            return kind(words[0])
        except ValueError:  # also whole numbers of more digits than Python converts
            shown = words[0] if len(words[0]) <= 40 else f"{words[0][:40]}..."
            raise ValueError(f"{shown!r} must be {what}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="N" if kind is int else "X",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (int, kind)) and not isinstance(value, bool),
        str_from_instance=lambda value: [f"{value:.6g}" if isinstance(value, float) else str(value)],
    )


def text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Text is one word."""
    if info.type is not str:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="TEXT",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


def path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Paths are local ones."""
    if info.type is not Path:
        return None

    def read(words: list[str]) -> Path:
        try:
            return local_path(words[0])
        except BadInput as error:
            raise ValueError(str(error)) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def location(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Path | Address, with or without None, is one value."""
    members = set(get_args(info.type))
    if members - {NoneType} != {Path, Address}:
        return None

    def read(words: list[str]) -> Any:
        try:
            return None if words == ["None"] and NoneType in members else parse_location(words[0])
        except BadInput as error:
            raise ValueError(str(error)) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple(members)),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def size(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """ImageSize is one value, of one number or of the two that `coma.arguments` made one word of."""
    if info.type is not ImageSize:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="N",
        instance_from_str=lambda words: ImageSize.parse(words[0]),
        is_instance=lambda value: isinstance(value, ImageSize),
        str_from_instance=lambda value: [value.words],
    )


def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """X | None takes what X takes, and the word None, which undoes what a saved run says."""
    members = [member for member in get_args(info.type) if member is not NoneType]
    if len(members) != 1 or NoneType not in get_args(info.type):
        return None
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(members[0], info.markers))
    if not isinstance(inner, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        inner,
        nargs=inner.nargs if inner.nargs in (1, "*") else (1, inner.nargs),
        instance_from_str=lambda words: None if words == ["None"] else inner.instance_from_str(words),
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: ["none"] if value is None else inner.str_from_instance(value),
        choices=inner.choices and (*inner.choices, "None"),
    )


RULES = (number, path, location, size, text, optional)
"""Each returns how values of a type are given, or None for types of others."""
