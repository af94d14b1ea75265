"""The only hand-over between rooms: a directory with `model.safetensors` and `config.json`.

    artifact/config.json         what the model is and how it was trained, readable by people
    artifact/model.safetensors   its tensors; the file's own metadata repeats the format version

Four promises. Nothing is unpickled. Loading is strict: tensors that are missing, unexpected or of
another shape are listed and refused, never skipped. Saving over an artifact never loses it: the new
one is complete on disk before the old one steps aside, and in the moment in which neither carries the
name, loading finds the old one where it was put. `config.json` holds the SHA-256 of both files, and loading
compares them: an artifact that a disk, a copy or an edit changed is refused.
"""

from coma.artifact.load import (
    Artifact,
    is_multi_label,
    load_artifact,
    load_classifier,
    load_encoder,
    load_strict,
)
from coma.artifact.save import save_artifact
from coma.artifact.schema import CHECKSUMS, LINEAR_HEAD, MULTI_LABEL, library_versions
from coma.config.artifact import ArtifactConfig

__all__ = [
    "CHECKSUMS",
    "LINEAR_HEAD",
    "MULTI_LABEL",
    "Artifact",
    "ArtifactConfig",
    "is_multi_label",
    "library_versions",
    "load_artifact",
    "load_classifier",
    "load_encoder",
    "load_strict",
    "save_artifact",
]
