"""Parses command lines into settings, for all commands.

tyro builds the flags from dataclasses. This module tells it how: `argument_values` reads the values, help
texts name the range and the default of a flag once, and a value that does not fit is one line that names its
flag. `--help` leaves out what is marked as `RARE`; `--help-all` shows everything.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import tyro
from tyro import _errors as events  # its hook is not public yet (1.0.17); `test_arguments` watches it
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from coma.argument_values import RULES, metavar
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.paths import Location, local_path, parse_location
from coma.ranges import RARE, ranges_of

Settings = TypeVar("Settings")


class Keywords(list[str]):
    """Arguments that were keywords of a Python call: an unknown one is an exception, not a text on stderr."""


def from_keywords(settings: Mapping[str, Any], positional: Sequence[str] = ()) -> Keywords:
    """Returns the arguments that say what the keywords of a Python call say.

    Args:
        settings: Values by the names of flags, with `_` for `-`; None stands for the default.
        positional: Names of the settings that have no flag.
    """
    words, rest = Keywords(), Keywords()
    for name, value in settings.items():
        values = [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]
        flag = name.strip("_").replace("_", "-")
        if value is None:
            continue
        if name in positional:
            words += values
        elif isinstance(value, bool):
            rest += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            rest += [f"--{flag}", *values]
    words += rest
    return words


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
    own = argv[: argv.index("--")] if "--" in argv else argv
    complete = "--help-all" in own
    hidden: list[str] | None = [] if {"-h", "--help"} & {*own} and not complete else None
    words = _sizes_joined(["--help" if word == "--help-all" else word for word in argv], kind)

    def refuse(event: events.ParseErrorEvent) -> None:
        unknown = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", None)
        if unknown and isinstance(argv, Keywords):
            name = unknown[0].lstrip("-").replace("-", "_")
            near = difflib.get_close_matches(name, _names(kind), n=1)
            raise BadInput(f"{prog} has no setting {name}" + (f"; did you mean {near[0]}?" if near else ""))
        _one_line(event)

    try:
        with events.on_parse_error(refuse):
            return tyro.cli(
                kind,
                args=words,
                prog=prog,
                description=description,
                default=tyro.MISSING_NONPROP if default is None else default,
                registry=_registry(hidden),
            )
    except SystemExit:
        if hidden:
            print(f"{prog} --help-all shows {len(hidden)} more flags.")
        raise


def parse_known(kind: type[Settings], argv: Sequence[str], *, prog: str) -> Settings:
    """Returns the settings that some of the arguments ask for; it ignores the others and `--help`.

    Raises:
        BadInput: a value that does not fit its flag.
    """
    rest = [word for word in _sizes_joined(argv, kind) if word not in ("-h", "--help", "--help-all")]
    with events.on_parse_error(_one_line):
        return tyro.cli(
            kind, args=rest, prog=prog, return_unknown_args=True, add_help=False, registry=_registry()
        )[0]


def _registry(hidden: list[str] | None = None) -> ConstructorRegistry:
    """Returns the rules of this module; rare flags are left out and listed in `hidden` where it is given."""
    registry = ConstructorRegistry()
    for rule in RULES:
        registry.primitive_rule(rule)
    registry.struct_rule(_dataclass(hidden))
    return registry


def _dataclass(hidden: list[str] | None) -> Callable[[StructTypeInfo], StructConstructorSpec | None]:
    """Returns the rule by which the fields of a dataclass become flags."""

    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        kind: Any = info.type
        if not dataclasses.is_dataclass(kind) or not isinstance(kind, type):
            return None
        hints, texts, ranges = get_type_hints(kind, include_extras=True), _texts(kind), ranges_of(kind)
        given = info.default if dataclasses.is_dataclass(info.default) else None
        fields = []
        for field in dataclasses.fields(kind):
            hint: Any = hints[field.name]
            base, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            default, text = getattr(given, field.name, _default(field)), texts.get(field.name, "")
            if dataclasses.is_dataclass(default):
                names = _names(type(default))
            else:
                names = [field.name]
                text, shown = _presentation(base, default, str(ranges.get(field.name, "")), text)
                extras = [shown, *extras]
                if tyro.conf.Positional in extras and metavar(base) is None:
                    extras = [tyro.conf.arg(metavar=field.name.upper()), *extras]
            if hidden is not None and RARE in extras:
                hidden.extend(names)
                extras.append(tyro.conf.Suppress)
            hint = Annotated[(base, *extras)] if extras else base  # type: ignore[valid-type]
            fields.append(StructFieldSpec(field.name, hint, default, text or None))
        return StructConstructorSpec(kind, tuple(fields))

    return rule


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING_NONPROP


def _names(kind: Any) -> list[str]:
    """Returns the names of the fields of a dataclass and of those in it."""
    return [name for name, _ in _fields(kind)]


def _fields(kind: Any) -> list[tuple[str, Any]]:
    """Returns names and types of the fields of a dataclass and of those in it."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    found, hints = [], get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = _default(field)
        inner = type(default) if dataclasses.is_dataclass(default) else hints[field.name]
        found += _fields(inner) if dataclasses.is_dataclass(inner) else [(field.name, inner)]
    return found


