"""What the machine is, and how fast it copies and multiplies at best: all else is held against that."""

from __future__ import annotations

import os
import platform

import torch
from machine import describe, version_of

from coma.devices import cores
from gpu_steps.session import Session, median_seconds
from pretrain.training.throughput import peak_flops

PACKAGES = (
    *("torch", "torchvision", "triton", "timm", "numpy", "einops", "safetensors", "tyro", "cattrs"),
    *("onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "mmengine", "mmdet", "mmsegmentation"),
    *("mmcv-lite", "imagecodecs", "coma-dyvit"),
)


def run(session: Session) -> None:
    """Facts first, then the ceilings."""
    device = session.device
    facts = {"machine": describe(), "system": platform.platform(), "cores": cores(), "cpus": os.cpu_count()}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(0)
        facts |= {
            "GPU": about.name,
            "GiB": about.total_memory / 2**30,
            "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}",
            "CUDA": torch.version.cuda or "none",
            "cuDNN": torch.backends.cudnn.version() or 0,
            "data sheet TFLOP/s": (peak_flops(about.name) or 0) / 1e12,
        }
    session.add("machine", facts)
    session.add("versions", {name: version_of(name) for name in PACKAGES})

    side = 512 if session.small else 8192
    dtype = torch.float32 if session.small else torch.bfloat16
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = median_seconds(lambda: one @ other, device, seconds=1.0)
    session.add(f"product of {side} x {side}, {str(dtype)[6:]}", TFLOP_per_s=2 * side**3 / seconds / 1e12)
    count = 2**20 if session.small else 2**31
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, seconds=1.0)
    session.add("copy, bytes read and written", TB_per_s=2 * source.nbytes / seconds / 1e12)
    tiny = torch.zeros(1, device=device)
    many = 1000

    def launches() -> None:
        for _ in range(many):
            tiny.add_(1)

    seconds = median_seconds(launches, device, seconds=0.5)
    session.add("one launch, eager", microseconds=1e6 * seconds / many)
