"""Comparison of the description in a file with the one that its artifact and the settings give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coma.config.serialization import to_plain
from coma.messages import abridged
from coma.runtimes.model_spec import ModelSpec

_NAMED = 3


def description_fault(wanted: ModelSpec, found: ModelSpec) -> str | None:
    """Returns the fields of a file's description that differ from the wanted ones, or None."""
    ours, theirs = (dict(_fields(to_plain(spec))) for spec in (wanted, found))
    faults = [
        f"{name} is {theirs.get(name, 'missing')!r}, not {ours.get(name, 'missing')!r}"
        for name in dict.fromkeys((*ours, *theirs))
        if name not in ours or name not in theirs or ours[name] != theirs[name]
    ]
    return f"its description is wrong: {abridged(faults, _NAMED, '; ')}" if faults else None


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _fields(each, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _fields(each, f"{name}[{number}]")
    else:
        yield name, value
