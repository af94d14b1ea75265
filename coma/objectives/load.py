"""Loads the objective of a `pretrained` artifact, decoder included."""

from __future__ import annotations

from pathlib import Path

from coma.artifact import load_artifact, load_strict
from coma.errors import BadArtifact
from coma.models import build_encoder
from coma.objectives import MaskedPixels, build_objective


def load_pretrained(directory: str | Path) -> MaskedPixels:
    """Returns the pre-trained objective, in evaluation mode on the CPU.

        objective = coma.load_pretrained("tiny-64")  # weights that come with the package
        filled_in = objective.reconstruct(images, visible)

    Its attribute `artifact` is the artifact's description: image size, mean, std, how it was trained.

    Raises:
        BadArtifact: as `load_artifact` and `load_strict`, or an artifact without a decoder.
    """
    artifact = load_artifact(directory)
    if artifact.config.objective is None or artifact.config.kind != "pretrained":
        raise BadArtifact(
            f"{directory}: its kind {artifact.config.kind!r} has no decoder; give a 'pretrained' artifact"
        )
    objective = build_objective(artifact.config.objective, build_encoder(artifact.config.model))
    load_strict(objective, artifact.tensors, source=str(directory))
    objective.artifact = artifact.config
    return objective.eval()
