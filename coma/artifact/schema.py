"""File names of an artifact, its checksums, and the names that older formats used."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from coma.atomic_io import sha256_of

RENAMED = {
    "hidden_ratio": "mask_ratio",
    "ema": "ema_decay",
    "ema_end": "ema_decay_end",
    "hidden_token": "mask_token",
}
"""Fields of an objective and last parts of tensor names that format 1 called otherwise."""
CONFIG, TENSORS = "config.json", "model.safetensors"
CHECKSUMS = "checksums"
"""Entry of `config.json` beside those of `ArtifactConfig`: SHA-256 of both files, see `with_checksums`."""

LINEAR_HEAD: dict[str, Any] = {"type": "linear", "pool": "mean"}
"""`head` of a classifier: one linear layer, `head.weight` and `head.bias`, on the mean of the last map."""

MULTI_LABEL = "multi_label"
"""Entry of `head` that is true where an image may have any number of classes: a sigmoid for each output."""


def with_checksums(plain: dict[str, Any], tensors: Path) -> dict[str, Any]:
    """Returns a description with the SHA-256 of its content and of the file of tensors."""
    return plain | {CHECKSUMS: {CONFIG: content_sha256(plain), TENSORS: sha256_of(tensors)}}


def content_sha256(plain: dict[str, Any]) -> str:
    """SHA-256 of a description without its checksums, however it is indented and ordered."""
    content = {name: value for name, value in plain.items() if name != CHECKSUMS}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of Python, torch, timm and this package, from their metadata; nothing is imported."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "timm", "coma-dyvit"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
