"""Pre-train vision backbones on unlabelled images with complementary masks (CoMA) and DyViT."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

_CORE = {
    "ArtifactConfig": "coma.config.artifact",
    "BadArtifact": "coma.errors",
    "BadInput": "coma.errors",
    "ComaError": "coma.errors",
    "DyViT": "coma.models",
    "PretrainConfig": "coma.config",
    "ViT": "coma.models",
    "build_encoder": "coma.models",
    "build_objective": "coma.objectives",
    "create_timm": "coma.artifact.to_timm",
    "encoder_preset": "coma.config",
    "load_artifact": "coma.artifact",
    "load_classifier": "coma.artifact",
    "load_encoder": "coma.artifact",
    "load_pretrained": "coma.objectives.load",
    "method_preset": "coma.config",
    "open_runtime": "coma.runtimes.open",
    "save_artifact": "coma.artifact",
}
"""Public names of the core, and the modules that they live in."""

_ROOMS = ("Callback", "classify", "embed", "evaluate", "export", "fit_backbone", "pretrain")
"""Public names of rooms, which announce them as entry points of the group `coma.api`: nothing here imports
a room."""

__all__ = [*_CORE, *_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]  # the stub lists them


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import coma` costs nothing."""
    if name == "__version__":
        value = metadata.version("coma-dyvit")
    elif name in _CORE:
        value = getattr(importlib.import_module(_CORE[name]), name)
    elif name in _ROOMS and (entries := metadata.entry_points(group="coma.api", name=name)):
        value = importlib.import_module("coma.rooms").load(next(iter(entries)))
    else:
        raise AttributeError(f"module 'coma' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
