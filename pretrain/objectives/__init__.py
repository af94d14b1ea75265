"""Pre-training objectives, one page each; the training loop knows only their shared interface."""

from __future__ import annotations

from pretrain.config import BeyondConfig, CoMAConfig, ObjectiveConfig
from pretrain.models import Encoder
from pretrain.objectives.base import MaskedPixels, ObjectiveOutput
from pretrain.objectives.beyond import Beyond
from pretrain.objectives.coma import CoMA
from pretrain.objectives.mae import MAE

Objective = MaskedPixels

__all__ = ["MAE", "Beyond", "CoMA", "MaskedPixels", "Objective", "ObjectiveOutput", "build_objective"]


def build_objective(config: ObjectiveConfig, encoder: Encoder) -> Objective:
    """The objective that `config` describes, around `encoder`, with a fresh decoder."""
    match config:
        case CoMAConfig():
            return CoMA(config, encoder)
        case BeyondConfig():
            return Beyond(config, encoder)
    return MAE(config, encoder)
