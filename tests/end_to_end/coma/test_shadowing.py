"""A user's own pretrain.py, export.py, demo.py, downstream.py or coma.py in the current folder is not run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_files import save

from coma.cli import CHILD

THEIRS = ("pretrain", "export", "demo", "downstream")
COMMAND = (str(Path(sys.executable).with_name("coma")),)
ARGUMENTS = """pretrain images --out run --model tiny --image-size 32 --steps 1 --batch-size 4 --workers 2
--model.depths 1 1 1 1 --objective.decoder.depth 1 --device cpu --mean .5 .5 .5 --std .3 .3 .3"""
MODULE = (sys.executable, "-m", "coma")


@pytest.fixture
def folder(tmp_path):
    """A current folder with a file of the name of every room, each of which says that it was run."""
    for name in THEIRS:
        plant(tmp_path, name)
    return tmp_path


def plant(folder: Path, name: str) -> Path:
    file = folder / f"{name}.py"
    file.write_text(f"open({str(folder / 'ran')!r}, 'a').write({name!r})\n")
    return file


def run(command, *arguments, folder: Path, **env: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "OMP_NUM_THREADS": "1", **env},
    )


@pytest.mark.parametrize("command", [MODULE, COMMAND, CHILD])
def test_the_help_of_every_room_is_ours(folder, command):
    done = run(command, "--help", folder=folder)
    assert done.returncode == 0 and "Pre-train an encoder on a folder of images." in done.stdout, done.stderr
    for name in ("pretrain", "export"):
        done = run(command, name, "--help", folder=folder)
        assert done.returncode == 0 and "--out" in done.stdout, done.stderr
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("command", "theirs"),
    [
        pytest.param(MODULE, THEIRS, marks=pytest.mark.slow),
        pytest.param(CHILD, (*THEIRS, "coma"), marks=pytest.mark.slow),
        pytest.param(
            (sys.executable, "-m", "torch.distributed.run", "--standalone", *MODULE[1:]),
            THEIRS,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["python -m coma", "children of coma", "torchrun -m coma"],
)
def test_training_and_its_workers_are_ours(folder, command, theirs):
    for name in theirs:
        plant(folder, name)
    (folder / "images").mkdir()
    for number in range(8):
        save(folder / "images" / f"{number}.jpg")
    done = run(command, *ARGUMENTS.split(), folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "artifact" / "config.json").exists()
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", THEIRS)
def test_a_file_that_python_prefers_is_refused_by_name(tmp_path, name):
    file = plant(tmp_path, name)
    command = {"downstream": "detect"}.get(name, name)
    done = run(MODULE, command, "x", folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert (
        done.stderr.startswith(f"error: {file}: hides the package {name!r}") and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "ran").exists()
