"""The memory of a training step on a CPU, known before the first one from the shapes of its tensors.

Without it the system kills a process that runs out, without a word. On GPUs torch's own error tells.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coma.amp import Precision, autocast, choose_attention
from coma.config import FinetuneConfig, PretrainConfig
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.memory import GIB, PeakBytes, memory_of_process
from coma.messages import counted
from coma.models import build_encoder
from coma.models.blocks import freeze_stages
from coma.models.classifiers import build_classifier
from coma.objectives import build_objective
from coma.objectives.teachers import dummy_teacher
from pretrain.training.run_plan import RunPlan
from pretrain.training.throughput import compute_shapes

RESIDENT, RECOMPUTED = 1.25, 2.5
"""Resident memory over that of the tensors: what the allocator keeps and the kernels work in.

With `--grad-checkpointing` the blocks of large and small tensors alternate, and the allocator keeps more: 1.6
to 2.7 times the tensors were measured.
"""
SMALL = 2**14
"""Pixels of a pass that is not estimated: `large` takes 1.6 GiB then, nearly all of it for its weights."""
_CPU = torch.device("cpu")


def check_step_memory(plan: RunPlan[Any], precision: Precision, device: torch.device) -> None:
    """Refuses passes that would not fit into the free memory of a CPU.

    Passes whose size was chosen by `--micro-batch` are not looked at; neither are compiled ones.

    Raises:
        BadInput: with the memory that a pass takes, the memory that is free, and a size that would fit.
    """
    config, free = plan.config, memory_of_process(device)
    if device.type != "cpu" or free is None or config.optimizer.micro_batch or config.run.compile:
        return
    images, size = plan.slices.micro_batch, _size(config)
    if images * size.height * size.width <= SMALL:
        return
    resident = RECOMPUTED if config.run.grad_checkpointing else RESIDENT
    try:
        need = resident * step_bytes(config, images, precision)
    except RuntimeError:  # of what shapes alone do not tell; the line on FLOPs says so
        return
    if need <= free:
        return
    even = isinstance(config, FinetuneConfig) and bool(config.optimizer.mixup or config.optimizer.cutmix)
    smaller = [n for n in range(images - 1, 0, -1) if images % n == 0 and not (even and n % 2)]
    fitting = next((n for n in smaller if resident * step_bytes(config, n, precision) <= free), None)
    fits = f"--micro-batch {fitting} would fit, and keeps the batch" if fitting else "no smaller pass would"
    less = "" if config.run.grad_checkpointing else "--grad-checkpointing, "
    raise BadInput(
        f"a pass of {counted(images, 'image')} takes about {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB "
        f"are free; {fits}; so may {less}a smaller --image-size or a smaller model "
        f"(--micro-batch {images} tries this one)"
    )


def step_bytes(config: PretrainConfig | FinetuneConfig, images: int, precision: Precision) -> int:
    """Returns the bytes that a step in passes of `images` images adds to those of the model.

    Nothing is computed and no memory is taken, except for a teacher, which is built.
    """
    trained, peak = 0, PeakBytes()

    def build() -> nn.Module:
        model = _build(config)
        model.set_grad_checkpointing(config.run.grad_checkpointing)
        choose_attention(model, precision, _CPU)
        return model.train()

    def compute(model: nn.Module, images: Tensor, beside: Tensor) -> None:
        nonlocal trained
        trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
        peak.leave_out(model)
        with autocast(precision, _CPU):
            output = model(images, beside) if isinstance(config, PretrainConfig) else model(images)
        loss = output.loss if isinstance(config, PretrainConfig) else F.cross_entropy(output.float(), beside)
        loss.backward()

    compute_shapes(build, compute, (images, config.model.channels, *_size(config)), peak)
    return peak.peak + 2 * trained  # AdamW keeps two moments of every weight; Muon one


def _size(config: PretrainConfig | FinetuneConfig) -> ImageSize:
    return config.view_size if isinstance(config, PretrainConfig) else config.data.image_size


def _build(config: PretrainConfig | FinetuneConfig) -> Any:
    if isinstance(config, PretrainConfig):
        teacher = dummy_teacher(config.objective, config.model.channels)
        return build_objective(config.objective, build_encoder(config.model), teacher)
    classifier = build_classifier(config.model, len(config.class_names or ()))
    freeze_stages(classifier, config.optimizer.frozen_stages)
    return classifier
