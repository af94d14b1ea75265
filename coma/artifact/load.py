"""Loads artifacts: strictly, without unpickling, with errors that say what to do."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from coma.artifact.save import sibling
from coma.artifact.schema import CHECKSUMS, CONFIG, LINEAR_HEAD, MULTI_LABEL, RENAMED, TENSORS, content_sha256
from coma.atomic_io import sha256_of
from coma.config.artifact import FORMAT_VERSION, ArtifactConfig
from coma.config.serialization import from_plain
from coma.config.settings_file import read_json
from coma.errors import BadArtifact, BadInput
from coma.messages import abridged
from coma.models import Encoder, build_encoder
from coma.paths import artifact_directory, shipped_weights

log = logging.getLogger(__name__)

_ENCODERS = {
    "backbone": ("", r"(?!)"),
    "pretrained": ("encoder.", r"decoder\."),
    "classifier": ("", r"head\."),
    "detector": ("backbone.encoder.", r"(?!backbone\.encoder\.)"),
    "segmentor": ("backbone.encoder.", r"(?!backbone\.encoder\.)"),
}
"""Prefix of the encoder's tensors in each kind of artifact, and the names of the tensors that are not its."""

_MISMATCH = (
    "its checksum does not match; copy or export the artifact again, or, if you changed it yourself, remove "
    f'"{CHECKSUMS}" from its {CONFIG}'
)

if TYPE_CHECKING:
    from coma.models.classifiers import Classifier


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: its description and its tensors, on the CPU, as stored."""

    config: ArtifactConfig
    tensors: dict[str, Tensor]


def load_artifact(directory: str | Path) -> Artifact:
    """Read an artifact; tensors stay in the type they were stored in.

    Args:
        directory: Its directory, or the name of weights that come with the package, such as `tiny-64`.

    Raises:
        BadArtifact: no artifact there, a damaged one, or one of a newer format; the message says which.
    """
    directory = artifact_directory(directory)
    found = directory
    if not directory.exists() and sibling(directory, "previous").is_dir():
        found = sibling(directory, "previous")  # a replacement was cut short between its two renames
    _check_directory(directory, found)
    config, checksums = _read_config(found / CONFIG)
    tensors = _read_tensors(found / TENSORS, config.format_version)
    if checksums is None:
        _say_unchecked(directory)
    elif checksums.get(TENSORS) != sha256_of(found / TENSORS):
        raise BadArtifact(f"{found / TENSORS}: damaged or replaced, {_MISMATCH}")
    return Artifact(config, tensors)


@cache
def _say_unchecked(directory: Path) -> None:
    log.warning("%s: has no checksums (an older version wrote it): damage goes unnoticed", directory)


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `module`, all of them or none; floating types are converted to the module's.

    Raises:
        BadArtifact: naming `source` and the tensors that are missing, unexpected or do not fit.
    """
    own = module.state_dict()
    missing = [f"{name} {_describe(tensor)}" for name, tensor in own.items() if name not in tensors]
    unexpected = [f"{name} {_describe(tensor)}" for name, tensor in tensors.items() if name not in own]
    unfit = [
        f"{name} is {_describe(tensors[name])}, the model has {_describe(tensor)}"
        for name, tensor in own.items()
        if name in tensors and not _fits(tensors[name], tensor)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape or type", unfit))
    problems = [f"{len(names)} {label}: {abridged(names)}" for label, names in kinds if names]
    if problems:
        raise BadArtifact(f"{source}: not of this {type(module).__name__}; " + "; ".join(problems))
    module.load_state_dict(dict(tensors), strict=True)


def load_encoder(directory: str | Path) -> Encoder:
    """Returns the encoder of an artifact of any kind, in evaluation mode on the CPU.

        encoder = coma.load_encoder("tiny-64")  # weights that come with the package

    Its attribute `artifact` is the artifact's description: image size, mean, std, how it was trained.

    Raises:
        BadArtifact: as `load_artifact` and `load_strict`.
    """
    artifact = load_artifact(directory)
    prefix, foreign = _ENCODERS[artifact.config.kind]
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in artifact.tensors.items()
        if not re.match(foreign, name)
    }
    encoder = build_encoder(artifact.config.model)
    load_strict(encoder, tensors, source=f"{directory}/{TENSORS}")
    encoder.artifact = artifact.config
    return encoder.eval()


def load_classifier(directory: str | Path) -> Classifier:
    """Returns the model of a `classifier` artifact, in evaluation mode on the CPU.

    It maps images `[b, c, H, W]`, normalised by the `mean` and `std` of its attribute `artifact`, to logits
    `[b, classes]`, one for each of `artifact.class_names`: for a softmax over them, or for a sigmoid of each
    where an image may have any number of classes (`is_multi_label(artifact)`).

    Raises:
        BadArtifact: as `load_artifact` and `load_strict`, or an artifact of another kind or with a head that
            is not known here.
    """
    from coma.models.classifiers import build_classifier  # registers models with timm

    artifact = load_artifact(directory)
    config = artifact.config
    if config.kind != "classifier":
        raise BadArtifact(
            f"{directory}: its kind is {config.kind!r}; give a 'classifier' artifact, as "
            "`coma classify train` makes"
        )
    head = {name: value for name, value in (config.head or {}).items() if name != MULTI_LABEL}
    if head != LINEAR_HEAD or config.class_names is None:
        raise BadArtifact(
            f"{directory}: its head is {config.head} for the classes {config.class_names}; known here is "
            f"{LINEAR_HEAD} with class names"
        )
    classifier = build_classifier(config.model, len(config.class_names))
    load_strict(classifier, artifact.tensors, source=f"{directory}/{TENSORS}")
    classifier.artifact = config
    return classifier.eval()


