"""The training loop: one for all objectives.

    for every step: learn, log, save, draw, and stop when asked to

Nothing in here knows a method, a model or a file format.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.config import PretrainConfig
from pretrain.data import Batch, evaluation_batches, training_batches
from pretrain.errors import BadInput, CheckFailed, Interrupted
from pretrain.models import build_encoder
from pretrain.objectives import build_objective
from pretrain.training.distributed import AGREED, Processes, processes
from pretrain.training.keeping import Keeper
from pretrain.training.learner import Learner, NotFinite
from pretrain.training.metrics import Window
from pretrain.training.nonfinite import save_nonfinite
from pretrain.training.optimizer import learning_rate
from pretrain.training.precision import choose_precision
from pretrain.training.report import Report
from pretrain.training.setup import Plan, prepare
from pretrain.training.signals import StopRequest
from pretrain.training.throughput import device_peak, training_flops
