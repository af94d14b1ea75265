"""Starts a detector or segmentor from the artifact of another one: its architecture and its weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coma.artifact.schema import TENSORS
from downstream.configs.adapt import EncoderSpec

if TYPE_CHECKING:
    from downstream.artifacts import Kind

log = logging.getLogger(__name__)


def whole_model(encoder: EncoderSpec, kind: Kind) -> Any:
    """Returns the settings of the model around the encoder; None if the artifact is of another kind.

    What its training froze, or recomputed to save memory, is left out.

    Raises:
        BadArtifact: settings that would make mmengine import or execute other code.
    """
    from downstream.artifacts import model_settings, register_modules

    about = encoder.about
    if about is None or about.kind != kind:
        return None
    register_modules(about)
    settings = model_settings(about.head or {})
    for name in ("frozen_stages", "with_cp"):
        settings.backbone.pop(name, None)
    return settings


def load_whole(config: Any, encoder: EncoderSpec, kind: Kind) -> None:
    """Makes a configuration start from all of the artifact that fits, if it holds a model of the kind."""
    if encoder.about is None or encoder.about.kind in ("backbone", "pretrained"):
        return
    place = encoder.backbone["artifact"]
    if encoder.about.kind == kind:
        config.load_from = str(Path(place, TENSORS))
    else:
        log.info("starts from the encoder of the %s %s; the rest is new", encoder.about.kind, place)
