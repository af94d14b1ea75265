"""Which runtimes there are for a model, and why others are not.

An exported file is offered only if `manifest.json` beside it lists it as verified, with the hash that the
file has, and names the artifact by its hash: nothing that was refused, changed or mixed up runs
under the artifact's name.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.description import Form
from export.manifest import NAME as MANIFEST
from export.runtimes.open import Device
from pretrain.errors import BadInput, ComaError
from pretrain.hashing import sha256_of

SUFFIXES = {".onnx": "ONNX Runtime", ".engine": "TensorRT"}


@dataclass(frozen=True)
class Offer:
    """One way to run one form of a model, or why it cannot be run.

    Attributes:
        title: "PyTorch", "ONNX Runtime fp16".
        form: What the model is used as.
        path: Artifact or file; None where there is none.
        device: As `open_runtime` takes it.
        reason: Why it is not available; None if it is.
    """

    title: str
    form: Form
    path: Path | None
    device: Device = "cpu"
    reason: str | None = None


@dataclass(frozen=True)
class Exported:
    """A verified file, as its manifest has it.

    Attributes:
        path: The file.
        form: What it is.
        precision: Of its products.
        source: SHA-256 of the artifact's weights.
        kind: Of the artifact.
    """

    path: Path
    form: Form
    precision: str
    source: str
    kind: str


def exported_files(folder: Path) -> Iterator[Exported]:
    """What a folder of exports says it holds; files that are not there are left out.

    Raises:
        BadInput: no manifest, or one that cannot be read.
    """
    path = folder / MANIFEST
    try:
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        entries = [
            Exported(folder / each["file"], each["form"], each["precision"], plain["source"], plain["kind"])
            for each in plain["files"]
        ]
    except FileNotFoundError:
        raise BadInput(f"{folder}: no {MANIFEST}; `coma export` makes one, with the files") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not readable ({error!r}); export again") from None
    yield from (entry for entry in entries if entry.path.is_file())


def verified_file(path: Path) -> Exported:
    """One file that was given by name.

    Raises:
        BadInput: it is missing, was never verified, or has changed since.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    for entry in exported_files(path.parent):
        if entry.path.name == path.name:
            reason = check_content(entry)
            if reason:
                raise BadInput(f"{path}: {reason}")
            return entry
    raise BadInput(f"{path}: {MANIFEST} beside it does not list it as verified; export it again")


def check_content(entry: Exported) -> str | None:
    """Why a file is not what its manifest verified; None if it is."""
    plain = json.loads((entry.path.parent / MANIFEST).read_text(encoding="utf-8"))
    listed = next(each["sha256"] for each in plain["files"] if each["file"] == entry.path.name)
    if sha256_of(entry.path) == listed:
        return None
    return f"is not the file that {MANIFEST} verified; export it again"


def offers_of(entries: list[Exported], form: Form, artifact: Path | None, device: Device) -> list[Offer]:
    """All runtimes for one form, those that are not available last.

    Args:
        entries: Files of the same weights.
        form: What the model is used as.
        artifact: Its directory, if it was given.
        device: For PyTorch and ONNX Runtime.
    """
    offers = []
    if artifact is not None:
        offers.append(Offer("PyTorch", form, artifact, device))
    else:
        offers.append(Offer("PyTorch", form, None, reason="the artifact itself was not named at the start"))
    for suffix, library in SUFFIXES.items():
        files = [entry for entry in entries if entry.form == form and entry.path.suffix == suffix]
        offers += [_offer(entry, library, device) for entry in files]
        if not files:
            offers.append(Offer(library, form, None, reason=_how_to_make(suffix, artifact)))
    return sorted(offers, key=lambda offer: offer.reason is not None)


def _offer(entry: Exported, library: str, device: Device) -> Offer:
    precision = "" if entry.precision == "fp32" else f" {entry.precision}"
    where: Device = "cuda" if entry.path.suffix == ".engine" else device
    reason = _missing(entry.path.suffix) or check_content(entry)
    return Offer(f"{library}{precision}", entry.form, entry.path, where, reason)


def _missing(suffix: str) -> str | None:
    """What this machine lacks for files of a kind."""
    if suffix == ".onnx":
        there = importlib.util.find_spec("onnxruntime") is not None
        return None if there else "ONNX Runtime is not installed here; pip install onnxruntime"
    from export.tensorrt.library import require_gpu, require_package

    try:
        require_package("tensorrt")
        require_gpu(0)
    except ComaError as error:
        return str(error)
    return None


def _how_to_make(suffix: str, artifact: Path | None) -> str:
    name = artifact.name if artifact else "ARTIFACT"
    if suffix == ".onnx":
        return f"no exported file; coma export {name} makes one"
    return f"no engine; coma export {name} --to onnx,tensorrt makes one, on a machine with an NVIDIA GPU"
