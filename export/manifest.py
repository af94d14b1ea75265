"""`manifest.json`: what lies in a folder of exports, what was measured of it, and what was refused."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.artifact import library_versions
from pretrain.errors import BadInput

NAME = "manifest.json"
FORMAT_VERSION = 2
_LIBRARIES = (
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13-libs",
)


@dataclass
class Entry:
    """One file.

    Attributes:
        file: Its name in the folder.
        form: encoder, reconstructor, classifier, segmentor or detector.
        precision: Of its products.
        runtime: Who ran it when it was verified.
        sha256: Of the file.
        bytes: Its size, weights included.
        parameters: Of the model.
        shapes: Least, usual and most, as asked for.
        tolerances: The limits it was held to.
        verification: What the gate found (see `export.verify.check.Verdict.plain`).
        images: That it was compared on, for people.
        metric: Scores in percent, of PyTorch (`torch`) and of the file (`file`); empty without labels.
        latency: By shape, of the file and of PyTorch: compute and end to end, milliseconds.
        numbers: Which operators and weights have which precision.
        error: Where a refused file begins to differ.
        machine: That measured it.
        versions: Of Python and of all libraries that had a part in it.
    """

    file: str
    form: str
    precision: str
    runtime: str
    sha256: str
    bytes: int
    parameters: int
    shapes: list[str]
    tolerances: dict[str, float]
    verification: dict[str, Any]
    images: str
    metric: dict[str, dict[str, float]] = field(default_factory=dict)
    latency: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: versions())


@dataclass
class Manifest:
    """A folder of exports."""

    artifact: str
    source: str
    kind: str
    files: list[Entry] = field(default_factory=list)
    rejected: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry, passed: bool) -> None:
        """Put in a file, in place of what was known of one of its name.

        A refused one is not in the way of one that passed before: that one keeps its name and its entry.
        """
        for entries in (self.files, self.rejected) if passed else (self.rejected,):
            entries[:] = [known for known in entries if _name(known) != _name(entry)]
        (self.files if passed else self.rejected).append(entry)

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        plain = {"format_version": FORMAT_VERSION, **asdict(self)}
        temporary = folder / (NAME + ".part")
        temporary.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / NAME)

    @classmethod
    def of(cls, folder: Path, artifact: str, source: str, kind: str) -> Manifest:
        """What the folder already holds of the same artifact, or an empty one.

        Raises:
            BadInput: the folder holds exports of another artifact, or of another version of this program.
        """
        fresh = cls(artifact, source, kind)
        try:
            plain = json.loads((folder / NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return fresh
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder / NAME}: not readable ({error}); choose another --out") from None
        version = plain.get("format_version") if isinstance(plain, dict) else None
        if version != FORMAT_VERSION:
            raise BadInput(
                f"{folder / NAME}: of format {version}, and this program writes {FORMAT_VERSION}; choose "
                "another --out"
            )
        if plain.get("source") != source:
            raise BadInput(f"{folder}: holds exports of another artifact; choose another --out")
        try:
            for name in ("files", "rejected"):
                entries = [Entry(**each) for each in plain[name]]
                setattr(fresh, name, [each for each in entries if (folder / each.file).exists()])
        except (KeyError, TypeError) as error:
            raise BadInput(f"{folder / NAME}: of another version ({error}); choose another --out") from None
        return fresh


def _name(entry: Entry) -> str:
    return entry.file.removesuffix(".rejected")


def machine() -> str:
    """Processor, and GPU where there is one."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} cores{gpu}"


def versions() -> dict[str, str]:
    """Of Python and of all libraries that had a part in it."""
    found = library_versions()
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
