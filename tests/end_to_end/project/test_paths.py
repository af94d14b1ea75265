"""Every path of every command, found from the commands themselves, with places that are something else."""

import dataclasses
import inspect
import os
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import tyro
from command_settings import MISSING, VARIANTS, invocations, settings_of
from export_files import backbone
from feature_files import features, vectors
from PIL import Image

from coma import cli
from coma.errors import BadInput
from coma.paths import local_path

BASES: dict[str, tuple[list[str], dict[str, str]]] = {
    "pretrain": (
        ["{photos}"],
        {"--out": "{out}/run", "--steps": "1", "--device": "cpu", "--image-size": "64"},
    ),
    "evaluate": (["{artifact}"], {"--data": "{photos}", "--device": "cpu"}),
    "classify train": (["{artifact}"], {"--data": "{photos}", "--out": "{out}/run", "--device": "cpu"}),
    "classify test": (["{artifact}"], {"--data": "{photos}", "--device": "cpu"}),
    "classify predict": (["{artifact}", "{photos}"], {"--out": "{out}/found", "--device": "cpu"}),
    "compare": (
        ["{photos}"],
        {"--test": "{photos}", "--budget": "images 9", "--out": "{out}/compare", "--device": "cpu"},
    ),
    "pack": (["{photos}"], {"--out": "{out}/packed", "--workers": "0"}),
    "degrade": (["{photos}/train/a/0.png"], {"--out": "{out}/sheet.png", "--draws": "1"}),
    "quickstart": ([], {}),
    "embed": (["{artifact}", "{photos}"], {"--out": "{out}/f.npz", "--device": "cpu", "--workers": "0"}),
    "search": (["{features}"], {"--outliers": "1"}),
    "detect train": (["{artifact}"], {"--data": "{photos}", "--out": "{out}/run"}),
    "detect test": (["{artifact}"], {"--data": "{photos}"}),
    "detect predict": (["{artifact}", "{photos}"], {"--out": "{out}/found"}),
    "segment train": (["{artifact}"], {"--data": "{photos}", "--out": "{out}/run"}),
    "segment test": (["{artifact}"], {"--data": "{photos}"}),
    "segment predict": (["{artifact}", "{photos}"], {"--out": "{out}/found"}),
    "export": (["{artifact}"], {"--out": "{out}/export", "--benchmark-seconds": "0"}),
    "benchmark": (["{artifact}"], {}),
    "info": (["{artifact}"], {}),
    "demo": (["{artifact}"], {"--port": "0", "--device": "cpu"}),
}
WRITTEN = ("--out", "--run")
"""Flags of what is written; all other paths are read."""


@pytest.fixture(autouse=True, scope="module")
def read_sources_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", cache(inspect.getsource))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A folder of an artifact, labelled photographs, and things that are neither."""
    root = tmp_path_factory.mktemp("places")
    backbone(root / "artifact")
    features(root / "features.npz", vectors(3))
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / "photos" / split / name).mkdir(parents=True)
            for number in range(2):
                noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / "photos" / split / name / f"{number}.png")
    for name in ("mae.pth", "model.onnx", "photos.zip", "notes.txt"):
        (root / name).write_bytes(b"neither an artifact nor images \xff")
    (root / "empty").mkdir()
    (root / "self").mkdir()
    (root / "self" / "loop").symlink_to("loop")
    return root


AS_THEY_ARE = ("", "x" * 300, "s3://bucket/x", "/dev/null", "/proc/nowhere/run")
READ = ("nothing", "self/loop", "mae.pth", "model.onnx", "photos.zip", "notes.txt", "empty", *AS_THEY_ARE[:4])
WRITE = ("self/loop", "notes.txt/inside", *AS_THEY_ARE)


