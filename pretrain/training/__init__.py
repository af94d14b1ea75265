"""Training: one loop for all objectives, on one process or many, that can stop and go on anywhere."""

from pretrain.training.nonfinite_replay import Replay, replay_nonfinite
from pretrain.training.trainer import pretrain

__all__ = ["Replay", "pretrain", "replay_nonfinite"]
