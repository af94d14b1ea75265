"""The wheel, built and installed into empty environments, outside the repository: what a user gets from pip.

Versions are those of requirements.lock, so that uv links them from its cache; it downloads the rest.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_files import save

ROOT = Path(__file__).parents[3]
UV = Path(sys.executable).with_name("uv")
PRETRAIN = """pretrain images --out run --model tiny --image-size 32 --steps 2 --batch-size 4 --workers 0
--model.depths 1 1 1 1 --objective.decoder.depth 1 --device cpu --mean .5 .5 .5 --std .3 .3 .3"""
EXPORT = "export run/artifact --out exports --graph encoder --benchmark-seconds 0"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def call(*command: object, cwd: Path) -> str:
    hidden = ("PYTHONPATH", "PYTHONSAFEPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    call(UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", out, ROOT, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def constraints(tmp_path_factory) -> Path:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = [match[0] for line in lines if (match := re.match(r"[\w.-]+==[^\s\\]+( ;[^\\]*)?", line))]
    file = tmp_path_factory.mktemp("lock") / "constraints.txt"
    file.write_text("\n".join(pinned) + "\n")
    return file


def install(folder: Path, wheel: Path, constraints: Path, extras: str = "") -> Path:
    """Returns the `coma` of a new environment that holds the wheel and what it needs."""
    call(UV, "venv", "--python", sys.executable, folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    options = ("--python", python, "--constraint", constraints)
    call(UV, "pip", "install", *options, f"coma-dyvit{extras} @ {wheel.as_uri()}", cwd=folder.parent)
    return folder / "bin" / "coma"


def images(folder: Path) -> None:
    (folder / "images").mkdir()
    for number in range(8):
        save(folder / "images" / f"{number}.jpg")


def test_core_dependencies_alone_pretrain(tmp_path, wheel, constraints):
    coma = install(tmp_path / "env", wheel, constraints)
    images(tmp_path)
    assert "2 steps" in call(coma, *PRETRAIN.split(), cwd=tmp_path)
    assert "checksums  match" in call(coma, "info", "run/artifact", cwd=tmp_path)
    python = coma.with_name("python")
    assert "encoder and decoder" in call(coma, "info", "tiny-64", cwd=tmp_path)
    code = "import coma; print(coma.load_encoder('run/artifact').artifact.image_size)"
    assert call(python, "-c", code, cwd=tmp_path) == "32\n"
    refused = subprocess.run([coma, "export", "run/artifact"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and "coma-dyvit[export]" in refused.stderr


def test_all_extras_export(tmp_path, wheel, constraints):
    coma = install(tmp_path / "env", wheel, constraints, "[all]")
    images(tmp_path)
    call(coma, *PRETRAIN.split(), cwd=tmp_path)
    call(coma, *EXPORT.split(), cwd=tmp_path)
    listed = call(coma, "info", "exports", cwd=tmp_path)
    assert "verified; encoder, fp32" in listed
