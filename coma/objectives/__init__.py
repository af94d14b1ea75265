"""Pre-training objectives, one file each; the training loop knows only their shared interface."""

from __future__ import annotations

from coma.config import ObjectiveConfig
from coma.models import Encoder
from coma.models.teacher import Teacher
from coma.objectives.base import MaskedPixels, ObjectiveOutput
from coma.registry import entry_of, resolve

Objective = MaskedPixels

__all__ = ["MaskedPixels", "Objective", "ObjectiveOutput", "build_objective"]


def build_objective(config: ObjectiveConfig, encoder: Encoder, teacher: Teacher | None = None) -> Objective:
    """Returns the objective that `config` describes, around `encoder`, with a fresh decoder.

    Methods whose settings name a teacher learn from it; without one they can reconstruct and nothing else.
    """
    kind = resolve(entry_of(config).objective)
    return kind(config, encoder) if config.teacher is None else kind(config, encoder, teacher)
