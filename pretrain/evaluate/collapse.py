"""Statistics of an encoder that need no labels: collapse of its features, and the weights of its gates.

Features are collapsed if all images get nearly the same vector, or vectors in a few directions only. A
falling loss does not rule that out, and accuracy shows it late.
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
    """Returns the standard deviation of l2-normalised features `[n, d]`, mean over d, in units of 1/sqrt(d).

    It is 1 if the directions of the images are spread evenly, and 0 if all images have the same direction
    (Chen & He 2021, "SimSiam", arXiv 2011.10566, sec. 4.1). Features with a large common part are far below 1
    without being collapsed; a fall during training shows a collapse.
    """
    normalised = F.normalize(features.double(), dim=1)
    return (normalised.std(dim=0, correction=0).mean() * math.sqrt(features.shape[1])).item()


def effective_rank(features: Tensor) -> float:
    """Returns the number of directions that features `[n, d]` fill, 1 to min(n, d).

    It is exp of the entropy of the singular values, divided by their sum (Roy & Vetterli 2007, "The effective
    rank"; Garrido et al. 2023, "RankMe", arXiv 2210.02885). RankMe keeps the mean of the features; it is
    subtracted here, since it would count as a direction of its own and dwarf the others.
    """
    centred = features.double() - features.double().mean(dim=0)
    sizes = torch.linalg.svdvals(centred)
    total = sizes.sum()
    if total <= 1e-12 * max(1.0, features.abs().max().item()) * len(features):
        return 1.0  # all the same
    return math.exp(torch.special.entr(sizes / total).sum().item())


class GateStatistics:
    """Mean weights of DM-MSA's gates over the images of an encoder; see `watched_gates`."""

    def __init__(self) -> None:
        self._weights: dict[int, Tensor] = {}
        self._entropy: dict[int, Tensor] = {}
        self._seen: dict[int, int] = {}

    def add(self, stage: int, weights: Tensor, windows: int) -> None:
        """Adds one gate's weights `[n, ..., c]`, whose mean over the windows is 1.

        Args:
            stage: Number of the stage, from 1.
            weights: Output of `WindowGate`.
            windows: Number of windows that share the channels.
        """
        shares = rearrange(weights.float().cpu().double(), "n ... (g c) -> n (... c) g", g=windows) / windows
        entropy = torch.special.entr(shares).sum(dim=-1) / math.log(windows)
        n = len(shares)
        sums = shares.mean(dim=1).sum(dim=0), entropy.mean(dim=1).sum()
        for kept, new in zip((self._weights, self._entropy), sums, strict=True):
            kept[stage] = kept.get(stage, torch.zeros_like(new)) + new
        self._seen[stage] = self._seen.get(stage, 0) + n

    def summary(self) -> dict[str, float]:
        """Returns every window's weight and the entropy, means over blocks and images.

        `stage3_window1` is the share of the first window (the windows of a stage add up to 1, and are equal
        at the start of training); `stage3_entropy` is 1 if all windows have equal weights and 0 if every
        channel uses a single window.
        """
        found = {}
        for stage, seen in sorted(self._seen.items()):
            for number, weight in enumerate((self._weights[stage] / seen).tolist(), start=1):
                found[f"stage{stage}_window{number}"] = weight
            found[f"stage{stage}_entropy"] = (self._entropy[stage] / seen).item()
        return found


@contextmanager
def watched_gates(encoder: Encoder) -> Iterator[GateStatistics]:
    """Records the gates of DM-MSA while the encoder runs inside this block; a ViT has none."""
    watch = GateStatistics()
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
