"""Mixed precision: parameters, optimizer and loss stay in float32.

In 16-bit training autocast takes products in 16 bits, and with them the activations that DyViT's merges, a
ViT's stem and the decoder hand on; norms, softmax and the loss are float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from coma.errors import BadInput

Precision = Literal["fp32", "bf16", "fp16"]

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(wanted: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """Returns the precision for "auto": bf16 on GPUs that support it, fp16 on older ones, else fp32.

    Raises:
        BadInput: bf16 on a GPU without it, or fp16 on mps.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "fp32" if device.type != "cuda" else "bf16" if has_bf16 else "fp16"
    if wanted == "bf16" and not has_bf16:
        raise BadInput(f"--precision bf16: {torch.cuda.get_device_name(device)} has none; use fp16 or fp32")
    if wanted == "fp16" and device.type == "mps":
        raise BadInput("--precision fp16 on mps is not supported; use bf16 or fp32")
    return wanted


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Returns the context of a forward pass."""
    kind = _TYPES.get(precision)
    return torch.autocast(device.type, dtype=kind, enabled=kind is not None)


def choose_attention(model: nn.Module, precision: Precision, device: torch.device) -> None:
    """Makes attention layers use torch's fused kernels, except for 16-bit training on a CPU.

    There two products and a softmax take a tenth to a sixth of the time (torch 2.11; `benchmarks/LOG.md`).
    """
    fused = device.type != "cpu" or precision == "fp32"
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # timm's name, ours too
            module.fused_attn = fused  # type: ignore[assignment]


def build_scaler(precision: Precision, device: torch.device) -> GradScaler:
    """Loss scaling for fp16 (Micikevicius et al. 2018, sec. 3.2); passes everything through otherwise."""
    return GradScaler(device.type, enabled=precision == "fp16")
