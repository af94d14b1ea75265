"""Say what a file or folder is, what made it, and what can be done with it.

PATH may be an artifact, a run directory, a folder of exported files, an ONNX file, a TensorRT engine, a
safetensors file, features of `coma embed`, or images to train on. Nothing is unpickled, and no model is run.

Examples:
  coma info runs/first
  coma info runs/first/artifact
  coma info exports/encoder.onnx
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from coma.arguments import parse_arguments
from coma.errors import BadArtifact, BadInput
from coma.messages import abridged, counted, printable
from coma.paths import Address, Location, artifact_directory
from coma.ranges import TILE, Ranged
from coma.rooms import entry_points, load

if TYPE_CHECKING:
    from coma.runtimes.model_spec import ModelSpec

_PICKLED = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".pickle")
_GROUP = "coma.info"
"""Entry points of rooms that describe their files, by suffix: functions of a path that return a `Report`, or
None if the file is of another kind."""
_FACTS = 10
"""Most facts of a training that are shown."""


@dataclass(frozen=True)
class InfoConfig(Ranged):
    """Path to inspect."""

    path: Annotated[Location, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """An artifact, run directory, folder of exports or images, or one of their files; or the address of
    remote images."""
    tiles: Annotated[int | None, TILE] = None
    """Count the windows of this side in pixels that larger images would be cut into; default: no windows"""


@dataclass
class Report:
    """Holds the title of a path, facts about it by name, and the commands that take it."""

    title: str
    facts: dict[str, str]
    next: list[str]

    def text(self, path: Location) -> str:
        """Returns the lines to print."""
        known = {name: printable(value) for name, value in self.facts.items() if value}
        width = max(map(len, known), default=0)
        lines = [f"{printable(str(path))}: {self.title}"]
        lines += [f"  {name:{width}}  {value}" for name, value in known.items()]
        return "\n".join([*lines, *(["\nnext:"] if self.next else []), *(f"  {line}" for line in self.next)])


def run(argv: list[str]) -> None:
    """Parse, look, print.

    Raises:
        BadInput: nothing is there, it is damaged, or it is nothing that this toolkit knows.
    """
    config = parse_arguments(InfoConfig, argv, prog="coma info", description=__doc__)
    path = config.path
    try:
        found = report(path) if config.tiles is None else _images(path, config.tiles)
    except OSError as error:
        raise BadInput(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    print(found.text(path))


def report(path: Location) -> Report:
    """Returns what is at `path`.

    Raises:
        BadInput: nothing is there, it is damaged, or it is nothing that this toolkit knows.
    """
    if isinstance(path, Address):
        return _images(path)
    path = artifact_directory(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        if path.with_name(f".{path.name}.previous").is_dir() or "{" in path.name:
            return _artifact(path) if "{" not in path.name else _images(path)
        broken = "a symbolic link that leads nowhere" if path.is_symlink() else "no such file or folder"
        raise BadInput(f"{path}: {broken}")
    if not path.is_file():
        raise BadInput(f"{path}: is a device or pipe; give a file or folder that a command wrote")
    suffix = path.suffix.lower()
    if path.name in ("config.json", "model.safetensors", "manifest.json", "compare.json"):
        try:
            return _folder(path.absolute().parent)
        except BadInput:
            if suffix == ".json":
                raise
    if suffix in _PICKLED:
        raise BadInput(
            f"{path}: may hold pickled code, which coma never runs; convert it to .safetensors, or let `coma "
            "pretrain --init` take the tensors of a vision transformer from it"
        )
    if suffix in entry_points(_GROUP):
        found: Report | None = load(entry_points(_GROUP)[suffix])(path)
        if found:
            return found
    readers = {".onnx": _onnx, ".engine": _engine, ".plan": _engine, ".pt2": _program}
    readers[".safetensors"] = _tensors
    return readers.get(suffix, _images)(path)


def _folder(path: Path) -> Report:
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return _artifact(path)
    if (path / "manifest.json").is_file():
        from coma.runtimes.manifest import ForeignManifest

        try:
            return _exports(path)
        except ForeignManifest:
            pass
    if (path / "compare.json").is_file():
        return Report(
            "folder of `coma compare`",
            {"table": f"{path / 'compare.md'}" if (path / "compare.md").is_file() else "not written yet"},
            [f"coma info {_quoted(path / 'runs')}/NAME"],
        )
    if (path / "config.json").is_file() or (path / "artifact").is_dir():
        return _run(path)
    if (path / "run" / "config.json").is_file():  # of `coma quickstart`
        return _run(path / "run")
    return _images(path)


def _artifact(path: Path) -> Report:
    from coma.artifact import load_artifact
    from coma.artifact.schema import CHECKSUMS
    from coma.config.serialization import to_plain
    from coma.config.settings_file import read_json

    artifact = load_artifact(path)
    config, card = artifact.config, path / "README.md"
    named = Path(path.name)  # tiny-64, in place of its folder
    there = _quoted(named if artifact_directory(named) == path else path)
    plain = to_plain(config)
    parts = {"backbone": "encoder", "pretrained": "encoder and decoder"}
    values = sum(tensor.numel() for tensor in artifact.tensors.values())
    checked = not path.is_dir() or CHECKSUMS in read_json(path / "config.json", "a whole artifact")
    facts = {
        "holds": f"{parts.get(config.kind, config.kind)}, {values / 1e6:,.1f} M values in "
        f"{counted(len(artifact.tensors), 'tensor')}",
        "encoder": _listed(plain["model"]),
        "images": f"{config.image_size} px, {counted(config.model.channels, 'channel')}",
        "classes": abridged(config.class_names or (), 10),
        "trained": _listed(config.trained),
        "init": f"{config.init.name} (SHA-256 {config.init.sha256})" if config.init else "",
        "versions": _listed(config.versions),
        "model card": str(card) if card.is_file() else "",
        "checksums": "match" if checked else "none: an older version wrote it, damage would go unnoticed",
    }
    encoder = [
        "coma evaluate {} --data CLASSES",
        "coma classify train {} --data CLASSES --out RUN",
        "coma detect train {} --data DATA --out RUN",
    ]
    steps = {
        "backbone": encoder,
        "pretrained": encoder,
        "classifier": [
            "coma classify test {} --data CLASSES",
            "coma classify predict {} IMAGES --out PREDICTIONS",
        ],
        "detector": ["coma detect predict {} IMAGES --out PICTURES"],
        "segmentor": ["coma segment predict {} IMAGES --out PICTURES"],
    }
    both = ["coma export {} --out EXPORTS", "coma demo {}"]
    return Report(
        f"artifact of kind {config.kind}",
        facts,
        [line.format(there) for line in (*steps[config.kind], *both)],
    )


def _run(path: Path) -> Report:
    from coma.config.settings_file import read_json

    there, artifact = _quoted(path), path / "artifact"
    plain = read_json(path / "config.json", "a run") if (path / "config.json").is_file() else {}
    if not isinstance(plain, dict):
        raise BadInput(f"{path / 'config.json'}: not the settings of a run")
    if "format_version" in plain:
        raise BadArtifact(f"{path}: an artifact without its model.safetensors; copy it again")
    commands = {"objective": "coma pretrain", "artifact": "coma classify train"}
    maker = next((command for key, command in commands.items() if key in plain), "")
    data, settings = _section(plain, "data"), _section(plain, "optimizer")
    facts = {
        "method": str(_section(plain, "objective").get("method", "")),
        "encoder": _listed(_section(plain, "model")),
        "images": str(data.get("images") or ""),
        "length": _length(settings),
        "done": "" if settings.get("frozen") else _progress(path / "metrics.jsonl"),
        "artifact": str(artifact) if artifact.is_dir() else "not written yet",
    }
    steps = [f"coma info {_quoted(artifact)}"] if artifact.is_dir() else []
    resume = {"coma pretrain": f"coma pretrain --resume {there}"}.get(maker)
    if not (maker or artifact.is_dir()):
        raise BadInput(f"{path}: its config.json is of no run and no artifact of this toolkit")
    title = f"run directory of `{maker}`" if maker else "run directory"
    return Report(title, facts, [*([resume] if resume else []), *steps])


def _exports(path: Path) -> Report:
    from coma.runtimes.manifest import Manifest, is_verified

    manifest = Manifest.read(path, "export again")
    assert manifest is not None
    facts = {"artifact": f"{manifest.artifact} (kind {manifest.kind})"}
    for entry in manifest.files:
        file = path / entry.file
        state = (
            "missing" if not file.is_file() else "verified" if is_verified(path, entry) else "changed since"
        )
        facts[entry.file] = f"{state}; {entry.graph}, {entry.precision}, {entry.bytes / 1e6:,.1f} MB"
    for entry in manifest.rejected:
        facts[entry.file] = f"rejected; {entry.graph}, {entry.precision}; see report.md"
    versions = manifest.files or manifest.rejected
    facts["versions"] = _listed(versions[0].versions) if versions else ""
    return Report(
        "folder of exported files",
        facts,
        [f"coma benchmark ARTIFACT --exports {_quoted(path)}"],
    )


def _onnx(path: Path) -> Report:
    from coma.runtimes.model_spec import inspect_onnx

    spec, facts = inspect_onnx(path)
    if spec is None:
        return Report("ONNX file, not written by `coma export`", facts, [])
    facts = {"kind of graph": _graph_of(spec), "precision": spec.precision, **facts}
    return Report("ONNX file of `coma export`", facts | _listing(path), _described(path))


def _graph_of(spec: ModelSpec) -> str:
    listed = f" that computes {counted(spec.visible_units, 'listed unit')}" if spec.visible_units else ""
    return spec.graph + listed


def _engine(path: Path) -> Report:
    from coma.atomic_io import sha256_of
    from coma.runtimes.tensorrt.sidecar import read_sidecar

    sidecar = read_sidecar(path)
    intact = sha256_of(path) == sidecar.engine_sha256
    facts = {
        "kind of graph": _graph_of(sidecar.spec),
        "precision": sidecar.spec.precision,
        "built by": f"{sidecar.flavour} {sidecar.version} on {sidecar.platform}",
        "for": sidecar.gpu.name if sidecar.gpu else "any GPU",
        "checksum": "matches" if intact else "does not match; build it again",
    }
    return Report("TensorRT engine", facts | _listing(path), _described(path))


def _program(path: Path) -> Report:
    from coma.runtimes.torch_program import read_program_spec

    spec, compiled = read_program_spec(path)
    facts = {"kind of graph": _graph_of(spec), "precision": spec.precision}
    how = "compiled by AOTInductor" if compiled else "of torch.export"
    return Report(f"PyTorch program {how}", facts | _listing(path), _described(path))


def _tensors(path: Path) -> Report:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: truncated, or not a safetensors file ({error})") from None
    facts = {"tensors": f"{len(names)}: {abridged(names, 3)}", "metadata": _listed(metadata)}
    return Report("safetensors file: weights without the model that they belong to", facts, [])


def _images(path: Location, tiles: int | None = None) -> Report:
    from coma.data.sources.open import open_source

    logger, level = logging.getLogger("coma"), logging.getLogger("coma").level
    logger.setLevel(logging.ERROR)  # its summary is printed here
    try:
        source = open_source(path, tiles=tiles)
    finally:
        logger.setLevel(level)
    there = _quoted(path)
    facts = {"images": source.summary(), "split": source.split or "", "notes": "; ".join(source.notes)}
    if source.class_names:
        facts["classes"] = f"{len(source.class_names)}: {abridged(source.class_names, 10)}"
    cut = "" if tiles is None else f" --tiles {tiles}"
    steps = [f"coma pretrain {there} --out RUN{cut}", f"coma pack {there} --out PACK{cut}"]
    if source.class_names:
        steps.append(f"coma evaluate ARTIFACT --data {there}")
    return Report("images", facts, steps)


def _listing(file: Path) -> dict[str, str]:
    """Returns what the manifest beside an exported file says of it."""
    from coma.runtimes.manifest import Manifest, is_verified

    manifest = Manifest.read(file.parent, "export again")
    entries = [entry for entry in manifest.files if entry.file == file.name] if manifest else []
    if not entries:
        return {"verified": "no: no manifest beside it lists it"}
    verified = is_verified(file.parent, entries[0])
    return {"verified": f"against PyTorch on {entries[0].images}" if verified else "no: changed since"}


def _described(path: Path) -> list[str]:
    return [f'python -c "import coma; print(coma.open_runtime({str(path)!r}))"', f"coma demo {_quoted(path)}"]


def _progress(metrics: Path) -> str:
    """Returns step and loss of the last whole line of metrics.jsonl."""
    if not metrics.is_file():
        return "no step"
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - 2**16, 0))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
            return f"{row['step']} steps, loss {row['loss']:.4f}"
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return "no step"


def _section(plain: dict[str, Any], name: str) -> dict[str, Any]:
    value = plain.get(name)
    return value if isinstance(value, dict) else {}


def _length(settings: dict[str, Any]) -> str:
    if settings.get("frozen"):
        return "no steps: the head is fitted to frozen features"
    if settings.get("steps"):
        return f"{settings['steps']} steps"
    return f"{settings['epochs']} epochs" if "epochs" in settings else ""


def _listed(facts: Mapping[str, Any]) -> str:
    shown = [f"{name} {value}" for name, value in facts.items() if value is not None]
    return abridged(shown, _FACTS)


def _quoted(path: Location) -> str:
    return shlex.quote(str(path))
