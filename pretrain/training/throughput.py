"""Throughput: images per second, share of time waiting for data, and model FLOPs utilisation (MFU).

Model FLOPs utilisation counts the arithmetic that the model needs, forward and backward, recomputation not
included (Chowdhery et al. 2022, PaLM, appendix B).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coma.config import EncoderConfig, FinetuneConfig, ObjectiveConfig, PretrainConfig
from coma.image_size import ImageSize
from coma.masking.patchify import unit_grid
from coma.models import build_encoder
from coma.models.classifiers import build_classifier
from coma.objectives import build_objective
from coma.objectives.teachers import dummy_teacher
from pretrain.training.distributed import Processes

_PEAK = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 149.7,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 6000 Ada": 364,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
    "V100-PCIE": 112,
    "V100": 125,
    "T4": 65,
}
"""Dense 16-bit tensor-core TFLOP/s with 32-bit accumulation (bf16; fp16 before Ampere), from NVIDIA's data
sheets and architecture white papers; longer names first where one begins with another."""


def peak_flops(device_name: str) -> float | None:
    """Returns the peak 16-bit FLOP/s of a GPU by its driver's name for it; None when it is not known."""
    for name, tera in _PEAK.items():
        if re.search(rf"\b{re.escape(name)}\b", device_name):
            return tera * 1e12
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """Returns the peak FLOP/s of a device in a precision, where it is known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_flops(torch.cuda.get_device_name(device))


@cache
def training_flops(
    model: EncoderConfig, objective: ObjectiveConfig, image_size: int | tuple[int, int]
) -> float:
    """Returns the FLOPs of one pre-training step per image; a multiplication and an addition count as two.

    The count covers everything that a step computes, including a teacher and a moving average of the encoder.
    It uses tensors that have only shapes: nothing is computed, no random number is drawn, and no memory is
    taken, except for the teacher, which is built (timm's networks without their weights).

    Raises:
        BadInput: the teacher does not exist.
    """
    shape = model.channels, *ImageSize.of(image_size)
    teacher = dummy_teacher(objective, model.channels)
    return _count_flops(
        lambda: build_objective(objective, build_encoder(model), teacher),
        lambda o, x, y: o(x, y).loss.backward(),
        shape,
    )


@cache
def encoder_flops(model: EncoderConfig, image_size: int | tuple[int, int]) -> float:
    """Returns the FLOPs of the encoder's forward pass on one whole image."""
    shape = model.channels, *ImageSize.of(image_size)
    return _count_flops(lambda: build_encoder(model).eval(), lambda encoder, x, _: encoder(x), shape)


def views_per_image(config: PretrainConfig) -> int:
    """Returns the views that a step encodes of every image (CoMA: K, MAE: 1), as the objective draws them."""
    with torch.device("meta"):
        objective = build_objective(config.objective, build_encoder(config.model))
    grid = unit_grid(*config.view_size, config.model.unit)
    return len(objective.draw_visible(torch.zeros(1, dtype=torch.int64), *grid))


@cache
def finetuning_flops(model: EncoderConfig, classes: int, image_size: int | tuple[int, int]) -> float:
    """Returns the FLOPs of one training step of a classifier per image."""
    shape = model.channels, *ImageSize.of(image_size)
    return _count_flops(
        lambda: build_classifier(model, classes), lambda c, x, y: F.cross_entropy(c(x), y).backward(), shape
    )


def _count_flops(
    build: Callable[[], nn.Module],
    compute: Callable[[nn.Module, Tensor, Tensor], object],
    shape: tuple[int, ...],
) -> float:
    counter, images = FlopCounterMode(display=False), 2
    with sdpa_kernel(SDPBackend.MATH):  # a CPU's fused kernels do not count
        compute_shapes(build, compute, (images, *shape), counter)
    return counter.get_total_flops() / images


def compute_shapes(
    build: Callable[[], nn.Module],
    compute: Callable[[nn.Module, Tensor, Tensor], object],
    shape: tuple[int, ...],
    counter: AbstractContextManager[object],
) -> None:
    """Computes on tensors that have only shapes: images of `shape` [b, c, H, W] and b labels or seeds.

    Args:
        build: Builds the model, on the device meta.
        compute: Takes the model, the images and what is beside them.
        shape: Shape of the images.
        counter: Context of the computation.
    """
    with torch.device("meta"):  # timm reads numbers from tensors where it builds networks, which fakes refuse
        model = build()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch's own deepcopy
        model.to_empty(device="cpu")
        with counter:
            compute(model, torch.empty(shape), torch.empty(shape[0], dtype=torch.int64))


def flops_per_image(config: PretrainConfig | FinetuneConfig) -> float:
    """Returns the FLOPs of one training step of a run per image; see `training_flops`."""
    model, size = config.model, config.data.image_size
    if isinstance(config, PretrainConfig):
        return training_flops(model, config.objective, config.view_size)
    return finetuning_flops(model, len(config.class_names or ()), size)


def peak_memory(device: torch.device) -> float | None:
    """Returns the peak memory in GiB: of torch on a GPU, of the process on a CPU; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.exists():  # getrusage's figure may be the parent's
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
    return int(line.split()[1]) / 2**20 if line else None


class Meter:
    """Measures the speed since the last log point.

    Args:
        config: The run.
        group: The processes; only process 0 computes the MFU.
        precision: Number format of the forward pass.
        warn: Receives a message when the MFU cannot be computed.
    """

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        group: Processes,
        precision: str,
        warn: Callable[[str], object],
    ) -> None:
        self._batch = config.optimizer.batch_size
        self._device = group.device
        self._steps, self._seconds, self._waited, self._computed = 0, 0.0, 0.0, 0.0
        self._full_use: float | None = None
        peak = device_peak(group.device, precision) if group.main else None
        if peak:
            try:
                self._full_use = peak * group.world / flops_per_image(config)
            except RuntimeError as error:
                warn("MFU will not be shown: " + str(error).partition("\n")[0])

    def add(self, seconds: float, waited: float, computed: float) -> None:
        """Adds a step of `seconds`, `waited` of them for data, that took `computed` CPU seconds."""
        self._steps += 1
        self._seconds += seconds
        self._waited += waited
        self._computed += computed

    def take(self) -> dict[str, Any]:
        """Returns the values to log and resets the counters."""
        speed = self._steps * self._batch / self._seconds
        values = {"images_per_s": round(speed, 2), "data_wait": round(self._waited / self._seconds, 4)}
        if self._device.type == "cpu":
            values["cpu_s"] = round(
                self._computed / self._steps, 6
            )  # of a step: all threads, no data workers
        if self._full_use:
            values["mfu"] = round(speed / self._full_use, 4)
        memory = peak_memory(self._device)
        if memory is not None:
            values["memory_gib"] = round(memory, 2)
        self._steps, self._seconds, self._waited, self._computed = 0, 0.0, 0.0, 0.0
        return values
