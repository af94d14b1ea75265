"""Training: one loop for all objectives, on one process or many, resumable after any interruption."""

from pretrain.training.nonfinite_replay import Replay, replay_nonfinite
from pretrain.training.pretraining import pretrain

__all__ = ["Replay", "pretrain", "replay_nonfinite"]
