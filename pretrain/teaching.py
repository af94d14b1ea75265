"""From the name of a teacher to a frozen network with known weights; objectives as they are trained.

A teacher is a vision transformer of timm's with weights from a `.safetensors` file (given, or in the local
cache of the model hub), or an artifact of this project. Nothing is downloaded, and nothing is unpickled. What
the weights are is known by their SHA-256, which a run records and checks when it goes on.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.artifact import load_encoder, load_strict
from pretrain.artifact.description import TENSORS
from pretrain.config import BalancedCoMAConfig, CMTConfig, ObjectiveConfig, PretrainConfig, TeacherConfig
from pretrain.errors import BadArtifact, BadInput
from pretrain.hashing import sha256_of
from pretrain.models import build_encoder
from pretrain.models.attending import check_readable
from pretrain.models.teacher import Teacher
from pretrain.objectives import Objective, build_objective

PUBLISHED = ("vit_base_patch16_clip_quickgelu_224.openai", "vit_base_patch16_clip_224.openai")
"""timm's names of CLIP ViT-B/16, the teacher of CMT-MAE; the first computes GELU as CLIP was trained with."""


def training_objective(config: PretrainConfig) -> Objective:
    """The objective of a run, with its teacher where it has one; mean and deviation are filled in.

    Raises:
        BadInput: as `load_teacher`.
    """
    objective, encoder = config.objective, build_encoder(config.model)
    if not isinstance(objective, CMTConfig | BalancedCoMAConfig):
        return build_objective(objective, encoder)
    statistics = config.data.mean or (), config.data.std or ()
    with torch.random.fork_rng(devices=()):  # a decoder beside a teacher begins as it would without one
        teacher = load_teacher(objective.teacher, statistics)
    return build_objective(objective, encoder, teacher)


def identified(config: PretrainConfig) -> PretrainConfig:
    """The settings with the SHA-256 of the teacher's weights, which are checked to be there and to fit.

    Raises:
        BadInput: as `load_teacher`, or the teacher takes images of other channels.
    """
    objective = config.objective
    if not isinstance(objective, CMTConfig | BalancedCoMAConfig):
        return config
    channels = config.model.channels
    teacher = load_teacher(objective.teacher, ((0.0,) * channels, (1.0,) * channels))
    del teacher
    digest = sha256_of(_weights_of(objective.teacher))
    return replace(config, objective=replace(objective, teacher=replace(objective.teacher, sha256=digest)))


def remarks(objective: ObjectiveConfig) -> tuple[str, ...]:
    """What has to be said of a run before its results are compared with published ones."""
    if not isinstance(objective, CMTConfig):
        return ()
    name = objective.teacher.name.removeprefix("timm:")
    if name == PUBLISHED[0]:
        return ()
    if name == PUBLISHED[1]:
        return (f"teacher {name}: CLIP was trained with another GELU; {PUBLISHED[0]} computes as it did",)
    return (
        f"the teacher is {name}, not CLIP ViT-B/16: the accuracy published for CMT-MAE (85.7 with ViT-B) "
        "says nothing about this run",
    )


def load_teacher(config: TeacherConfig, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Teacher:
    """A teacher for images that are normalised by `statistics`, mean and deviation per channel.

    Raises:
        BadInput: an unknown name, a network whose attention cannot be read, weights that are missing, that
            do not fit or are not the recorded ones, or images of other channels than it takes.
    """
    weights = _weights_of(config)
    if config.sha256 and sha256_of(weights) != config.sha256:
        raise BadInput(
            f"{weights}: these are not the weights of teacher {config.name} that the run was started with "
            "(their SHA-256 differs); give the same, or start a new run"
        )
    if weights.name == TENSORS and _is_folder(config.name):
        encoder, about = load_encoder(weights.parent)
        _check_channels(config.name, about.model.channels, len(statistics[0]))
        size = (about.image_size, about.image_size)
        return Teacher(encoder, encoder.num_features, size, (about.mean, about.std), statistics)
    network = _build(config.name)
    known: dict[str, Any] = network.pretrained_cfg
    channels, *size = known["input_size"]
    _check_channels(config.name, channels, len(statistics[0]))
    load_strict(network, _converted(network, _read(weights)), source=str(weights))
    return Teacher(network, network.num_features, tuple(size), (known["mean"], known["std"]), statistics)


def _weights_of(config: TeacherConfig) -> Path:
    """The file that holds a teacher's weights."""
    if _is_folder(config.name):
        if config.weights:
            raise BadInput(
                f"--teacher {config.name} is an artifact and has its weights; leave out --teacher-weights"
            )
        folder = Path(config.name)
        if not (folder / TENSORS).is_file():
            inside = folder / "artifact"
            hint = f"; did you mean {inside}?" if inside.is_dir() else ""
            raise BadArtifact(f"{folder}: not an artifact, it has no {TENSORS}{hint}")
        return folder / TENSORS
    if config.name.endswith(".safetensors"):
        raise BadInput(
            f"--teacher {config.name}: a file of weights does not say of which network; give the name of one "
            "of timm's as --teacher and the file as --teacher-weights"
        )
    network = _build(config.name)
    if config.weights:
        if config.weights.suffix != ".safetensors" or not config.weights.is_file():
            raise BadInput(f"--teacher-weights {config.weights}: give an existing .safetensors file")
        return config.weights
    found = _cached(network.pretrained_cfg.get("hf_hub_id"))
    if found is None:
        name = config.name.removeprefix("timm:")
        raise BadInput(
            f"the weights of teacher {name} are not on this machine; fetch them where there is a network: "
            f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\" (that fills the local "
            "cache), or give them as --teacher-weights FILE.safetensors"
        )
    return found


def _is_folder(name: str) -> bool:
    return not name.startswith("timm:") and Path(name).is_dir()


def _cached(repository: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model.safetensors") if repository else None
    return Path(found) if isinstance(found, str) else None


def _build(name: str) -> Any:
    """A network of timm's, without weights.

    Raises:
        BadInput: none of that name, or one whose attention cannot be read.
    """
    import timm

    name = name.removeprefix("timm:")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "give a name of timm's"
        raise BadInput(f"--teacher {name}: no model of timm's, and no artifact; {hint}")
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise BadInput(f"--teacher {name}: {error}") from None
    unreadable = check_readable(network)
    if unreadable:
        raise BadInput(f"--teacher {name}: {unreadable}; take one such as {PUBLISHED[0]}")
    return network


def _check_channels(name: str, takes: int, given: int) -> None:
    if takes != given:
        raise BadInput(f"--teacher {name} takes images of {takes} channels, these have {given}")


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable .safetensors file ({error})") from None


def _converted(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that `network` knows, without those of a classifier, which it does not have."""
    own = network.state_dict()
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename and not own.keys() <= tensors.keys():
        tensors = rename(tensors, network)
    classifier = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    beside = tuple(f"{head}." for head in heads)
    return {name: t for name, t in tensors.items() if name in own or not name.startswith(beside or "\0")}
