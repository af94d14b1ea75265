"""Helpers for messages: counts with nouns, shortened lists, names with any characters."""

from __future__ import annotations

from collections.abc import Sequence

from coma.errors import BadInput


def counted(count: int, one: str, many: str = "") -> str:
    """Returns the count with its noun: `1 image`, `2,000 images`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def abridged(texts: Sequence[str], most: int = 10, between: str = ", ") -> str:
    """Returns the first texts, and how many more there are."""
    return between.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def printable(text: str) -> str:
    """Returns the text on one line: what is no printable character is written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_formulas(text: str) -> str:
    """Returns a text for matplotlib that draws it as it is: two `$` would begin and end a formula."""
    return text.replace("$", r"\$")


def parse_names(text: str, known: Sequence[str], flag: str) -> tuple[str, ...]:
    """Splits a list of names at commas and drops repetitions.

    Raises:
        BadInput: no name, or one that is not in `known`.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names or not set(names) <= set(known):
        raise BadInput(f"{flag} {text!r}: give some of {', '.join(known)}, separated by commas")
    return names
