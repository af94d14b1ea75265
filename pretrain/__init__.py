"""Pre-train vision backbones on unlabelled images with complementary masks (CoMA) and DyViT."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.artifact import load_artifact, load_classifier, load_encoder, save_artifact
    from pretrain.config import PretrainConfig, encoder_preset, method_preset
    from pretrain.models import DyViT, ViT, build_encoder
    from pretrain.objectives import build_objective
    from pretrain.pretrained import load_pretrained

    __version__: str

_HOME = {
    "DyViT": "pretrain.models",
    "PretrainConfig": "pretrain.config",
    "ViT": "pretrain.models",
    "build_encoder": "pretrain.models",
    "build_objective": "pretrain.objectives",
    "encoder_preset": "pretrain.config",
    "load_artifact": "pretrain.artifact",
    "load_classifier": "pretrain.artifact",
    "load_encoder": "pretrain.artifact",
    "load_pretrained": "pretrain.pretrained",
    "method_preset": "pretrain.config",
    "save_artifact": "pretrain.artifact",
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
    """Import a public name when it is first asked for, so that `import pretrain` costs nothing."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version("coma-dyvit")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pretrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
