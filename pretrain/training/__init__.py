"""Training: one loop for all objectives, on one process or many, that can stop and go on anywhere."""

from pretrain.training.finetuning import Finetuned, finetune
from pretrain.training.loop import pretrain
from pretrain.training.nonfinite import Replay, replay_nonfinite

__all__ = ["Finetuned", "Replay", "finetune", "pretrain", "replay_nonfinite"]
