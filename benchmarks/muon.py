"""What Muon costs: a whole training step with AdamW and with Muon, at the batch of the small-data recipe.

    python benchmarks/muon.py --out benchmarks/results/muon_cpu.json
    python benchmarks/muon.py --models narrow --batch 16 --out benchmarks/results/muon_narrow_cpu.json

A step is forward, loss, backward and update at 64 px on random images. Steps of both optimizers, and of
`torch.optim.Muon` in the place of our Muon, are timed in turn; the median round counts. The cost of Muon does
not grow with the batch. `narrow` is the DyViT of 16 channels that the leaderboard trains.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import report, time_in_turn
from torch import nn

from coma.config import OptimizerConfig, decoder_dim, encoder_preset, method_preset
from coma.models import build_encoder
from coma.objectives import build_objective
from pretrain.training.muon import MuonWithAdamW
from pretrain.training.optimizer import build_optimizer

SIDE = 64
NARROW: dict[str, Any] = {"dim": 16, "heads": (2, 2, 4, 8)}


def build(preset: str, method: str) -> nn.Module:
    """Returns a fresh objective."""
    torch.manual_seed(0)
    model = (
        replace(encoder_preset("tiny", SIDE), **NARROW)
        if preset == "narrow"
        else encoder_preset(preset, SIDE)
    )
    return build_objective(method_preset(method, decoder_dim=decoder_dim(model)), build_encoder(model))


class TorchMuon(MuonWithAdamW):
    """The same optimizer with torch's steps of Muon, one matrix after the other."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the parameters."""
        if not hasattr(self, "theirs"):
            kept = ("params", "lr", "weight_decay")
            hidden = [{key: group[key] for key in kept} for group in self.matrix_groups()]
            self.theirs = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")
        self.theirs.step()
        self._adamw.step()


def step(objective: nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> None:
    """Trains one batch of random images."""
    optimizer.zero_grad(set_to_none=True)
    device = next(objective.parameters()).device
    images = torch.randn(batch, 3, SIDE, SIDE, device=device)
    objective(images, torch.arange(batch, device=device)).loss.backward()
    optimizer.step()


def main() -> None:
    """Measures and prints the table; `--out` keeps it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["tiny", "vit-tiny"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adamw, muon = OptimizerConfig(), OptimizerConfig(optimizer="muon")
    actions: dict[str, Callable[[], None]] = {}
    for preset in args.models:
        for name, config in (("adamw", adamw), ("muon", muon), ("torch", muon)):
            objective = build(preset, "coma").to(device)
            optimizer = build_optimizer(objective, config)
            if name == "torch":
                optimizer.__class__ = TorchMuon
            actions[f"{preset} {name}"] = partial(step, objective, optimizer, args.batch)
    seconds = time_in_turn(actions, args.rounds, device)
    rows = []
    for preset in args.models:
        adam, ours, theirs = (seconds[f"{preset} {name}"] for name in ("adamw", "muon", "torch"))
        rows.append(
            {
                "model": preset,
                "AdamW, s": f"{adam:.3f}",
                "Muon, s": f"{ours:.3f}",
                "torch.optim.Muon, s": f"{theirs:.3f}",
                "Muon / AdamW": f"{ours / adam:.2f}",
                "torch.optim.Muon / AdamW": f"{theirs / adam:.2f}",
            }
        )
    report(f"CoMA, batches of {args.batch} at {SIDE} px, median of {args.rounds} rounds", rows, args.out)


if __name__ == "__main__":
    main()
