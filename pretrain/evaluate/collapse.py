"""What can be said about an encoder without labels: do its features collapse, what do its gates choose?

Collapsed features: all images get nearly the same vector, or vectors in a few directions only. A loss that
falls does not rule that out, and accuracy shows it late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from coma.models import Encoder
from coma.models.attention import WindowGate


def feature_spread(features: Tensor) -> float:
    """Standard deviation of l2-normalised features `[n, d]`, mean over dimensions, in units of 1/sqrt(d).

    1 where the directions of the images are spread evenly, 0 where all images have the same (Chen & He 2021,
    "SimSiam", arXiv 2011.10566, sec. 4.1). Features with a large common part lie far below 1 without having
    collapsed: what tells is a fall during training.
    """
    normalised = F.normalize(features.double(), dim=1)
    return (normalised.std(dim=0, correction=0).mean() * math.sqrt(features.shape[1])).item()


def effective_rank(features: Tensor) -> float:
    """Number of directions that features `[n, d]` fill, 1 to min(n, d).

    exp of the entropy of the singular values, as shares of their sum (Roy & Vetterli 2007, "The effective
    rank"; Garrido et al. 2023, "RankMe", arXiv 2210.02885, whose features keep their mean; here it is taken
    away, since it would count as a direction of its own and dwarf the others).
    """
    centred = features.double() - features.double().mean(dim=0)
    sizes = torch.linalg.svdvals(centred)
    total = sizes.sum()
    if total <= 1e-12 * max(1.0, features.abs().max().item()) * len(features):
        return 1.0  # all the same
    return math.exp(torch.special.entr(sizes / total).sum().item())


class GateWatch:
    """Means over the images that an encoder saw; filled by `watched_gates`."""

    def __init__(self) -> None:
        self._weights: dict[int, Tensor] = {}
        self._entropy: dict[int, Tensor] = {}
        self._seen: dict[int, int] = {}

    def add(self, stage: int, weights: Tensor, windows: int) -> None:
        """Take in one gate's weights `[n, ..., c]`, which average 1 over the windows.

        Args:
            stage: From 1.
            weights: As `WindowGate` gives them.
            windows: How many share the channels.
        """
        shares = rearrange(weights.float().cpu().double(), "n ... (g c) -> n (... c) g", g=windows) / windows
        entropy = torch.special.entr(shares).sum(dim=-1) / math.log(windows)
        n = len(shares)
        sums = shares.mean(dim=1).sum(dim=0), entropy.mean(dim=1).sum()
        for kept, new in zip((self._weights, self._entropy), sums, strict=True):
            kept[stage] = kept.get(stage, torch.zeros_like(new)) + new
        self._seen[stage] = self._seen.get(stage, 0) + n

    def summary(self) -> dict[str, float]:
        """Per stage, over its blocks and all images: the weight of every window, and the entropy.

        `stage3_window1` is the share that the first window of the stage has (all windows of a stage add up to
        1; equal at the start of training); `stage3_entropy` is 1 where the windows count alike and 0 where
        every channel takes one alone.
        """
        found = {}
        for stage, seen in sorted(self._seen.items()):
            for number, weight in enumerate((self._weights[stage] / seen).tolist(), start=1):
                found[f"stage{stage}_window{number}"] = weight
            found[f"stage{stage}_entropy"] = (self._entropy[stage] / seen).item()
        return found


@contextmanager
def watched_gates(encoder: Encoder) -> Iterator[GateWatch]:
    """Inside this block the gates of DM-MSA are recorded whenever the encoder runs; a ViT has none."""
    watch = GateWatch()
    handles = []

    def recorder(stage: int) -> Callable[[WindowGate, Any, Tensor], None]:
        return lambda gate, _, weights: watch.add(stage, weights.detach(), gate.windows)

    for stage, gate in encoder.window_gates():
        handles.append(gate.register_forward_hook(recorder(stage)))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
