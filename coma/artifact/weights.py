"""Weights that a run can start from: an artifact, a file that others wrote, or a name in a local cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coma.artifact.load import load_artifact
from coma.artifact.schema import TENSORS
from coma.atomic_io import sha256_of
from coma.config import EncoderConfig, encoder_preset
from coma.config.artifact import ArtifactConfig, Origin
from coma.errors import BadInput
from coma.models.checkpoints import Checkpoint, of_encoder, read_checkpoint, vit_like
from coma.models.hub import is_reference, weights_file
from coma.paths import artifact_directory, local_path

_BY_NAME = re.compile(r"(?:timm:|hf-hub:timm/)([^@]+)(@.*)?")


@dataclass(frozen=True)
class Weights:
    """Weights of an encoder.

    Attributes:
        origin: Their name and SHA-256.
        checkpoint: The encoder's tensors.
        about: Description of the artifact; None for a file that others wrote.
        decoder: Tensors of an artifact's decoder, by their names in the objective.
        statistics: Mean and standard deviation per channel that their images were normalised by; None if
            that is not known.
    """

    origin: Origin
    checkpoint: Checkpoint
    about: ArtifactConfig | None = None
    decoder: dict[str, Tensor] | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None


_last: dict[tuple[str, int, int], Weights] = {}
"""The weights that were read last, by their path and the times of its folder and file."""


def forget_weights() -> None:
    """Frees the weights that `read_weights` read last; until then, reading them again costs nothing."""
    _last.clear()


def read_weights(source: str, *, download: bool = False) -> Weights:
    """Returns the weights in an artifact, a file, or the local cache of a model hub; nothing is unpickled.

    Args:
        source: Directory of an artifact; a `.safetensors` file or one that `torch.save` wrote; `timm:NAME` or
            `hf-hub:ORG/NAME`.
        download: Fetch a named file that is in no local cache.

    Raises:
        BadInput: nothing is there, or nothing that can be read safely.
    """
    if is_reference(source):
        path = file = weights_file(source, download=download)
    else:
        path = artifact_directory(local_path(source))
        if not path.exists():
            raise BadInput(f"{source}: no such file or directory{_hint(source)}")
        file = path / TENSORS if path.is_dir() else path
    state = file.stat() if file.is_file() else None
    key = (f"{source} {file}", path.stat().st_mtime_ns, state.st_mtime_ns) if state else None
    if key is None or key not in _last:
        found = _of_artifact(path) if path.is_dir() else _of_file(source, path)
        forget_weights()
        if key is None:
            return found
        _last[key] = found
    return _last[key]


def _of_file(source: str, path: Path) -> Weights:
    checkpoint = read_checkpoint(path)
    return Weights(Origin(name_of(source), sha256_of(path)), checkpoint, statistics=_of_timm(source))


def _of_timm(source: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Returns the mean and standard deviation that timm has for weights of this name."""
    import timm

    named = _BY_NAME.fullmatch(source)
    config = timm.get_pretrained_cfg(named[1]) if named and is_reference(source) else None
    return config and (tuple(map(float, config.mean)), tuple(map(float, config.std)))


def model_of(source: str, *, download: bool = False) -> tuple[EncoderConfig, ArtifactConfig | None]:
    """Returns the encoder that fits to weights, and the description of the artifact that they are.

    Raises:
        BadInput: as `read_weights`, or weights that do not say of which encoder they are.
    """
    by_name = _BY_NAME.fullmatch(source)
    if by_name and is_reference(source):
        return encoder_preset(f"timm:{by_name[1]}"), None
    weights = read_weights(source, download=download)
    if weights.about is not None:
        return weights.about.model, weights.about
    model = vit_like(weights.checkpoint.tensors)
    if model is None:
        raise BadInput(
            f"--init {source}: does not say of which model it is; give --model, for example timm:NAME with "
            "the name of its architecture in timm, or the directory of an artifact"
        )
    return model, None


def name_of(source: str) -> str:
    """Returns a short name for weights: without the folders they lie in, which mean nothing elsewhere."""
    path = Path(source).absolute()
    if is_reference(source):
        return source
    return f"{path.parent.name}/{path.name}" if path.name == "artifact" else path.name


def _of_artifact(directory: Path) -> Weights:
    artifact = load_artifact(directory)
    found = of_encoder(artifact.tensors)
    decoder = {name: artifact.tensors[name] for name in found.beside if name.startswith("decoder.")}
    beside = [name for name in found.beside if name not in decoder]
    origin = Origin(name_of(str(directory)), sha256_of(directory / TENSORS))
    about = artifact.config
    checkpoint = Checkpoint(found.tensors, beside, found.notes)
    return Weights(origin, checkpoint, about, decoder, (about.mean, about.std))


def _hint(source: str) -> str:
    import timm

    return f"; did you mean timm:{source}?" if timm.is_model(source) else ""
