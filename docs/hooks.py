"""What `make docs` adds to the pages: the help of every command, signatures, formulas without JavaScript.

mkdocs calls the functions whose names begin with `on_` (see `hooks` in mkdocs.yml).
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from pydoc import locate
from typing import Any, cast

import docstring_parser
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # mkdocs starts with its own folder on the path
from coma.ranges import ranges_of  # noqa: E402

COMMANDS, MEMBERS = "<!-- commands -->", r"<!-- members of (\S+) -->"
FIELDS = r"<!-- fields of (\S+) -->"
FILE = r"<!-- file (\S+) -->"
FORMULA = r"```math\n(.*?)\n```"
ROOMS = ("coma", "pretrain", "downstream", "export", "demo")
WIDTH = 88
EDGE = "─╭╮╰╯"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page with its placeholders and formulas filled in."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, "\n".join(command_pages()))
    markdown = re.sub(FILE, lambda found: f"```python\n{(ROOT / found[1]).read_text()}```", markdown)
    markdown = re.sub(MEMBERS, lambda found: "\n".join(members(found[1])), markdown)
    markdown = re.sub(FIELDS, lambda found: fields(cast("type", locate(found[1]))), markdown)
    return re.sub(FORMULA, lambda found: formula(found[1]), markdown, flags=re.DOTALL)


def formula(latex: str) -> str:
    """Returns a formula as MathML, which browsers draw without a script."""
    return f'<div class="formula">{convert(latex, display="block")}</div>'


def members(module: str) -> Iterator[str]:
    """Yields the settings, classes and functions that a module lists in `__all__`: tables, and directives."""
    for name in importlib.import_module(module).__all__:
        thing: Any = getattr(importlib.import_module(module), name)
        if dataclasses.is_dataclass(thing) and isinstance(thing, type):
            yield f"### {name}\n\n{fields(thing)}\n"
        elif getattr(thing, "__module__", "").partition(".")[0] in ROOMS:  # no constants, no types of Python
            yield f"::: {thing.__module__}.{thing.__qualname__}\n"


def fields(kind: type) -> str:
    """Returns a dataclass as a table: its fields, their defaults, and what their docstrings say."""
    described = [
        docstring_parser.parse_from_object(each) for each in kind.__mro__ if dataclasses.is_dataclass(each)
    ]
    texts = {param.arg_name: param.description or "" for each in reversed(described) for param in each.params}
    rows = ["| field | default | meaning |", "|---|---|---|"]
    ranges = ranges_of(kind)
    for field in dataclasses.fields(kind):
        text = re.sub(r"\s+", " ", texts.get(field.name, "")).replace("|", "\\|")
        text += f" ({ranges[field.name]})" if field.name in ranges else ""
        rows.append(f"| `{field.name}` | {default_of(field)} | {text} |")
    return f"{described[0].description or ''}\n\n" + "\n".join(rows)


def default_of(field: dataclasses.Field[Any]) -> str:
    """Returns the default of a field as code; that of nested settings by the name of their class."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return f"`{type(value).__name__}`" if dataclasses.is_dataclass(value) else f"`{value!r}`"
    if field.default is dataclasses.MISSING:
        return "required"
    return "" if field.default is None else f"`{field.default}`"


def command_pages() -> Iterator[str]:
    """Yields a section for every command and verb, with the text of its help."""
    from coma.cli import find_commands

    for name in find_commands():
        text = help_text(name)
        yield section(name, text)
        usage = re.split(r"\n\n(?!usage)", text)[0]
        for verb in dict.fromkeys(re.findall(rf"^(?:usage:)? *coma {name} ([a-z]+)\b", usage, re.MULTILINE)):
            yield section(f"{name} {verb}", help_text(name, verb))


def section(invocation: str, text: str) -> str:
    """Returns a command's help under a heading."""
    return f"## coma {invocation}\n\n```text\n{text}\n```\n"


def help_text(*invocation: str) -> str:
    """Returns what `coma ... --help-all` prints, or `--help` where that is all; without boxes."""
    from coma.cli import main

    os.environ["COLUMNS"] = str(WIDTH)
    for flag in ("--help-all", "--help"):
        out = StringIO()
        with redirect_stdout(out), redirect_stderr(StringIO()):
            code = main([*invocation, flag])
        if code == 0 and out.getvalue().strip():
            return re.sub(r"\n{3,}", "\n\n", "\n".join(unboxed(out.getvalue()))).strip()
    raise RuntimeError(f"coma {' '.join(invocation)} has no help")


def unboxed(text: str) -> Iterator[str]:
    """Yields the lines of a help text, wrapped, with a blank line before each group of flags."""
    lines = [line.strip("│").rstrip() for line in text.splitlines()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        is_title = line.startswith("╭") or (line.strip() and set(following.strip()) == {"-"})
        if is_title:
            yield f"\n{line.strip(EDGE + ' ')}:"
        elif not set(line) & set(EDGE) and set(line.strip()) != {"-"}:
            indent = " " * (len(line) - len(line.lstrip()))
            yield textwrap.fill(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
