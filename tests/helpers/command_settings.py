"""The settings of every command, found by asking each for its help: dataclasses, flags, ranges."""

import dataclasses
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import tyro

from coma import cli
from coma.image_size import ImageSize
from coma.ranges import Range

ACTIONS = {name: ("train", "test", "predict") for name in ("classify", "detect", "segment")}
VARIANTS = {
    "pretrain": [
        *([], ["--model", "vit-tiny"]),
        *(["--method", name] for name in ("mae", "beyond", "cmt", "coma-balanced")),
    ]
}
"""Arguments that bring further flags."""

MISSING = "no-such-place"
NEEDED = {
    "pretrain": [MISSING, "--out", "{out}/run"],
    "evaluate": [MISSING, "--data", MISSING],
    "compare": [MISSING, "--test", MISSING, "--budget", "images", "100", "--out", "{out}/compare"],
    "info": [MISSING],
    "pack": [MISSING, "--out", "{out}/packed"],
    "degrade": [MISSING, "--out", "{out}/sheet.png"],
    "quickstart": ["--out", __file__],
    "classify train": [MISSING, "--data", MISSING, "--out", "{out}/run"],
    "classify test": [MISSING, "--data", MISSING],
    "classify predict": [MISSING, MISSING, "--out", "{out}/found"],
    "embed": [MISSING, MISSING, "--out", "{out}/features.parquet"],
    "search": [MISSING, MISSING],
    "detect train": [MISSING, "--data", MISSING, "--out", "{out}/run"],
    "detect test": [MISSING, "--data", MISSING],
    "detect predict": [MISSING, MISSING, "--out", "{out}/found"],
    "segment train": [MISSING, "--data", MISSING, "--out", "{out}/run"],
    "segment test": [MISSING, "--data", MISSING],
    "segment predict": [MISSING, MISSING, "--out", "{out}/found"],
    "export": [MISSING, "--out", "{out}/export"],
    "benchmark": [MISSING],
    "demo": [MISSING],
}
"""Arguments with which a command stops as soon as it looks for what it was given."""
STOPS = (MISSING, Path(__file__).name)
"""What its message then names."""


def invocations() -> list[str]:
    """Every command, and every action of those that have some."""
    names = cli.find_commands()
    return [f"{name} {action}".strip() for name in names for action in ACTIONS.get(name, ("",))]


def arguments(invocation: str, out: Path) -> list[str]:
    """The arguments that make it stop early; what it might write lies in `out`."""
    return [*invocation.split(), *(word.format(out=out) for word in NEEDED[invocation])]


@cache
def settings_of(invocation: str, variant: tuple[str, ...] = ()) -> tuple[type, ...]:
    """The dataclasses from which the command makes its flags, in the order of its help."""
    kinds: list[Any] = []
    real = tyro.cli

    def recording(kind: Any, **options: Any) -> Any:
        if options.get("return_unknown_args"):  # a first look at some of the flags
            return real(kind, **options)
        kinds.append(kind)
        return real(kind, **options)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(tyro, "cli", recording)
        assert cli.main([*invocation.split(), *variant, "--help"]) == 0
    return tuple(dict.fromkeys(part for kind in kinds for part in dataclasses_in(kind)))


def dataclasses_in(kind: Any) -> Iterator[type]:
    """A dataclass and all that its fields hold, also behind unions and annotations; without fixed fields."""
    if "Fixed" in str(get_args(kind)[1:] if get_origin(kind) is Annotated else ""):
        return
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        yield kind
        hints = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            yield from dataclasses_in(hints[field.name])
    for part in get_args(kind):
        yield from dataclasses_in(part)


def numeric_fields(kind: type) -> dict[str, tuple[Any, Range | None]]:
    """Fields of a dataclass that hold numbers, with their types and ranges."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for field in dataclasses.fields(kind):
        extras = getattr(hints[field.name], "__metadata__", ())
        ranges = [extra for extra in extras if isinstance(extra, Range)]
        if holds_numbers(hints[field.name]):
            found[field.name] = (hints[field.name], ranges[0] if ranges else None)
    return found


NUMERIC = (int, float, ImageSize)
"""Types whose flags take a number; an image size takes one, or two."""


def holds_numbers(kind: Any) -> bool:
    """Whether a type is a number, or a union, tuple or annotation of some."""
    if kind in NUMERIC:
        return True
    inside = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    return any(holds_numbers(part) for part in inside if isinstance(part, type) or get_args(part))


def flags_of(invocation: str) -> dict[str, tuple[Any, Range | None, list[str]]]:
    """Every numeric flag of a command: its type, its range, the arguments that bring it."""
    found: dict[str, tuple[Any, Range | None, list[str]]] = {}
    for variant in VARIANTS.get(invocation, [[]]):
        for kind in settings_of(invocation, tuple(variant)):
            prefix = getattr(kind, "flags", "--")
            for name, (hint, allowed) in numeric_fields(kind).items():
                found.setdefault(prefix + name.replace("_", "-"), (hint, allowed, variant))
    return found


def words(hint: Any, text: str) -> list[str]:
    """`text` in the place of every number that a flag of this type takes."""
    if get_origin(hint) is Annotated:
        return words(get_args(hint)[0], text)
    members = [part for part in get_args(hint) if part not in (NoneType, Ellipsis)]
    if hint in NUMERIC:
        return [text]
    if get_origin(hint) is tuple:
        return [word for part in members for word in words(part, text)]
    if holds_numbers(hint):
        return words(next(part for part in members if holds_numbers(part)), text)
    return [str(members[0])]  # a choice
