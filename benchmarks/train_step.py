"""One training step, side by side: CoMA on DyViT, MAE on ViT, and timm's Hiera and Swin for scale.

    python benchmarks/train_step.py                         # what fits the machine, eager and compiled
    python benchmarks/train_step.py --models "CoMA DyViT-B" "MAE ViT-B" --no-compile --batch 8
    python benchmarks/train_step.py --profile --no-compile  # and where the time of an eager step goes

A step is forward, loss, backward and AdamW on synthetic images (224 px; by default bf16 autocast on a GPU
and fp32 on a CPU, as the trainer chooses). The peers are whole objectives where there is one (MAE: 75 %
hidden, decoder 8 x 512) and otherwise the bare encoder with a mean as its loss, which leaves out any decoder.
All models are built first and timed in turn, round after round, so that a slow minute of the machine hits all
of them; the median round counts.
Views are what a step supervises from: K for CoMA, 1 for the others. Peak memory is the device's on a GPU
and the resident set of a child process on a CPU.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import timm
import torch
from machine import report, time_in_turn, wait
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coma.amp import Precision, autocast, choose_attention, choose_precision
from coma.config import DyViTConfig, encoder_preset, method_preset
from coma.models import build_encoder
from coma.objectives import build_objective
from pretrain.training.throughput import peak_flops, peak_memory

MODELS = {
    "CoMA DyViT-T": ("tiny", "coma"),
    "MAE ViT-T": ("vit-tiny", "mae"),
    "CoMA DyViT-S": ("small", "coma"),
    "MAE ViT-S": ("vit-small", "mae"),
    "CoMA DyViT-B": ("base", "coma"),
    "MAE ViT-B": ("vit-base", "mae"),
    "encoder Hiera-S": ("hiera_small_224", None),
    "encoder Swin-S": ("swin_small_patch4_window7_224", None),
    "encoder Hiera-B": ("hiera_base_224", None),
    "encoder Swin-B": ("swin_base_patch4_window7_224", None),
}


def build(preset: str, method: str, size: int) -> nn.Module:
    """An objective; of the tiny presets one with fewer blocks and a smaller decoder, for dry runs."""
    encoder, decoder = encoder_preset(preset, size), {}
    if "tiny" in preset:
        fewer = {"depths": (1, 1, 2, 1)} if isinstance(encoder, DyViTConfig) else {"depth": 2}
        encoder, decoder = replace(encoder, **fewer), {"decoder_dim": 64, "decoder_depth": 1}
    return build_objective(method_preset(method, **decoder), build_encoder(encoder))


class Features(nn.Module):
    """A timm encoder whose loss is the mean square of its features: the cost of an encoder alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = timm.create_model(name, num_classes=0)

    def forward(self, images: Tensor, seeds: Tensor) -> Tensor:
        """The loss."""
        return self.encoder(images).square().mean()


