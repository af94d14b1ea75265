"""`manifest.json`: the exported files in a folder, their measurements, and the files that were rejected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from coma.artifact import library_versions
from coma.atomic_io import sha256_of, sync, write_json
from coma.config.serialization import from_plain
from coma.devices import cores, processor
from coma.errors import BadInput
from coma.messages import abridged, counted
from coma.preflight import check_regular_file
from coma.runtimes.model_spec import GraphKind, Precision
from coma.runtimes.shape_ranges import Shapes, parse_shapes
from coma.signals import signals_deferred

_NAMED = 5
"""Maximum number of reasons, and of images per reason, that a message names; manifest.json has all."""
NAME = "manifest.json"
STAGED = f".{NAME}.next"
"""Name of a new manifest before it replaces the previous one."""
FORMAT_VERSION = 3
_LIBRARIES = (
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13-libs",
)


class ForeignManifest(BadInput):
    """A `manifest.json` that coma export did not write: other programs have files of that name too."""


@dataclass
class Entry:
    """Record of one exported file.

    Attributes:
        file: Name of the file in the folder.
        graph: encoder, reconstructor, classifier, segmentor or detector.
        precision: Precision of its matrix multiplications.
        runtime: Runtime of the verification, the first one of --device; empty if the file could not run.
        sha256: SHA-256 of the file; empty if it could not be built.
        bytes: Size of the file, with its weights.
        parameters: Number of parameters of the model.
        shapes: Minimum, optimal and maximum input shape.
        tolerances: Tolerances of the verification.
        verification: Result of the verification (see `export.verify.verdict.ParityResult.to_dict`).
        images: Human-readable description of the verification images.
        image_sets: Images by purpose: verification, calibration, top-1.
        metric: Scores of PyTorch (`torch`), of the file (`file`) and of the file with the other runtimes of
            --device, by runtime, in percent; empty without labels.
        latency: Latency of the file and of PyTorch by shape, compute and end to end, in milliseconds.
        numbers: Operators and weights by precision.
        error: Module where the error of a rejected file starts.
        weights: SHA-256 of the file beside it that holds the weights of an ONNX file above 2 GB, by name.
        also_verified: Results with the other runtimes of --device, by runtime, in the form of `verification`.
        visible_units: Number of units that its input `visible` lists; None for files that take none.
        machine: Machine of the verification.
        versions: Versions of Python and of the libraries involved.
    """

    file: str
    graph: GraphKind
    precision: Precision
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
    image_sets: dict[str, Selection] = field(default_factory=dict)
    also_verified: dict[str, dict[str, Any]] = field(default_factory=dict)
    visible_units: int | None = None
    weights: dict[str, str] = field(default_factory=dict)
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @property
    def runtimes(self) -> list[str]:
        """Runtimes that the file was verified with."""
        return [self.runtime, *self.also_verified]

    def shape_range(self) -> Shapes:
        """Returns the shapes that the file takes.

        Raises:
            BadInput: the manifest holds none that can be read.
        """
        texts = self.shapes
        if len(texts) == 2:  # of older releases: equal shapes once, and only the optimum was timed
            timed = any(row.get("shape") == texts[1] for row in self.latency)
            texts = [texts[0], texts[timed], texts[1]]
        try:
            return parse_shapes(":".join(texts), 0)
        except BadInput as error:
            raise BadInput(f"{NAME}: shapes of {self.file}: {error}; export it again") from None

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the file and of its weights, by name."""
        return {self.file: self.sha256, **self.weights}


