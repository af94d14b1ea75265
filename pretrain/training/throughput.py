"""How well the hardware is used: FLOPs of a training step against the peak of the GPU (MFU).

Model FLOPs utilisation counts the arithmetic that the model needs, forward and backward, recomputation not
included (Chowdhery et al. 2022, PaLM, appendix B).
"""

from __future__ import annotations

import re

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import EncoderConfig, ObjectiveConfig
from pretrain.models import build_encoder
from pretrain.objectives import build_objective

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
    """Peak 16-bit FLOP/s of a GPU by the name that its driver gives; None when it is not known."""
    for name, tera in _PEAK.items():
        if re.search(rf"\b{re.escape(name)}\b", device_name):
            return tera * 1e12
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of this device in this precision, where it is known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def training_flops(model: EncoderConfig, objective: ObjectiveConfig, image_size: int) -> float:
    """FLOPs of one training step per image; a multiplication and an addition count as two.

    Counted on tensors that have shapes only: nothing is computed, no memory taken, no random number drawn.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # fused kernels of a CPU are not counted
        learner = build_objective(objective, build_encoder(model))
        images = torch.empty(2, model.channels, image_size, image_size)
        seeds = torch.empty(2, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            learner(images, seeds).loss.backward()
    return counter.get_total_flops() / len(images)
