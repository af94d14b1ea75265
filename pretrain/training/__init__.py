"""Training: one loop for all objectives, on one process or many, that can stop and go on anywhere."""

from pretrain.finetune.run import Finetuned, finetune
from pretrain.training.nonfinite_replay import Replay, replay_nonfinite
from pretrain.training.trainer import pretrain

__all__ = ["Finetuned", "Replay", "finetune", "pretrain", "replay_nonfinite"]
