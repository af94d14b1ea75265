"""Complementary views that are worth the same: balanced by where a frozen teacher looks. This project's own.

CoMA (Li et al. 2025, arXiv 2511.05929) shares units out at random, so one view may get the object and another
the sky. Here units are ranked by a teacher's attention (see `models.attention_maps`), and every K consecutive
ones of the ranking are shared out at random, one to each of the K views: sizes stay equal, every pixel stays
supervised equally often, and every view gets about as much of what the teacher looks at (not where one unit
has most of it). Nothing else changes; the teacher gives no targets.
"""

from __future__ import annotations

from torch import Tensor

from coma.config import BalancedCoMAConfig
from coma.masking.sampling import deal, eager
from coma.models import Encoder
from coma.models.teacher import Teacher
from coma.objectives.coma import CoMA


class BalancedCoMA(CoMA):
    """Balanced complementary masks.

    Args:
        config: Number of views, norm-pix, decoder.
        encoder: Any encoder of this room.
        teacher: Without one, it reconstructs but does not learn: what an artifact holds.
    """

    picture_note = "These views are drawn at random, not balanced by the teacher's attention as in training."

    def __init__(self, config: BalancedCoMAConfig, encoder: Encoder, teacher: Teacher | None = None) -> None:
        super().__init__(config, encoder)
        self._teacher = teacher

    @eager
    def assign_units(self, images: Tensor, seeds: Tensor, h: int, w: int) -> Tensor:
        """Returns the view of every unit, int64 `[b, h, w]`."""
        if self._teacher is None:
            raise RuntimeError("balanced CoMA without its teacher reconstructs, but does not learn")
        _, attention = self._teacher(images, h, w)
        return deal(attention, seeds, self.config.views)