def is_multi_label(config: ArtifactConfig) -> bool:
    """Returns whether a classifier is for images with any number of classes."""
    return bool((config.head or {}).get(MULTI_LABEL, False))


def _check_directory(directory: Path, found: Path) -> None:
    names = shipped_weights()
    hides = (
        f"; it hides the weights {directory} of this package: rename it" if str(directory) in names else ""
    )
    if found.exists() and not found.is_dir():
        raise BadArtifact(f"{directory}: {_not_an_artifact(found)}{hides}")
    if not found.is_dir():
        reason = f"no such directory; the weights of this package are {', '.join(names)}"
        if found.is_symlink():
            reason = f"a symbolic link that leads nowhere{hides}"
        raise BadArtifact(f"{directory}: {reason}")
    absent = [name for name in (CONFIG, TENSORS) if not (found / name).is_file()]
    if absent:
        inside = directory / "artifact"
        hint = f"; did you mean {inside}?" if inside.is_dir() else hides
        raise BadArtifact(f"{directory}: not an artifact, it has no {' and no '.join(absent)}{hint}")


def _not_an_artifact(file: Path) -> str:
    """Returns a message for a file that was given in place of an artifact."""
    folder = file.absolute().parent
    if file.name in (CONFIG, TENSORS) and all((folder / name).is_file() for name in (CONFIG, TENSORS)):
        return f"is a file of an artifact; give its directory, {folder}"
    wanted = "give the directory that a command wrote, for example run/artifact"
    match file.suffix.lower():
        case ".pth" | ".pt" | ".ckpt" | ".bin" | ".safetensors":
            return f"is a file of weights, without the model that they belong to; {wanted}"
        case ".onnx" | ".engine" | ".plan" | ".pt2":
            return f"is an exported model; {wanted}, from which it was exported"
    return f"is a file, not an artifact; {wanted}"


def _read_config(path: Path) -> tuple[ArtifactConfig, dict[str, Any] | None]:
    """Returns the description, and the checksums that it carries."""
    try:
        plain = read_json(path, "a whole artifact")
    except BadInput as error:
        raise BadArtifact(str(error)) from None
    version = plain.get("format_version") if isinstance(plain, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BadArtifact(f"{path}: not an artifact's config, it has no format_version")
    if version > FORMAT_VERSION:
        raise BadArtifact(f"{path}: format {version}, newest known here {FORMAT_VERSION}; upgrade coma-dyvit")
    checksums = plain.pop(CHECKSUMS, None)
    try:
        config = from_plain(_renamed(plain), ArtifactConfig, source=str(path))
    except BadInput as error:
        raise BadArtifact(str(error)) from None
    if checksums is not None and not isinstance(checksums, dict):
        raise BadArtifact(f"{path}: its {CHECKSUMS} are not readable; copy or export the artifact again")
    if checksums is not None and checksums.get(CONFIG) != content_sha256(plain):
        raise BadArtifact(f"{path}: damaged or edited, {_MISMATCH}")
    return config, checksums


def _read_tensors(path: Path, format_version: int) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            written = (file.metadata() or {}).get("format_version", str(format_version))
            tensors = {_today(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise BadArtifact(f"{path}: truncated or damaged ({error}); copy or export it again") from None
    if written != str(format_version):
        raise BadArtifact(
            f"{path}: written in format {written}, but {CONFIG} beside it says {format_version}; "
            "the two files belong to different artifacts"
        )
    return tensors


def _renamed(plain: dict[str, Any]) -> dict[str, Any]:
    """Returns the description with the settings of its objective under the names of today's format."""
    objective = plain.get("objective")
    if plain["format_version"] > 1 or not isinstance(objective, dict):
        return plain
    return plain | {"objective": {RENAMED.get(name, name): value for name, value in objective.items()}}


def _today(name: str) -> str:
    outer, dot, last = name.rpartition(".")
    return outer + dot + RENAMED.get(last, last)


def _fits(given: Tensor, wanted: Tensor) -> bool:
    convertible = given.dtype == wanted.dtype or (given.is_floating_point() and wanted.is_floating_point())
    return given.shape == wanted.shape and convertible


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else " " + str(tensor.dtype).removeprefix("torch.")
    return f"{list(tensor.shape)}{kind}"


def artifact_hash(directory: Path) -> str:
    """SHA-256 of what it computes: its weights and its `config.json` without how it was trained and by what.

    Raises:
        BadArtifact: it is none, or damaged.
    """
    directory = artifact_directory(directory)
    try:
        plain = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        for fact in ("trained", "versions", "init", CHECKSUMS):
            plain.pop(fact, None)
        found = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
        with safe_open(directory / "model.safetensors", framework="pt", device="cpu") as file:
            for name in sorted(file.keys()):  # the file's header has no fixed order
                tensor = file.get_tensor(name)
                found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    except (OSError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        raise BadArtifact(f"{directory}: not a readable artifact ({error})") from None
    return found.hexdigest()