def paths_of(invocation: str) -> dict[str, tuple[str | int, list[str]]]:
    """Every path of a command: its flag, or its position; and the arguments that bring it."""
    found: dict[str, tuple[str | int, list[str]]] = {}
    for variant in VARIANTS.get(invocation, [[]]):
        position = 0
        for kind in settings_of(invocation, tuple(variant)):
            prefix = getattr(kind, "flags", "--")
            hints = get_type_hints(kind, include_extras=True)
            for field in dataclasses.fields(kind):
                notes = getattr(hints[field.name], "__metadata__", ())
                positional = tyro.conf.Positional in notes
                position += positional
                if not _holds_paths(hints[field.name]):
                    continue
                if positional:
                    found.setdefault(field.name, (position - 1, variant))
                else:
                    named = next((note.name for note in notes if getattr(note, "name", None)), field.name)
                    flag = prefix + named.strip("_").replace("_", "-")
                    found.setdefault(flag, (flag, variant))
    return found


def _holds_paths(hint: Any) -> bool:
    return hint is Path or any(_holds_paths(part) for part in get_args(hint))


def test_every_command_has_paths():
    assert set(BASES) == set(invocations())
    assert all(paths_of(invocation) for invocation in invocations())
    assert sum(len(paths_of(invocation)) for invocation in invocations()) > 40


QUICK = ("pack", "degrade")


@pytest.mark.parametrize(
    "invocation",
    [pytest.param(each, marks=[pytest.mark.slow] * (each not in QUICK)) for each in invocations()],
)
def test_places_that_are_something_else_are_one_line(invocation, places, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.walk(places))
    for name, (where, variant) in paths_of(invocation).items():
        positions, flags = BASES[invocation]
        for given in WRITE if where in WRITTEN else READ:
            place = (
                given if not given or (given[0] in "/xsh" and given != "self/loop") else str(places / given)
            )
            filled = {flag: _fill(text, places, tmp_path) for flag, text in flags.items()}
            words = [_fill(text, places, tmp_path) for text in positions]
            if isinstance(where, int):
                words[where : where + 1] = [place]
            else:
                filled[where] = place
            options = [word for flag, text in filled.items() for word in (flag, *(text.split() or [""]))]
            code = cli.main([*invocation.split(), *words, *variant, *options])
            *_, message = capsys.readouterr().err.splitlines(keepends=True)  # others tell of progress
            told = f"coma {invocation}, {name} {place!r}: {code} {message}"
            assert code in (1, 2), told
            assert message.startswith("error: "), told
            assert not any(word in message for word in ("Traceback", "None", "Errno", "fault of")), told
    assert sorted(os.walk(places)) == before
    assert not list(tmp_path.iterdir())


def _fill(text: str, places: Path, out: Path) -> str:
    names = {"photos": "photos", "artifact": "artifact", "features": "features.npz"}
    return text.format(out=out, **{name: places / place for name, place in names.items()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://bucket/x", "s3://bucket/x: only images are read from remote storage; here, give a path"),
        ("https://host/x.zip", "only images are read from remote storage"),
        ("https://host/x.zip?key=hush", r"https://host/x.zip\?\*\*\*: only images are read"),
        ("hf://datasets/x", r"hf download"),
        ("gs:/bucket", "only images are read from remote storage"),
        ("", "'' names no file or folder"),
        (" ", "names no file or folder"),
        ("a\0b", "NUL"),
    ],
)
def test_what_is_no_local_path_says_what_to_do(text, message):
    with pytest.raises(BadInput, match=message):
        local_path(text)


def test_local_paths_may_look_odd():
    for text in ("a:b", "C:/photos", "./s3", "-", "~", MISSING):
        assert local_path(text) == Path(text)


@pytest.mark.parametrize("command", [["export"], ["evaluate", "--data", "photos"], ["pretrain"]])
def test_links_in_a_circle_and_remote_addresses_are_refused_by_every_command(tmp_path, capsys, command):
    name, *rest = command
    (tmp_path / "loop").symlink_to("loop")
    remote = "reading s3:// needs a package" if name == "pretrain" else "only images are read from remote"
    for path, message in (
        (str(tmp_path / "loop" / "x"), "its symbolic links lead in a circle"),
        ("s3://bucket/x", remote),
    ):
        assert cli.main([name, path, *rest, "--out", str(tmp_path / "out")]) == 2
        assert f"{path}: {message}" in capsys.readouterr().err
