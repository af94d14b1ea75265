"""`manifest.json`: what lies in a folder of exports, what was measured of it, and what was refused."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from coma.artifact import library_versions
from coma.atomic_io import sha256_of, sync, write_whole
from coma.config.serialization import from_plain
from coma.devices import cores, processor
from coma.errors import BadInput
from coma.messages import abridged, counted
from coma.preflight import check_regular_file
from coma.runtimes.model_spec import GraphKind, Precision

_NAMED = 5
"""Most left-out images that a message names for each reason, and most reasons; manifest.json has all."""
NAME = "manifest.json"
STAGED = f".{NAME}.next"
"""The manifest that is written while the former one is still valid."""
FORMAT_VERSION = 3
_LIBRARIES = (
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13-libs",
)


class OfOthers(BadInput):
    """A `manifest.json` that `coma export` did not write: other programs have files of that name too."""


@dataclass
class Entry:
    """One file.

    Attributes:
        file: Its name in the folder.
        graph: encoder, reconstructor, classifier, segmentor or detector.
        precision: Of its products.
        runtime: Who ran it when it was verified; empty of one that could not be run.
        sha256: Of the file; empty of one that could not be made.
        bytes: Its size, weights included.
        parameters: Of the model.
        shapes: Least, usual and most, as asked for.
        tolerances: The limits it was held to.
        verification: What the gate found (see `export.verify.parity.ParityResult.plain`).
        images: Human-readable description of the verification images.
        image_sets: Images by purpose: verification, calibration, top-1; empty in older manifests.
        metric: Scores in percent, of PyTorch (`torch`) and of the file (`file`); empty without labels.
        latency: By shape, of the file and of PyTorch: compute and end to end, milliseconds.
        numbers: Which operators and weights have which precision.
        error: Where a refused file begins to differ.
        machine: That measured it.
        versions: Of Python and of all libraries that had a part in it.
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

    def commit(self, entry: Entry, passed: bool, folder: Path, moves: Sequence[tuple[Path, Path]]) -> None:
        """Adds an entry and writes the manifest; files get their names at the same moment.

        Args:
            entry: The file.
            passed: Whether it is verified or refused.
            folder: Where the manifest lies.
            moves: Present and final path of every file that belongs to the entry.

        Raises:
            OSError: the disk is full, or not to be written; the manifest and its files stay as they were.
        """
        before = list(self.files), list(self.rejected)
        self.add(entry, passed)
        try:
            self.write(folder, moves)
        except BaseException:
            self.files, self.rejected = before
            raise

    def write(self, folder: Path, moves: Sequence[tuple[Path, Path]] = ()) -> None:
        """Writes it, whole or not at all, and moves files when it lies on the disk."""
        plain = {"format_version": FORMAT_VERSION, **asdict(self)}
        text = json.dumps(plain, indent=1) + "\n"
        staged = folder / STAGED
        write_whole(staged, lambda file: file.write(text.encode()))
        try:
            with _signals_after():
                for source, to in moves:
                    source.replace(to)
                staged.replace(folder / NAME)
        finally:
            staged.unlink(missing_ok=True)
        sync(folder)

    @classmethod
    def of(cls, folder: Path, artifact: str, source: str, kind: str) -> Manifest:
        """What the folder already holds of the same artifact, or an empty one.

        Raises:
            BadInput: the folder holds exports of another artifact, or of another version of this program.
        """
        known = cls.read(folder, "choose another --out")
        if known is None:
            return cls(artifact, source, kind)
        if known.source != source:
            raise BadInput(f"{folder}: holds exports of another artifact; choose another --out")
        files, rejected = (
            [each for each in entries if (folder / each.file).exists()]
            for entries in (known.files, known.rejected)
        )
        return cls(artifact, source, kind, files, rejected)

    @classmethod
    def read(cls, folder: Path, instead: str) -> Manifest | None:
        """What a folder of exports says of itself; None where there is no such file.

        Args:
            folder: Where it lies.
            instead: What to do if it cannot be used, for the message.

        Raises:
            BadInput: it cannot be read, or is of another version of this program; `OfOthers` if it is none of
                this program's at all.
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
            raise OfOthers(f"{path}: not readable (coma export did not write it); {instead}")
        version = plain["format_version"]
        if version != FORMAT_VERSION:
            raise BadInput(
                f"{path}: of format {version}, and this program writes {FORMAT_VERSION}; {instead}"
            )
        del plain["format_version"]
        try:
            found: Manifest = from_plain(plain, cls, source=str(path))
        except BadInput as error:
            raise BadInput(f"{error}; {instead}") from None
        for entry in (*found.files, *found.rejected):
            if Path(entry.file).name != entry.file:
                raise BadInput(f"{path}: {entry.file!r} is not a file name; {instead}")
            if not {"outputs", "failures"} <= entry.verification.keys():
                raise BadInput(f"{path}: {entry.file} has no verification; {instead}")
        return found


def is_verified(folder: Path, entry: Entry) -> bool:
    """Whether a listed file is the one that was verified, by its hash.

    An export that runs meanwhile may have replaced the file and the manifest, so both are read again.
    """
    path = folder / entry.file
    if sha256_of(path) == entry.sha256:
        return True
    again = Manifest.read(folder, "export again")
    return again is not None and (entry.file, sha256_of(path)) in [(e.file, e.sha256) for e in again.files]


@contextmanager
def _signals_after() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the end: the names of files and the manifest change together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _name(entry: Entry) -> str:
    return entry.file.removesuffix(".rejected")


def machine() -> str:
    """Processor, and GPU where there is one."""
    import torch

    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {cores()} cores{gpu}"


def versions() -> dict[str, str]:
    """Of Python and of all libraries that had a part in it."""
    found = library_versions()
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Selection:
    """Which images of a source are used.

    Attributes:
        location: The source, for people.
        used: Number of images that are used.
        available: Number of images in the source.
        left_out: Reason by name, for images that were looked at and are not used.
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
        """The images that are left out, by reason."""
        return named(self.left_out)


def named(left_out: dict[str, str]) -> str:
    """The images that are left out, by reason; of many only the first ones."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    groups = [f"{abridged(names, _NAMED)}: {reason}" for reason, names in reasons.items()]
    return abridged(groups, _NAMED, "; ")
