"""Command lines: what `--help` shows and leaves out, and the parts of tyro that are not public."""

import inspect
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from tyro import _errors

from coma.arguments import parse_arguments
from coma.errors import BadInput
from coma.ranges import RARE, Range, Ranged


@dataclass(frozen=True)
class Inner(Ranged):
    """Inner settings."""

    depth: Annotated[int, Range(1, 9)] = 3
    """Blocks."""
    width: int = 8


@dataclass(frozen=True)
class Base(Ranged):
    """Base of the settings."""

    images: Annotated[Path, tyro.conf.Positional]
    """Folder of images."""
    epochs: Annotated[float, Range(0, 100, above=True)] = 100.0
    """Passes over the data, a text that is long enough to be written on
    two lines."""


@dataclass(frozen=True)
class Settings(Base):
    """All settings."""

    workers: Annotated[int | None, Range(0, 64)] = None
    """Processes; default: one per core"""
    channels: int | None = None
    """Channels of the images (default: 3)."""
    mean: Annotated[tuple[float, ...] | None, RARE] = None
    """Mean of every channel."""
    scale: Annotated[tuple[float, float], tyro.conf.arg(metavar="MIN MAX")] = (0.2, 1.0)
    device: Literal["auto", "cuda", "cpu"] | None = None
    """Where to compute."""
    name: Annotated[str, RARE] = "a"
    flip: bool = True
    rates: tuple[float, ...] = ()
    """Rates to try; default: as it is."""
    inner: Annotated[Inner, RARE] = field(default_factory=Inner)


def shown(argv: list[str], capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "78")
    with pytest.raises(SystemExit) as stop:
        parse_arguments(Settings, argv, prog="coma try")
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_leaves_out_what_is_rare(capsys, monkeypatch):
    text = shown(["--help"], capsys, monkeypatch)
    for flag in ("--mean", "--name", "--inner"):
        assert flag not in text
    assert text.endswith("coma try --help-all shows 4 more flags.")
    everything = shown(["--help-all"], capsys, monkeypatch)
    for flag in ("--mean X ...", "--name TEXT", "--inner.depth N Blocks. (1 to 9; default: 3)", "--epochs"):
        assert flag in everything
    assert "--help-all" not in everything


def test_rare_flags_are_read_as_all_others():
    given = parse_arguments(Settings, ["PHOTOS", "--mean", "1", "2", "--inner.depth", "4"], prog="coma try")
    assert given == Settings(Path("PHOTOS"), mean=(1.0, 2.0), inner=Inner(4))
    default = Settings(Path("PHOTOS"), name="b", inner=Inner(5))
    given = parse_arguments(Settings, ["--inner.width", "9"], prog="coma try", default=default)
    assert given == Settings(Path("PHOTOS"), name="b", inner=Inner(5, 9))


def test_help_shows_one_default_and_words(capsys, monkeypatch):
    text = shown(["--help-all"], capsys, monkeypatch)
    for part in (
        "IMAGES Folder of images. (required)",
        "--epochs X Passes over the data, a text that is long enough to be written on two lines. "
        "(more than 0 and at most 100; default: 100)",
        "--workers N Processes. (0 to 64; default: one per core)",
        "--channels N Channels of the images. (default: 3)",
        "--mean X ... Mean of every channel. ",
        "--scale MIN MAX (default: 0.2 1)",
        "--device {auto,cuda,cpu} Where to compute. ",
        "--flip, --no-flip (default: on)",
        "--rates X ... Rates to try. (default: as it is)",
    ):
        assert part in text
    assert "none" not in text.lower().replace("none of", "")


@pytest.mark.parametrize("wrong", [["--inner.depth", "10"], ["--scale", "1"], ["--device", "gpu"], []])
def test_what_does_not_fit_is_one_line(wrong):
    with pytest.raises(BadInput) as refused:
        parse_arguments(Settings, ["PHOTOS", *wrong] if wrong else [], prog="coma try")
    assert "\n" not in str(refused.value)


def test_short_help_of_pretrain_fits_on_two_screens():
    command = [sys.executable, "-m", "coma", "pretrain", "--help"]
    env = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    lines = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 100
    assert sum(line.startswith("│ --") for line in lines) == 18


def test_what_is_not_public_in_tyro_is_still_there():
    """`coma.arguments` reports errors by a hook that tyro keeps to itself."""
    assert [*inspect.signature(_errors.on_parse_error).parameters] == ["hook"]
    events = {"InvalidChoice": "choices", "InstantiationFailure": "message", "BadValue": "reason"}
    for name, part in (events | {"MissingArgs": "missing_arguments"}).items():
        assert part in getattr(_errors, name).__dataclass_fields__
