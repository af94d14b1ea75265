"""Settings files in JSON, YAML and TOML: plain data, and the line on which every key stands.

The suffix decides about the format: `.yaml` or `.yml`, `.toml`, and JSON for all others. The files are not
trusted: YAML is read by PyYAML's safe loader, which builds plain values only, and a file that is too long, or
whose aliases multiply it, is refused before it is built.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from coma.errors import BadInput
from coma.preflight import check_regular_file

Key = tuple[str, ...]

MAX_BYTES = 2**18
"""Longest YAML or TOML file; the settings of a run take about 3,000 bytes."""
MAX_JSON_BYTES = 2**26
"""Longest JSON file: config.json of a fine-tuning run also holds the names of all its classes."""
_MAX_VALUES = 2**14
"""Most values of a YAML file, each counted as often as an alias repeats it."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2: `1e-3` is one; and without dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012 # PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def read_json(path: Path, wanted: str) -> Any:
    """Returns the content of a JSON file.

    Raises:
        BadInput: it cannot be read, or is no JSON; the message says what is `wanted` in its place.
    """
    text = _read(path, wanted)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of endless numbers
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise BadInput(f"{path}: not a readable config, its text is not JSON{where}; give {wanted}") from None


def read_settings(path: Path, wanted: str) -> tuple[Any, Callable[[], dict[Key, int]]]:
    """Returns the content of a settings file, and what finds the lines of its keys for a message.

    The lines of JSON take much longer to find than its content, so they are only found on a call:
    `("optimizer", "epochs")` to 7.

    Raises:
        BadInput: it cannot be read, is too long, or is not in the format of its suffix; the message names the
            line, and says what is `wanted` in its place.
    """
    suffix = path.suffix.lower()
    is_json = suffix not in (".yaml", ".yml", ".toml")
    most = MAX_JSON_BYTES if is_json else MAX_BYTES
    if path.is_file() and path.stat().st_size > most:
        raise BadInput(f"{path}: is longer than {most:,} bytes, so it holds no settings; give {wanted}")
    if is_json:
        return read_json(path, wanted), lambda: _json_lines(_read(path, wanted))
    text = _read(path, wanted)
    try:
        if suffix == ".toml":
            return tomllib.loads(text), lambda: _toml_lines(text)
        content, lines = _load_yaml(text)
        return content, lambda: lines
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Returns why a file is not YAML or TOML, in one line."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"not a readable settings file: {str(error).partition(chr(10))[0]}"
    mark = error.problem_mark
    where = f"line {mark.line + 1}: " if mark else ""
    return where + ", ".join(part for part in (error.context, error.problem) if part)


def _read(path: Path, wanted: str) -> str:
    check_regular_file(path, f"give {wanted}", must_exist=False)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise BadInput(f"{path}: {reason}; give {wanted}") from None
    except ValueError:
        raise BadInput(
            f"{path}: not a readable config, its bytes are not UTF-8 text; give {wanted}"
        ) from None


def _load_yaml(text: str) -> tuple[Any, dict[Key, int]]:
    loader, lines = _Loader(text), dict[Key, int]()
    try:
        node = loader.get_single_node()
        if node is None:
            return None, lines
        if _count(node, (), lines, {}) > _MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"its aliases make more than {_MAX_VALUES:,} values of it")
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


def _count(node: yaml.Node, key: Key, lines: dict[Key, int], counts: dict[yaml.Node, int]) -> int:
    """Returns the number of values under a node, aliases written out, and fills in the lines of its keys."""
    if node in counts:
        if not counts[node]:
            raise _problem("the value contains itself", node)
        return counts[node]
    counts[node] = 0
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_count(each, key, lines, counts) for each in node.value)
    elif isinstance(node, yaml.MappingNode):
        names = set()
        for name, value in node.value:
            if name.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise _problem("keys must be words, the names of settings", name)
            if name.value in names:
                raise _problem(f"the key {name.value} is there twice", name)
            names.add(name.value)
            lines[*key, name.value] = name.start_mark.line + 1
            total += _count(value, (*key, name.value), lines, counts)
    counts[node] = total
    return total


def _problem(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _json_lines(text: str) -> dict[Key, int]:
    """Returns the lines of keys; none of a long file, or where tabs at odd places make JSON no YAML."""
    if len(text) > MAX_BYTES:
        return {}
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        return _load_yaml(text)[1]
    return {}


def _toml_lines(text: str) -> dict[Key, int]:
    """Returns the lines of keys and tables; tomllib keeps none."""
    lines: dict[Key, int] = {}
    table: Key = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if found := re.match(r"\s*\[+([^\[\]]+)\]", line):
            table = _toml_key(found[1])
            lines[table] = number
        elif found := re.match(r"""\s*([\w."'-]+)\s*=""", line):
            lines[*table, *_toml_key(found[1])] = number
    return lines


def _toml_key(text: str) -> Key:
    return tuple(part.strip().strip("\"'") for part in text.split("."))
