"""Pre-train vision backbones on unlabelled images with complementary masks (CoMA) and DyViT."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coma.artifact import load_artifact, load_classifier, load_encoder, save_artifact
    from coma.config import PretrainConfig, encoder_preset, method_preset
    from coma.models import DyViT, ViT, build_encoder
    from coma.objectives import build_objective
    from coma.objectives.load import load_pretrained

    __version__: str

_HOME = {
    "DyViT": "coma.models",
    "PretrainConfig": "coma.config",
    "ViT": "coma.models",
    "build_encoder": "coma.models",
    "build_objective": "coma.objectives",
    "encoder_preset": "coma.config",
    "load_artifact": "coma.artifact",
    "load_classifier": "coma.artifact",
    "load_encoder": "coma.artifact",
    "load_pretrained": "coma.objectives.load",
    "method_preset": "coma.config",
    "save_artifact": "coma.artifact",
}

__all__ = [
    "DyViT",
    "PretrainConfig",
    "ViT",
    "build_encoder",
    "build_objective",
    "encoder_preset",
    "load_artifact",
    "load_classifier",
    "load_encoder",
    "load_pretrained",
    "method_preset",
    "save_artifact",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import coma` costs nothing."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version("coma-dyvit")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'coma' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
