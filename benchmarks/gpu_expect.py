"""What a GPU has to do for one training step, counted without one: kernels, bytes, FLOPs, by part.

    python benchmarks/gpu_expect.py                # CoMA DyViT-B and MAE ViT-B, batches of 64 to 1024
    python benchmarks/gpu_expect.py --models "CoMA DyViT-B" --batches 256 --variant merged

The step runs on tensors that have shapes only, under bf16 autocast with norms in float32, as on a GPU.
Counted is every operator that computes or copies, eager: one kernel each, its FLOPs, and its inputs and
outputs in bytes, as if each were moved once. The bound of an operator is the larger of FLOPs over
`--tflops` and bytes over `--tbs` (defaults: an H200 by its data sheet); a step's is their sum. No launch
takes less than a few microseconds of the CPU, so a step whose bound is below `kernels x --launch` waits for
the CPU. A compiled step fuses elementwise operators: its bound is estimated from matrix products and
attention alone, and the truth lies between. "Attention in tiles" is the arithmetic of fused attention if
every window takes whole tiles of `--tile` tokens, which the bound leaves out.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_steps.parts import Parts, kind_of
from machine import report
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from train_step import MODELS, build

from coma.models.window_variants import attention_variant

FREE = ("detach", "empty", "new_empty", "empty_like", "device", "_local_scalar_dense", "lift_fresh")
PRODUCTS = ("linear layers", "attention")
ADAMW_BYTES = 28
"""AdamW reads weight, gradient and two moments, and writes weight and moments, 4 bytes each."""


@dataclass
class Cost:
    """What a set of operators costs."""

    kernels: int = 0
    flops: float = 0.0
    moved: float = 0.0
    in_tiles: float = 0.0
    """FLOPs of attention, had every window to fill whole tiles."""
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Counter(TorchDispatchMode):
    """Adds up the costs of operators by stage (or decoder) and kind."""

    def __init__(self, parts: Parts, flops_per_s: float, bytes_per_s: float, tile: int) -> None:
        super().__init__()
        self.costs: dict[tuple[str, str], Cost] = defaultdict(Cost)
        self._parts, self._flops, self._bytes, self._tile = parts, flops_per_s, bytes_per_s, tile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if func.is_view or name in FREE or func.name().startswith("prim"):
            return out
        stack = self._parts.here()
        tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        moved = sum(map(held, tensors.values()))
        flops = flops_of(func, name, args, kwargs or {}, out)
        seconds = max(moved / self._bytes, flops / self._flops)
        place = stack[0] if stack else "loss and masks"
        in_tiles = flops * tile_waste(name, args, self._tile)
        self.costs[place, kind_of(name, stack)] += Cost(1, flops, moved, in_tiles, seconds)
        return out


def held(x: Tensor) -> int:
    """Bytes of a tensor; what is expanded counts once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def flops_of(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> float:
    """Floating-point operations of one operator; 2 for a multiplication and an addition."""
    if name.startswith("_scaled_dot_product"):
        backward = name.endswith("backward")
        q, k = args[1:3] if backward else args[:2]
        return q.shape.numel() * k.shape[-2] * (10 if backward else 4)  # five products in place of two
    count = flop_registry.get(func._overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0.0


def tile_waste(name: str, args: Any, tile: int) -> float:
    """By how much fused attention computes more than its windows need, if its tiles are `tile` wide."""
    if not name.startswith("_scaled_dot_product"):
        return 0.0
    q, k = args[1:3] if name.endswith("backward") else args[:2]
    waste = 1.0
    for length in (q.shape[-2], k.shape[-2]):
        waste *= -(-length // tile) * tile / length
    return waste


def step_costs(
    model: str, batch: int, variant: str, size: int, flops_per_s: float, bytes_per_s: float, tile: int = 128
) -> dict[tuple[str, str], Cost]:
    """The costs of one training step by (stage or decoder, kind of work)."""
    preset, method = MODELS[model]
    parts = Parts()
    layer_norm = F.layer_norm
    in_float32 = mock.patch.object(F, "layer_norm", lambda x, *rest: layer_norm(x.float(), *rest))
    with FakeTensorMode(allow_non_fake_inputs=True), in_float32, attention_variant(variant):
        objective = build(preset, str(method), size)
        images, seeds = torch.empty(batch, 3, size, size), torch.empty(batch, dtype=torch.int64)
        with parts.named(objective), Counter(parts, flops_per_s, bytes_per_s, tile) as counter:
            with torch.autocast("cpu", torch.bfloat16):
                loss = objective(images, seeds).loss
            loss.backward()
        weights = sum(p.numel() for p in objective.parameters())
    moved = weights * ADAMW_BYTES
    counter.costs["optimizer", "AdamW, fused"] = Cost(1, 0.0, moved, 0.0, moved / bytes_per_s)
    return dict(counter.costs)


def total(costs: dict[tuple[str, str], Cost], *kinds: str) -> Cost:
    """The sum of all costs, or of those of some kinds (by how they begin)."""
    return sum((cost for (_, kind), cost in costs.items() if not kinds or kind.startswith(kinds)), Cost())


def parts_of(costs: dict[tuple[str, str], Cost], step: str) -> list[dict[str, str]]:
    """A row for every part of a step, the most costly first."""
    whole = total(costs)
    return [
        {
            "step": step,
            "part": place,
            "work": kind,
            "kernels": str(cost.kernels),
            "GB": f"{cost.moved / 1e9:.2f}",
            "FLOP/byte": f"{cost.flops / cost.moved:.0f}" if cost.moved else "0",
            "share of the bound": f"{cost.seconds / whole.seconds:.1%}",
        }
        for (place, kind), cost in sorted(costs.items(), key=lambda item: -item[1].seconds)
    ]


def main() -> None:
    """Print a table of steps and, for the largest batch, one of parts; `--out` keeps the former as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = [name for name, (_, method) in MODELS.items() if method]
    parser.add_argument("--models", nargs="+", default=["CoMA DyViT-B", "MAE ViT-B"], choices=named)
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--variant", default="reference", help="of DM-MSA; see coma.models.window_variants")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bf16")
    parser.add_argument("--tbs", type=float, default=4.8, help="memory bandwidth, TB/s")
    parser.add_argument("--tile", type=int, default=128, help="tokens that a tile of fused attention takes")
    parser.add_argument("--launch", type=float, default=6.0, help="microseconds of the CPU for one operator")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    rows, detailed = [], []
    for model in args.models:
        for batch in args.batches:
            peaks = 1e12 * args.tflops, 1e12 * args.tbs
            costs = step_costs(model, batch, args.variant, args.size, *peaks, args.tile)
            whole, products = total(costs), total(costs, *PRODUCTS)
            if batch == args.batches[-1]:
                detailed += parts_of(costs, f"{model}, batch {batch}")
            launching = whole.kernels * args.launch * 1e-6
            rows.append(
                {
                    "step": model,
                    "batch": str(batch),
                    "kernels": str(whole.kernels),
                    "TFLOP": f"{whole.flops / 1e12:.2f}",
                    "attention in tiles, TFLOP": f"{whole.in_tiles / 1e12:.2f}",
                    "GB": f"{whole.moved / 1e9:.1f}",
                    "FLOP/byte": f"{whole.flops / whole.moved:.0f}",
                    "bound, ms": f"{1e3 * whole.seconds:.1f}",
                    "products alone, ms": f"{1e3 * products.seconds:.1f}",
                    "launches, ms": f"{1e3 * launching:.1f}",
                    "waits for": "the CPU" if launching > whole.seconds else "the GPU",
                }
            )
    how = f"{args.variant}; bounds at {args.tflops:g} TFLOP/s, {args.tbs:g} TB/s, {args.launch:g} us a launch"
    report(how, detailed, None)
    report(how, rows, args.out)


if __name__ == "__main__":
    main()