@cache
def _texts(kind: type) -> dict[str, str]:
    """Returns the docstrings of a dataclass's fields, each as one line; inherited ones too."""
    texts: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        try:
            params = docstring_parser.parse_from_object(each).params
        except OSError:  # made by `make_dataclass`, which has no source
            continue
        own = {param.arg_name: inspect.cleandoc(param.description or "") for param in params}
        texts |= {name: re.sub(r"(?<!\n)\n(?!\n)", " ", text) for name, text in own.items() if text}
    return texts


def _presentation(hint: Any, default: Any, allowed: str, text: str) -> tuple[str, Any]:
    """Returns a flag's help text, and how its values, its range and its one default are shown.

    Where no value is the default, or an empty list, the last words of the text may say what that means:
    "default: 3".
    """
    told = _TOLD.fullmatch(text)
    meaning = told["a"] or told["b"] if told else ""
    if told:
        text = told["text"] + "."

    def behind(label: str) -> str:
        if isinstance(default, bool):
            label = "on" if default else "off"
        shown = meaning if default in (None, ()) else label
        parts = [allowed, f"default: {shown}" if shown else ""]
        return f"({'; '.join(filter(None, parts))})" if any(parts) else ""

    return text, tyro.conf.arg(metavar=metavar(hint), help_behavior_hint=behind)


_TOLD = re.compile(
    r"(?P<text>.*?)[.;,]? (?:\((?i:default): (?P<a>[^()]+)\)|(?i:default): (?P<b>.+?))\.?", re.DOTALL
)
"""A help text whose last words say what happens where nothing is given."""


def _sizes_joined(argv: Sequence[str], kind: Any) -> list[str]:
    """Returns the arguments with the height and width of every size as one word.

    For tyro, a flag takes a fixed number of words, or all up to the next flag, also those that belong to no
    flag; a size takes a second word if that is a number.
    """
    names = [
        name.replace("_", "[-_]") for name, hint in _fields(kind) if ImageSize in (hint, *get_args(hint))
    ]
    height = re.compile(rf"--({'|'.join(names)})[ =]-?[0-9]+") if names else None
    words: list[str] = []
    for word in argv:
        before = " ".join(words[-2:]), "".join(words[-1:])  # --flag 64, or --flag=64
        if height and re.fullmatch("-?[0-9]+", word) and any(map(height.fullmatch, before)):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def _one_line(event: events.ParseErrorEvent) -> None:
    """Raise a rejected value as one line; other events, such as unknown flags, print tyro's suggestions."""
    if isinstance(event, events.InvalidChoice):
        choices = [choice for choice in event.choices if choice != "None"]
        listing = ", ".join(choices[:-1]) + " or " + choices[-1] if len(choices) > 1 else "".join(choices)
        raise BadInput(f"{_name(event.argument)} {event.value!r} must be {listing}")
    if isinstance(event, events.InstantiationFailure) and event.argument is not None:
        if event.message.startswith("Could not"):  # tyro, of tuples, with their types in Python's words
            kind, words = get_args(event.argument.field.type_stripped), re.findall("'([^']*)'", event.message)
            for word in words:  # a path says itself what is wrong with it
                if Path in kind:
                    local_path(word)
                elif Location in kind:
                    parse_location(word)
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
