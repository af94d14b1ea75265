"""From the name of a teacher to a frozen network with known weights; objectives as they are trained.

A teacher is a vision transformer of timm's with weights from a `.safetensors` file (given, or in the local
cache of the model hub), or an artifact of this project. Nothing is downloaded, and nothing is unpickled. What
the weights are is known by their SHA-256, which a run records and checks when it goes on; that of an artifact
covers what its description says of the encoder, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coma.artifact import ArtifactConfig, load_encoder, load_strict
from coma.artifact.schema import TENSORS
from coma.atomic_io import sha256_of
from coma.config import (
    CMTConfig,
    EncoderConfig,
    ObjectiveConfig,
    PretrainConfig,
    TeacherConfig,
)
from coma.config.serialization import to_plain
from coma.errors import BadArtifact, BadInput
from coma.models import Encoder, build_encoder
from coma.models.attention_maps import check_readable
from coma.models.hub import cached_file, unknown_to_timm
from coma.models.teacher import Teacher
from coma.objectives import Objective, build_objective
from coma.paths import artifact_directory

PUBLISHED = ("vit_base_patch16_clip_quickgelu_224.openai", "vit_base_patch16_clip_224.openai")
"""timm's names of CLIP ViT-B/16, the teacher of CMT-MAE; the first computes GELU as CLIP was trained with."""

_RESIZED = ("pos_embed", "patch_embed.proj.weight", "relative_position_bias_table")
"""Ends of the names of tensors that timm interpolates where a file's have another size."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel."""


def with_weights_hash(config: PretrainConfig) -> PretrainConfig:
    """Returns the settings with a teacher that can be told from others, from any directory.

    Its paths are absolute then, and it has a SHA-256; its weights were checked to be there and to fit.

    Raises:
        BadInput: as `load_teacher`, or the teacher takes images of other channels.
    """
    objective = config.objective
    teacher, channels = objective.teacher, config.model.channels
    if teacher is None:
        return config
    digest = _load(teacher, ((0.0,) * channels, (1.0,) * channels))[1]
    name = str(artifact_directory(teacher.name).resolve()) if _is_folder(teacher.name) else teacher.name
    weights = teacher.weights and teacher.weights.absolute()
    known = replace(teacher, name=name, weights=weights, sha256=digest)
    return replace(config, objective=replace(objective, teacher=known))


def may_have_moved(old: TeacherConfig, new: TeacherConfig) -> bool:
    """Returns whether both are artifacts, which their SHA-256 identifies wherever they lie."""
    import timm

    known = timm.is_model(old.name.removeprefix("timm:"))
    return _is_folder(new.name) and old.sha256 is not None and not known


def caveats(objective: ObjectiveConfig) -> tuple[str, ...]:
    """Returns caveats about comparing a run with published results."""
    if not isinstance(objective, CMTConfig):
        return ()
    teacher = objective.teacher
    name = teacher.name.removeprefix("timm:")
    if name not in PUBLISHED:
        return (
            f"the teacher is {name}, not CLIP ViT-B/16: the accuracy published for CMT-MAE (85.7 with ViT-B) "
            "says nothing about this run",
        )
    notes = []
    if name == PUBLISHED[1]:
        notes.append(f"teacher {name}: CLIP was trained with another GELU; {PUBLISHED[0]} computes as it did")
    if teacher.weights:
        notes.append(
            f"teacher {name}: that the weights of {teacher.weights.name} (SHA-256 {teacher.sha256}) are "
            "OpenAI's is taken from you; they were compared with nothing"
        )
    return tuple(notes)


def load_teacher(config: TeacherConfig, statistics: Statistics) -> Teacher:
    """Returns a teacher for images that are normalised by `statistics`: mean and std per channel.

    Raises:
        BadInput: an unknown name, a network whose attention cannot be read, weights that are missing, that
            do not fit or are not the recorded ones, or images of other channels than it takes.
    """
    return _load(config, statistics)[0]


def _load(config: TeacherConfig, statistics: Statistics) -> tuple[Teacher, str]:
    """Returns the teacher, and its SHA-256."""
    if _is_folder(config.name):
        folder = _artifact_of(config)
        encoder = load_encoder(folder)
        about = encoder.artifact
        _check_channels(config.name, about.model.channels, len(statistics[0]))
        size = about.image_size
        asked = _asked(config)
        if unreadable := check_readable(encoder, about.model.channels, *size, **asked):
            raise BadInput(f"--teacher {config.name}: {unreadable}")
        digest = _digest(folder, about)
        _check_digest(config, folder, digest)
        known = (about.mean, about.std)
        return Teacher(encoder, encoder.num_features, size, known, statistics, **asked), digest
    network = _build(config)
    teacher = _timm_teacher(config, network, statistics)
    weights = _weights_of(config, network)
    digest = sha256_of(weights)
    _check_digest(config, weights, digest)
    load_strict(network, _converted(network, weights, config.name), source=str(weights))
    return teacher, digest


def _timm_teacher(config: TeacherConfig, network: Any, statistics: Statistics) -> Teacher:
    about: dict[str, Any] = network.pretrained_cfg
    channels, height, width = about["input_size"]
    _check_channels(config.name, channels, len(statistics[0]))
    known = (about["mean"], about["std"])
    return Teacher(network, network.num_features, (height, width), known, statistics, **_asked(config))


def _asked(config: TeacherConfig) -> dict[str, Any]:
    """Returns which block and query are read."""
    return {"block": config.block, "query": config.query}


def _check_channels(name: str, takes: int, given: int) -> None:
    if takes != given:
        raise BadInput(f"--teacher {name} takes images of {takes} channels, these have {given}")


