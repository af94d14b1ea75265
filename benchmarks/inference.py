"""Encoders side by side without gradients: images per second at 224 px and at detection size.

    python benchmarks/inference.py                                  # what fits the machine
    python benchmarks/inference.py --models DyViT-B ViT-B --sizes 224x224 --batches 1 8

DyViT against timm's ViT, Swin, Hiera and ConvNeXt of like size, features only (no head), bf16 on a GPU and
fp32 on a CPU, eager or compiled. 800 x 1344 is what detectors train and test at. Models are timed in turn,
round after round; the median counts.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from machine import report, time_in_turn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coma.config import encoder_preset
from coma.models import build_encoder

_PRESETS = {"DyViT-S": "small", "DyViT-B": "base"}
_TIMM = {
    "ViT-B": ("vit_base_patch16_224", {"dynamic_img_size": True}),
    "Swin-B": ("swin_base_patch4_window7_224", {"strict_img_size": False}),
    "Hiera-B": ("hiera_base_224", {}),
    "ConvNeXt-B": ("convnext_base", {}),
}
MODELS = (*_PRESETS, *_TIMM)


class Features(nn.Module):
    """An encoder without its head, for images of `size` (height, width)."""

    def __init__(self, name: str, size: tuple[int, int]) -> None:
        super().__init__()
        if name in _PRESETS:
            self.encoder: nn.Module = build_encoder(encoder_preset(_PRESETS[name]))
            return
        architecture, options = _TIMM[name]
        if name in ("Swin-B", "Hiera-B"):  # made for one size
            options = {**options, "img_size": size}
        self.encoder = timm.create_model(architecture, num_classes=0, **options)

    def forward(self, images: Tensor) -> Tensor:
        """The last features."""
        return cast(Any, self.encoder).forward_features(images)


def run(model: nn.Module, images: Tensor) -> None:
    """One pass without gradients."""
    half = images.device.type == "cuda"
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        model(images)


def gmacs(model: nn.Module, images: Tensor) -> float:
    """Billions of multiply-accumulates of one image."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(model, images[:1])
    return counter.get_total_flops() / 2e9


def main() -> None:
    """Measure and print a table for every size and batch; `--out` keeps them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--sizes", nargs="+", default=["224x224", "800x1344"], help="HxW in pixels")
    parser.add_argument(
        "--batches",
        nargs="+",
        type=int,
        default=[1, 128] if on_gpu else [1, 8],
        help="images of 224 px; of larger ones as many as have the same number of pixels",
    )
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = torch.device("cuda" if on_gpu else "cpu")
    rows = []
    for size in args.sizes:
        height, width = map(int, size.split("x"))
        models = {name: Features(name, (height, width)).eval().to(device) for name in args.models}
        image = torch.zeros(1, 3, height, width, device=device)
        counts = {name: gmacs(model, image) for name, model in models.items()}
        if args.compile:
            for model in models.values():
                model.compile(dynamic=False)
        batches = {1 if n == 1 else max(1, n * 224 * 224 // (height * width)) for n in args.batches}
        for batch in sorted(batches):
            images = torch.randn(batch, 3, height, width, device=device)
            actions = {name: partial(run, model, images) for name, model in models.items()}
            for name, seconds in time_in_turn(actions, args.rounds, device).items():
                parameters = sum(p.numel() for p in models[name].parameters())
                rows.append(
                    {
                        "size": size,
                        "batch": str(batch),
                        "encoder": name,
                        "M": f"{parameters / 1e6:.1f}",
                        "GMACs": f"{counts[name]:.1f}",
                        "images/s": f"{batch / seconds:.3g}",
                        "ms/image": f"{1e3 * seconds / batch:.3g}",
                    }
                )
    precision, mode = "bf16" if on_gpu else "fp32", "compiled" if args.compile else "eager"
    how = f"{precision}, {mode}, median of {args.rounds} rounds"
    report(how, rows, args.out)


if __name__ == "__main__":
    main()
