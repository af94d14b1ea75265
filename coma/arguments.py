"""Parses command lines into settings, for all commands.

tyro builds the flags from dataclasses. What it is told here, once: paths are local ones, optional flags take
what their type takes, help texts say the range of a number (see `ranges`), and a value that does not fit is
one line that names its flag.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import docstring_parser
import tyro
from tyro import _errors as events  # its hook is not public yet (1.0.17); see `_one_line`
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from coma.errors import BadInput
from coma.paths import local_path
from coma.ranges import ranges_of

Settings = TypeVar("Settings")


def parse_arguments(
    kind: type[Settings],
    argv: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    default: Settings | None = None,
) -> Settings:
    """Returns the settings that the arguments ask for.

    Args:
        kind: A dataclass; every field becomes a flag.
        argv: The arguments behind the name of the command.
        prog: The command as messages call it, for example `coma pack`.
        description: First lines of the help; default: the docstring of `kind`.
        default: Settings that hold where nothing is said.

    Raises:
        BadInput: a value that does not fit its flag, or a flag that is missing.
        SystemExit: the help was asked for, or a flag is unknown; tyro has printed what is to be said.
    """
    with _told_what_is_ours():
        return tyro.cli(
            kind,
            args=argv,
            prog=prog,
            description=description,
            default=tyro.MISSING_NONPROP if default is None else default,
            registry=_registry(),
        )


def parse_known(kind: type[Settings], argv: Sequence[str], *, prog: str) -> Settings:
    """Returns the settings that some of the arguments ask for; it ignores the others and `--help`.

    Raises:
        BadInput: a value that does not fit its flag.
    """
    rest = [argument for argument in argv if argument not in ("-h", "--help")]
    with _told_what_is_ours():
        return tyro.cli(
            kind, args=rest, prog=prog, return_unknown_args=True, add_help=False, registry=_registry()
        )[0]


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.primitive_rule(_number)
    registry.primitive_rule(_path)
    registry.primitive_rule(_optional)
    return registry


def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
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
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (int, kind)) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
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


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
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


def _told_what_is_ours() -> AbstractContextManager[None]:
    """Let tyro read help texts and report errors as this module's docstring says."""
    _complete_help_texts()
    return events.on_parse_error(_one_line)


def _one_line(event: events.ParseErrorEvent) -> None:
    """Raise a rejected value as one line; other events, such as unknown flags, print tyro's suggestions."""
    if isinstance(event, events.InvalidChoice):
        choices = [choice for choice in event.choices if choice != "None"]
        listing = ", ".join(choices[:-1]) + " or " + choices[-1] if len(choices) > 1 else "".join(choices)
        raise BadInput(f"{_name(event.argument)} {event.value!r} must be {listing}")
    if isinstance(event, events.InstantiationFailure) and event.argument is not None:
        if event.message.startswith("Could not"):  # tyro, of tuples, with their types in Python's words
            if Path in get_args(event.argument.field.type_stripped):
                for word in re.findall("'([^']*)'", event.message):
                    local_path(word)  # says itself what is wrong with it
            form = re.sub(r"\[(\S+) \[\1 \.\.\.\]\]", r"\1 ...", event.argument.lowered.metavar or "")
            raise BadInput(f"{_name(event.argument)} must be given as {form}")
        raise BadInput(f"{_name(event.argument)} {event.message}")
    if isinstance(event, events.BadValue) and event.reason == "too_few_values":
        count = event.argument.lowered.nargs
        values = "a value" if count in (None, 1) else f"{count} values"
        raise BadInput(f"{_name(event.argument)} needs {values}")
    if isinstance(event, events.MissingArgs) and not event.unrecognized_tokens:
        names = ", ".join(_name(each.arg) for each in event.missing_arguments)
        raise BadInput(f"{event.prog} needs {names}; {event.prog} --help lists all settings")


def _name(argument: Any) -> str:
    """Returns the name of an argument: its flag, or the word that the help shows for its position."""
    if argument.is_positional():
        return argument.field.argconf.metavar or argument.field.intern_name.upper()
    return argument.display_name()


def _complete_help_texts() -> None:
    """Let tyro wrap help texts at the terminal's width, not where our lines end, and add ranges to them.

    It joins the lines of a field's docstring (1.0.17) unless they begin with a blank, as all but the first
    do: docstring_parser hands them on as they stand in the source. Nor does it join those that begin with a
    digit, a bracket or a quote.
    """
    parse = docstring_parser.parse_from_object
    if parse.__module__ == __name__:
        return

    def parse_from_object(settings: Any, *args: Any, **options: Any) -> docstring_parser.Docstring:
        found = parse(settings, *args, **options)
        ranges = ranges_of(settings) if dataclasses.is_dataclass(settings) else {}
        for param in found.params:
            text = inspect.cleandoc(param.description or "")
            allowed = str(ranges.get(param.arg_name, ""))
            text = f"{text} ({allowed})" if allowed else text
            param.description = re.sub(r"(?<!\n)\n(?!\n)", " ", text) or None
        return found

    docstring_parser.parse_from_object = parse_from_object
