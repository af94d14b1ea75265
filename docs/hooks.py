"""What `make docs` adds to the pages: the help of every command, signatures, formulas without JavaScript.

mkdocs calls the functions whose names begin with `on_` (see `hooks` in mkdocs.yml).
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # mkdocs starts with its own folder on the path

COMMANDS, MEMBERS = "<!-- commands -->", r"<!-- members of (\S+) -->"
FILE = r"<!-- file (\S+) -->"
FORMULA = r"```math\n(.*?)\n```"
EDGE = "─╭╮╰╯"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page with its placeholders and formulas filled in."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, "\n".join(command_pages()))
    markdown = re.sub(FILE, lambda found: f"```python\n{(ROOT / found[1]).read_text()}```", markdown)
    markdown = re.sub(MEMBERS, lambda found: "\n".join(members(found[1])), markdown)
    return re.sub(FORMULA, lambda found: formula(found[1]), markdown, flags=re.DOTALL)


def formula(latex: str) -> str:
    """Returns a formula as MathML, which browsers draw without a script."""
    return f'<div class="formula">{convert(latex, display="block")}</div>'


def members(module: str) -> Iterator[str]:
    """Yields mkdocstrings' directives for all classes and functions that a module lists in `__all__`."""
    for name in importlib.import_module(module).__all__:
        thing = getattr(importlib.import_module(module), name)
        if hasattr(thing, "__qualname__"):
            yield f"::: {thing.__module__}.{thing.__qualname__}\n"


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

    os.environ["COLUMNS"] = "100"
    for flag in ("--help-all", "--help"):
        out = StringIO()
        with redirect_stdout(out), redirect_stderr(StringIO()):
            code = main([*invocation, flag])
        if code == 0 and out.getvalue().strip():
            return "\n".join(unboxed(out.getvalue())).strip()
    raise RuntimeError(f"coma {' '.join(invocation)} has no help")


def unboxed(text: str) -> Iterator[str]:
    """Yields the lines of a help text, with headings in place of frames."""
    for line in text.splitlines():
        if line.startswith("╭"):
            yield f"\n{line.strip(EDGE + ' ')}:"
        elif line.startswith("│") and not set(line) <= set("│─ "):
            yield f"  {line.strip('│').rstrip()}".rstrip()
        elif not line.startswith(("╰", "│")):
            yield line.rstrip()
