"""Which runtimes there are for a model, and why others are not.

An exported file is offered only if `manifest.json` beside it lists it as verified, with the hash that the
file has, and names the artifact by its hash: nothing that was refused, changed or mixed up runs
under the artifact's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from coma.atomic_io import sha256_of
from coma.errors import BadInput
from coma.runtimes.manifest import NAME as MANIFEST
from coma.runtimes.manifest import Manifest
from coma.runtimes.model_spec import GraphKind
from coma.runtimes.open import Device

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
    form: GraphKind
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
        sha256: That it had when it was verified.
        source: SHA-256 of the artifact's weights.
        kind: Of the artifact.
    """

    path: Path
    form: GraphKind
    precision: str
    sha256: str
    source: str
    kind: str

    @cached_property
    def changed(self) -> str | None:
        """Why it is not the file that was verified; None if it is. Read once."""
        if sha256_of(self.path) == self.sha256:
            return None
        return f"is not the file that {MANIFEST} verified; export it again"


def exported_files(folder: Path) -> Iterator[Exported]:
    """What a folder of exports says it holds; files that are not there are left out.

    Raises:
        BadInput: no manifest, or one that cannot be read.
    """
    manifest = Manifest.read(folder, "export again")
    if manifest is None:
        raise BadInput(f"{folder}: no {MANIFEST}; `coma export` makes one, with the files")
    for each in manifest.files:
        path = folder / each.file
        if path.is_file():
            yield Exported(path, each.graph, each.precision, each.sha256, manifest.source, manifest.kind)


def verified_file(path: Path) -> Exported:
    """One file that was given by name.

    Raises:
        BadInput: it is missing, was never verified, or has changed since.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    for entry in exported_files(path.parent):
        if entry.path.name == path.name:
            if entry.changed:
                raise BadInput(f"{path}: {entry.changed}")
            return entry
    raise BadInput(f"{path}: {MANIFEST} beside it does not list it as verified; export it again")


def offers_of(entries: list[Exported], form: GraphKind, artifact: Path | None, device: Device) -> list[Offer]:
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
    title = library if entry.precision == "fp32" else f"{library} {entry.precision}"
    try:
        where = _place(entry.path.suffix, device)
    except BadInput as error:
        return Offer(title, entry.form, entry.path, reason=str(error))
    if where == "cpu" and device != "cpu":
        title += " on the CPU"
    return Offer(title, entry.form, entry.path, where, entry.changed)


def _place(suffix: str, device: Device) -> Device:
    """Where files of a kind run: engines on a GPU, others on `device` if this ONNX Runtime can, or the CPU.

    Raises:
        BadInput: what this machine lacks for them.
    """
    if suffix == ".onnx":
        from coma.runtimes.onnxruntime import providers

        return device if device in providers() else "cpu"
    from coma.runtimes.tensorrt.discovery import require_gpu, require_package

    require_package("tensorrt")
    require_gpu(0)
    return "cuda"


def _how_to_make(suffix: str, artifact: Path | None) -> str:
    name = artifact.name if artifact else "ARTIFACT"
    if suffix == ".onnx":
        return f"no exported file; coma export {name} makes one"
    return f"no engine; coma export {name} --to onnx,tensorrt makes one, on a machine with an NVIDIA GPU"