def _check_digest(config: TeacherConfig, place: Path, digest: str) -> None:
    if config.sha256 and digest != config.sha256:
        raise BadInput(
            f"{place}: these are not the weights of teacher {config.name} that the run was started with "
            "(their SHA-256 differs); give the same, or start a new run"
        )


def _digest(folder: Path, about: ArtifactConfig) -> str:
    """SHA-256 of an artifact's tensors and of what its description says of using them."""
    tensors = sha256_of(folder / TENSORS)
    facts = [tensors, to_plain(about.model, EncoderConfig), about.image_size.plain, about.mean, about.std]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_folder(name: str) -> bool:
    return not name.startswith("timm:") and artifact_directory(name).is_dir()


def _artifact_of(config: TeacherConfig) -> Path:
    """Returns the directory of a teacher that is an artifact."""
    if config.weights:
        raise BadInput(
            f"--teacher {config.name} is an artifact and has its weights; leave out --teacher-weights"
        )
    folder = artifact_directory(config.name)
    if not (folder / TENSORS).is_file():
        inside = folder / "artifact"
        hint = f"; did you mean {inside}?" if inside.is_dir() else ""
        raise BadArtifact(f"{folder}: not an artifact, it has no {TENSORS}{hint}")
    return folder


def _weights_of(config: TeacherConfig, network: Any) -> Path:
    """Returns the file that holds the weights of a network of timm's."""
    if config.weights:
        if config.weights.suffix != ".safetensors" or not config.weights.is_file():
            raise BadInput(f"--teacher-weights {config.weights}: give an existing .safetensors file")
        return config.weights
    name = config.name.removeprefix("timm:")
    found = cached_file(f"timm:{name}") if network.pretrained_cfg.get("hf_hub_id") else None
    if found is None or found.suffix != ".safetensors":
        raise BadInput(
            f"the weights of teacher {name} are not on this machine; fetch them where there is a network: "
            f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\" (that fills the local "
            "cache), or give them as --teacher-weights FILE.safetensors"
        )
    return found


def _build(config: TeacherConfig) -> Any:
    """Returns a network of timm's, without weights.

    Raises:
        BadInput: none of that name, or one whose attention cannot be read.
    """
    import timm

    name = config.name
    if name.endswith(".safetensors"):
        raise BadInput(
            f"--teacher {name}: a file of weights does not say of which network; give the name of one "
            "of timm's as --teacher and the file as --teacher-weights"
        )
    name = name.removeprefix("timm:")
    if not timm.is_model(name):
        moved = "if the artifact was moved, give its directory"
        hint = moved if os.sep in name else unknown_to_timm(name)
        raise BadInput(f"--teacher {name}: no model of timm's, and no artifact; {hint}")
    try:
        network: Any = timm.create_model(name, pretrained=False, num_classes=0).eval()
    except RuntimeError as error:
        raise BadInput(f"--teacher {name}: {error}") from None
    size = network.pretrained_cfg["input_size"]
    if unreadable := check_readable(network, *size, **_asked(config)):
        raise BadInput(f"--teacher {name}: {unreadable}; take one such as {PUBLISHED[0]}")
    return network


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable .safetensors file ({error})") from None


def _converted(network: nn.Module, path: Path, name: str) -> dict[str, Tensor]:
    """Returns a file's tensors by the names that `network` knows, without those of a classifier: it has none.

    Raises:
        BadInput: not a readable file, or one of another network.
    """
    tensors, own = _read(path), network.state_dict()
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename and not own.keys() <= tensors.keys():
        stored = {_memory(tensor) for tensor in tensors.values()}
        try:
            tensors = dict(rename(tensors, network).items())
            resized = [n for n, t in tensors.items() if n.endswith(_RESIZED) and _memory(t) not in stored]
        except Exception as error:  # timm takes for granted what a file holds
            reason = str(error).partition("\n")[0]
            raise BadInput(f"{path}: not weights of {name} ({type(error).__name__}: {reason})") from None
        if resized:
            raise BadInput(
                f"{path}: not weights of {name}, but of a network of other sizes: timm would interpolate "
                f"{' and '.join(resized)}"
            )
    classifier = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    beside = tuple(f"{head}." for head in heads) or "\0"
    return {n: t for n, t in tensors.items() if n in own or not n.startswith(beside)}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def dummy_teacher(objective: ObjectiveConfig, channels: int) -> Teacher | None:
    """Returns a teacher with the real one's operations and arbitrary weights; None if the method has none.

    Raises:
        BadInput: as `load_teacher`, but for the weights of a network of timm's.
    """
    teacher, statistics = objective.teacher, ((0.0,) * channels, (1.0,) * channels)
    if teacher is None:
        return None
    with torch.random.fork_rng(devices=()):
        if _is_folder(teacher.name):
            return _load(teacher, statistics)[0]
        return _timm_teacher(teacher, _build(teacher), statistics)


def training_objective(config: PretrainConfig, encoder: Encoder | None = None) -> Objective:
    """Returns the objective of a run, with its teacher where it has one; the statistics are filled in.

    Args:
        config: The run.
        encoder: Encoder to train; by default one with random weights.

    Raises:
        BadInput: as `load_teacher`.
    """
    objective, encoder = config.objective, encoder or build_encoder(config.model)
    if objective.teacher is None:
        return build_objective(objective, encoder)
    statistics = config.data.mean or (), config.data.std or ()
    with torch.random.fork_rng(devices=()):  # a decoder beside a teacher begins as it would without one
        teacher = load_teacher(objective.teacher, statistics)
    return build_objective(objective, encoder, teacher)
