"""Pre-training objectives, one file each; the training loop knows only their shared interface."""

from __future__ import annotations

from coma.config import BalancedCoMAConfig, BeyondConfig, CMTConfig, CoMAConfig, ObjectiveConfig
from coma.models import Encoder
from coma.models.teacher import Teacher
from coma.objectives.balanced import BalancedCoMA
from coma.objectives.base import MaskedPixels, ObjectiveOutput
from coma.objectives.beyond import Beyond
from coma.objectives.cmt import CMT
from coma.objectives.coma import CoMA
from coma.objectives.mae import MAE

Objective = MaskedPixels

__all__ = [
    "CMT",
    "MAE",
    "BalancedCoMA",
    "Beyond",
    "CoMA",
    "MaskedPixels",
    "Objective",
    "ObjectiveOutput",
    "build_objective",
]


def build_objective(config: ObjectiveConfig, encoder: Encoder, teacher: Teacher | None = None) -> Objective:
    """The objective that `config` describes, around `encoder`, with a fresh decoder.

    CMT and balanced CoMA learn from a teacher; without one they are what an artifact holds, and reconstruct.
    """
    match config:
        case CMTConfig():
            return CMT(config, encoder, teacher)
        case BalancedCoMAConfig():
            return BalancedCoMA(config, encoder, teacher)
        case CoMAConfig():
            return CoMA(config, encoder)
        case BeyondConfig():
            return Beyond(config, encoder)
    return MAE(config, encoder)