@dataclass
class Manifest:
    """Content of a manifest."""

    artifact: str
    source: str
    kind: str
    files: list[Entry] = field(default_factory=list)
    rejected: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry, passed: bool) -> None:
        """Adds an entry and replaces earlier ones of the same file.

        A rejected file does not replace one that passed before: that file keeps its name and its entry.
        """
        for entries in (self.files, self.rejected) if passed else (self.rejected,):
            entries[:] = [known for known in entries if _name(known) != _name(entry)]
        (self.files if passed else self.rejected).append(entry)

    def commit(self, entry: Entry, passed: bool, folder: Path, moves: Sequence[tuple[Path, Path]]) -> None:
        """Adds an entry, writes the manifest and renames the entry's files together.

        Args:
            entry: Record of the file.
            passed: Whether the file passed verification.
            folder: Folder of the manifest.
            moves: Current and final path of every file that belongs to the entry.

        Raises:
            OSError: the disk is full or not writable; the manifest and its files stay as they were.
        """
        before = list(self.files), list(self.rejected)
        self.add(entry, passed)
        try:
            self.write(folder, moves)
        except BaseException:
            self.files, self.rejected = before
            raise

    def write(self, folder: Path, moves: Sequence[tuple[Path, Path]] = ()) -> None:
        """Writes the manifest atomically and renames files at the same time."""
        plain = {"format_version": FORMAT_VERSION, **asdict(self)}
        staged = folder / STAGED
        write_json(staged, plain, indent=1)
        try:
            with signals_deferred():
                for source, to in moves:
                    source.replace(to)
                staged.replace(folder / NAME)
        finally:
            staged.unlink(missing_ok=True)
        sync(folder)

    @classmethod
    def of(cls, folder: Path, artifact: str, source: str, kind: str) -> Manifest:
        """Returns the manifest of a folder for an artifact, or an empty one.

        Raises:
            BadInput: the folder holds exports of another artifact, or a manifest of another format.
        """
        known = cls.read(folder, "choose another --out")
        if known is None:
            return cls(artifact, source, kind)
        if known.source != source:
            raise BadInput(f"{folder}: holds exports of another artifact; choose another --out")
        files, rejected = (
            [each for each in entries if all((folder / name).exists() for name in each.hashes)]
            for entries in (known.files, known.rejected)
        )
        return cls(artifact, source, kind, files, rejected)

    @classmethod
    def read(cls, folder: Path, instead: str) -> Manifest | None:
        """Reads the manifest of a folder; returns None if there is none.

        Args:
            folder: Folder of the manifest.
            instead: Remedy for the error message.

        Raises:
            BadInput: the manifest cannot be read or has another format; `ForeignManifest` if coma export did
                not write it.
        """
        path = folder / NAME
        try:
            check_regular_file(path, instead, must_exist=False)
            plain = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise BadInput(
                f"{path}: not readable ({getattr(error, 'strerror', None) or error}); {instead}"
            ) from None
        if not isinstance(plain, dict) or "format_version" not in plain:
            raise ForeignManifest(f"{path}: not readable (coma export did not write it); {instead}")
        version = plain["format_version"]
        if version != FORMAT_VERSION:
            raise BadInput(
                f"{path}: format {version}, but this version reads format {FORMAT_VERSION}; {instead}"
            )
        del plain["format_version"]
        try:
            found: Manifest = from_plain(plain, cls, source=str(path))
        except BadInput as error:
            raise BadInput(f"{error}; {instead}") from None
        for entry in (*found.files, *found.rejected):
            for name in entry.hashes:
                if Path(name).name != name:
                    raise BadInput(f"{path}: {name!r} is not a file name; {instead}")
            if not {"outputs", "failures"} <= entry.verification.keys():
                raise BadInput(f"{path}: {entry.file} has no verification; {instead}")
        return found


def is_verified(folder: Path, entry: Entry) -> bool:
    """Whether a listed file and its weights are unchanged since its verification, by their hashes.

    An export may have replaced the file and the manifest in the meantime, so both are read again.
    """
    if _holds(folder, entry):
        return True
    again = Manifest.read(folder, "export again")
    return again is not None and any(_holds(folder, e) for e in again.files if e.file == entry.file)


def _holds(folder: Path, entry: Entry) -> bool:
    return all(
        (folder / name).is_file() and sha256_of(folder / name) == sha256
        for name, sha256 in entry.hashes.items()
    )


def _name(entry: Entry) -> str:
    return entry.file.removesuffix(".rejected")


def machine() -> str:
    """Returns the name of the processor and of the GPU, if there is one."""
    import torch

    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {cores()} cores{gpu}"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that exports use."""
    found = library_versions()
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Selection:
    """Images of a source that are used.

    Attributes:
        location: Human-readable location of the source.
        used: Number of images that are used.
        available: Number of images in the source.
        left_out: Images that were read but not used, by name, with the reason.
    """

    location: str
    used: int
    available: int
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        left_out = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"{counted(self.used, 'image')} of {self.location}{left_out}"

    @property
    def names(self) -> str:
        """Names of the images that are left out, by reason."""
        return named(self.left_out)


def named(left_out: dict[str, str]) -> str:
    """Returns the names of images that are left out, by reason, up to a maximum number."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    groups = [f"{abridged(names, _NAMED)}: {reason}" for reason, names in reasons.items()]
    return abridged(groups, _NAMED, "; ")