class Step:
    """A model with its optimizer; calling it trains one batch of images of `size` pixels."""

    def __init__(self, name: str, device: torch.device, precision: Precision, size: int = 224) -> None:
        preset, method = MODELS[name]
        torch.manual_seed(0)
        self.name, self.device, self.size = name, device, size
        self.precision: Precision = precision
        self.model = (build(preset, method, size) if method else Features(preset)).to(device)
        choose_attention(self.model, precision, device)
        self.views = 2 if method == "coma" else 1
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def __call__(self, batch: int) -> None:
        """Train one batch of random images."""
        images = torch.randn(batch, 3, self.size, self.size, device=self.device)
        seeds = torch.arange(batch, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, self.device):
            out = self.model(images, seeds)
        (out if isinstance(out, Tensor) else out.loss).backward()
        self.optimizer.step()

    def flops(self) -> float:
        """Floating-point operations of forward and backward for one image (2 per multiply-accumulate)."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            image = torch.zeros(1, 3, self.size, self.size, device=self.device)
            out = self.model(image, torch.zeros(1, dtype=torch.int64, device=self.device))
            (out if isinstance(out, Tensor) else out.loss).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def held(self) -> int:
        """Bytes of weights, buffers and optimizer state."""
        states = (state for of_one in self.optimizer.state.values() for state in of_one.values())
        tensors = (*self.model.parameters(), *self.model.buffers(), *states)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def parameters(self) -> tuple[int, int]:
        """Returns the number of parameters of the encoder, and of everything that trains."""
        encoder = self.model.encoder
        return tuple(sum(p.numel() for p in m.parameters()) for m in (encoder, self.model))  # type: ignore


def largest_batch(step: Step, most: int = 8192) -> int:
    """The largest power of two, up to `most`, whose step fits on the GPU."""
    batch = 64
    while batch < most:
        try:
            step(2 * batch)
        except torch.cuda.OutOfMemoryError:
            step.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return batch
        batch *= 2
    return batch


def memory_of(step: Step, batch: int) -> float:
    """GiB that one step needs."""
    if step.device.type == "cuda":
        step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - step.held()
        step(batch)
        return (torch.cuda.max_memory_allocated() - others) / 2**30
    command = [sys.executable, __file__, "--child", step.name, "--batch", str(batch)]
    command += ["--precision", step.precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(name: str, batch: int, precision: Precision) -> None:
    """Print the resident memory, in GiB, that a step adds to a process that has imported everything."""
    device = torch.device("cpu")
    before = peak_memory(device) or math.nan
    step = Step(name, device, precision)
    step(batch)
    step(batch)
    print((peak_memory(device) or math.nan) - before)


def images_per_second(steps: dict[str, Step], batches: dict[str, int], rounds: int) -> dict[str, float]:
    """Returns the speed of every model."""
    actions = {name: partial(step, batches[name]) for name, step in steps.items()}
    device = next(iter(steps.values())).device
    return {name: batches[name] / each for name, each in time_in_turn(actions, rounds, device).items()}


_KINDS = {  # operators by how their names begin
    "products": ("mm", "addmm", "bmm", "baddbmm", "convolution"),
    "attention": ("_scaled_dot_product", "_efficient_attention", "_flash_attention", "_cudnn_attention"),
    "copies": ("copy_", "cat", "index_select", "index_add_", "clone"),
    "norms": ("native_layer_norm",),
}


def time_shares(step: Step, batch: int) -> dict[str, str]:
    """Share of an eager step's time by kind of operator; the rest is elementwise for the most part."""
    with torch.profiler.profile(acc_events=True) as profile:
        step(batch)
        wait(step.device)
    on_gpu = step.device.type == "cuda"
    spent = dict.fromkeys([*_KINDS, "rest"], 0.0)
    for event in profile.key_averages():
        name = event.key.removeprefix("aten::").replace("mkldnn_", "")
        seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[next((kind for kind, names in _KINDS.items() if name.startswith(names)), "rest")] += seconds
    return {kind: f"{seconds / sum(spent.values()):.0%}" for kind, seconds in spent.items()}


def main() -> None:
    """Measure and print the table; `--out` keeps it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS)[2:], choices=list(MODELS))
    parser.add_argument(
        "--batch", type=int, help="images per step (default: 8 on CPU, the largest that fits on GPU)"
    )
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true", help="add where the time of an eager step goes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(args.precision, device)
    if args.child:
        return child(args.child, args.batch, precision)

    steps = {name: Step(name, device, precision) for name in args.models}
    flops = {name: step.flops() for name, step in steps.items()}
    batches = {
        name: args.batch or (largest_batch(step) if device.type == "cuda" else 8)
        for name, step in steps.items()
    }
    memory = {name: memory_of(step, batches[name]) for name, step in steps.items()}
    speeds = {"eager": images_per_second(steps, batches, args.rounds)}
    shares = {name: time_shares(step, batches[name]) for name, step in steps.items()} if args.profile else {}
    if args.compile:
        for step in steps.values():
            step.model.compile(dynamic=False)  # as the trainer does
        speeds["compiled"] = images_per_second(steps, batches, args.rounds)

    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    rows = []
    for name, step in steps.items():
        encoder, total = step.parameters()
        row = {
            "step": name,
            "encoder M": f"{encoder / 1e6:.1f}",
            "all M": f"{total / 1e6:.1f}",
            "GFLOP/image": f"{flops[name] / 1e9:.1f}",
            "batch": str(batches[name]),
            "peak GiB": f"{memory[name]:.1f}",
        }
        for mode, measured in speeds.items():
            row[f"{mode} images/s"] = (
                f"{measured[name]:.2f}" if measured[name] < 100 else f"{measured[name]:.0f}"
            )
            row[f"{mode} views/s"] = f"{measured[name] * step.views:.2f}"
            if peak:
                row[f"{mode} MFU"] = f"{measured[name] * flops[name] / peak:.1%}"
            reference = "MAE ViT-B"
            if reference in measured:
                row[f"{mode} time / {reference}"] = f"{measured[reference] / measured[name]:.2f}"
        rows.append(row | shares.get(name, {}))
    how = f"{precision}, median of {args.rounds} rounds, 224 px"
    report(how, rows, args.out)


if __name__ == "__main__":
    main()
