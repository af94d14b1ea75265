"""A folder that serves the demo elsewhere: as a Space of Hugging Face, or as a container anywhere.

    app.py             starts the page with the models of the folder
    requirements.txt   this package and everything that it needs, in the versions of this environment
    *.whl              this package, packed from the files that are running
    models/            the artifacts: weights, config.json and, where there is one, the model card
    Dockerfile         builds the container; Spaces run it, too
    README.md          with the header that Spaces read

Spaces of the kind `gradio` are said to install requirements before their files are there, so that no wheel of
the folder can be among them; hence the kind `docker`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from string import Template

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from coma.errors import BadInput
from coma.paths import artifact_directory
from coma.rooms import DISTRIBUTION
from demo.models import Model, Models
from demo.session import slug
from demo.upload import HEIC

PACKAGES = ("coma", "pretrain", "downstream", "export", "demo")
CARD = "README.md"
"""File in an artifact that says what the model was trained on and what its weights may be used for."""
KINDS = ("backbone", "pretrained", "classifier")
"""Models that run without OpenMMLab, whose packages a container does not install from requirements alone."""
_CUDA = ("nvidia-", "cuda-", "triton")
"""Packages that PyTorch needs on GPUs only; its build for CPUs comes without them."""

_APP = Template('''"""Serves the demo with the models of this folder."""

import os
import sys
from pathlib import Path

from coma.cli import main

MODELS = $models
ADDRESS = ["--host", os.environ.get("HOST", "0.0.0.0"), "--port", os.environ.get("PORT", "7860")]

if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    sys.exit(main(["demo", *MODELS, *ADDRESS]))
''')
_DOCKERFILE = Template("""\
FROM python:$python-slim
RUN useradd --create-home --uid 1000 user
USER user
ENV PATH=/home/user/.local/bin:$$PATH
WORKDIR /home/user/app
# PyTorch's builds for CPUs; the empty string takes those for GPUs
ARG INDEX=https://download.pytorch.org/whl/cpu
COPY --chown=user requirements.txt *.whl ./
RUN pip install --no-cache-dir $${INDEX:+--extra-index-url} $${INDEX:+$$INDEX} --requirement requirements.txt
COPY --chown=user . .
EXPOSE 7860
CMD ["python", "app.py"]
""")
_README = Template("""\
---
title: CoMA-DyViT
emoji: 🧩
colorFrom: green
colorTo: blue
sdk: docker
app_port: 7860
short_description: Hide parts of a picture, see what the model predicts
---

# CoMA-DyViT

Hide parts of a picture and see what a model that was pre-trained without labels makes of the rest.

$models

To run it: `docker build -t coma-demo . && docker run --rm -p 7860:7860 coma-demo`, or, without
Docker, `pip install -r requirements.txt && python app.py`.

Everyone who can open the page can use it. Pictures stay on its server and are deleted within the hour.
""")


def write_space(out: Path, models: Models) -> list[str]:
    """Writes the folder.

    Args:
        out: Folder, which must be missing or empty.
        models: Models of the page.

    Returns:
        Names of what was written, in `out`.

    Raises:
        BadInput: the folder holds something, or a model is not one of `KINDS`.
    """
    chosen = [models[name] for name in models.names]
    for model in chosen:
        if model.artifact is None or model.kind not in KINDS:
            kind = f"a {model.kind}" if model.artifact else "an exported file"
            raise BadInput(f"--space: {model.name} is {kind}; give artifacts of {', '.join(KINDS)} models")
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: the folder is not empty; give a new one")
    out.mkdir(parents=True, exist_ok=True)
    places = _folders(chosen, out / "models")
    for model, place in zip(chosen, places, strict=True):
        _copy_artifact(model, place)
    extras = ["demo", *["heic"] * HEIC]
    wheel = write_wheel(out)
    own = f"./{wheel.name}[{','.join(extras)}]"
    files = {
        "app.py": _APP.substitute(models=[place.relative_to(out).as_posix() for place in places]),
        "requirements.txt": "\n".join([own, *pinned_requirements(extras), ""]),
        "Dockerfile": _DOCKERFILE.substitute(python=f"{sys.version_info.major}.{sys.version_info.minor}"),
        "README.md": _README.substitute(models="\n".join(map(_listed, chosen, places))),
        ".dockerignore": "README.md\nDockerfile\n",
    }
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return sorted(path.name for path in out.iterdir())


def write_wheel(folder: Path) -> Path:
    """Packs the installed package, as it is running here, as a wheel; returns its path."""
    about = metadata.distribution(DISTRIBUTION)
    stem = f"{DISTRIBUTION.replace('-', '_')}-{about.version}"
    content: dict[str, bytes] = {}
    for package in PACKAGES:
        (place,) = importlib.util.find_spec(package).submodule_search_locations  # pyright: ignore
        for path in sorted(Path(place).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content[f"{package}/{path.relative_to(place).as_posix()}"] = path.read_bytes()
    for name in ("METADATA", "entry_points.txt"):
        content[f"{stem}.dist-info/{name}"] = str(about.read_text(name)).encode()
    wheel = "Wheel-Version: 1.0\nGenerator: coma demo --space\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content[f"{stem}.dist-info/WHEEL"] = wheel.encode()
    rows = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in content.items()]
    content[f"{stem}.dist-info/RECORD"] = "".join([*rows, f"{stem}.dist-info/RECORD,,\n"]).encode()
    file = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(file, "x", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # dated alike every time
    return file


def pinned_requirements(extras: list[str]) -> list[str]:
    """Returns `NAME==VERSION` for everything that this package needs, as it is installed here, sorted."""
    found: dict[str, str] = {}
    waiting = [(DISTRIBUTION, frozenset(extras))]
    seen = set(waiting)
    while waiting:
        name, wanted = waiting.pop()
        about = metadata.distribution(name)
        for text in about.requires or ():
            each = Requirement(text)
            key = canonicalize_name(each.name)
            if key.startswith(_CUDA) or not _applies(each, wanted):
                continue
            if key != DISTRIBUTION:
                found[key] = metadata.version(each.name).partition("+")[0]
            following = (key, frozenset(each.extras) | (wanted if key == DISTRIBUTION else frozenset()))
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _folders(models: Sequence[Model], within: Path) -> list[Path]:
    """Returns a folder for each of the models, with a number where its name has the letters of another's."""
    folders: list[Path] = []
    for model in models:
        name = slug(model.name)
        names = (name, *(f"{name}-{number}" for number in range(2, len(models) + 1)))
        folders.append(next(folder for each in names if (folder := within / each) not in folders))
    return folders


def _copy_artifact(model: Model, place: Path) -> None:
    place.mkdir(parents=True)
    source = artifact_directory(str(model.artifact))
    for name in ("config.json", "model.safetensors", *[CARD] * (source / CARD).is_file()):
        shutil.copyfile(source / name, place / name)


def _listed(model: Model, place: Path) -> str:
    """Returns a line for the model, with a link to its card, in a file beside the folder of the models."""
    card = f" ([model card]({place.parent.name}/{place.name}/{CARD}))" if (place / CARD).is_file() else ""
    return f"- {model.name}: {model.label}{card}"


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
