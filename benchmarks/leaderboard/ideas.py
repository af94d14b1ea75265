"""Tries ideas for CoMA that are not part of the package, beside CoMA and MAE at about equal computing time.

    python benchmarks/leaderboard/ideas.py --data DATA/class-cifar10
    python benchmarks/leaderboard/ideas.py --data DATA/class-cifar10 --only coma agree-contrast

All trainings are `coma pretrain` of the DyViT of `run.py` at 32 px, with Muon, one thread each; an idea takes
the place of the package's CoMA in the process that trains. The frozen features are then classified by
kNN and a linear probe. To try one, write a class that derives from `CoMA`, and add a row to IDEAS. What is
done is not done again, and rows of --out that are not asked for stay in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "methods"))

import torch
import torch.nn.functional as F
from machine import describe
from machine import table as markdown
from run import BACKBONES, flags, labelled, parse, shared_flags
from table import spread
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from coma import registry
from coma.config import CoMAConfig
from coma.masking.patchify import patchify
from coma.masking.sampling import group_sizes, keep, partition
from coma.models import Encoder
from coma.models.dyvit import DyViT
from coma.models.position_embeddings import sincos_positions
from coma.models.vit import init_xavier
from coma.models.windows import unnest
from coma.objectives.base import ObjectiveOutput
from coma.objectives.coma import CoMA
from coma.objectives.targets import hidden_loss, pixel_targets
from pretrain.sweep.plan import metrics_rows
from pretrain.sweep.results import seconds_until


def encode_views(objective: CoMA, images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Returns all units' features `[b, h, w, c]`, and the units that each view sees, bool `[v, b, h, w]`."""
    h, w = objective.grid(images)
    visible = objective.draw_visible(seeds, h, w)
    sizes = group_sizes(h * w, objective.config.views)
    return objective.encoder.forward_features(images, visible.int().argmax(dim=0), sizes), visible


class Agreement(CoMA):
    """CoMA whose views of an image agree in their pooled features."""

    weight = 0.1
    """Weight of the agreement in the loss; the reconstruction has the weight 1."""

    def __init__(self, config: CoMAConfig, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.project = nn.Sequential(
            nn.Linear(encoder.num_features, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 64)
        )

    def forward(self, images: Tensor, seeds: Tensor) -> ObjectiveOutput:
        """Returns the loss of one batch: the reconstruction's plus the weighted agreement's."""
        features, visible = encode_views(self, images, seeds)
        out = self.predict(images, features, visible)
        seen = visible[..., None].to(features.dtype)
        pooled = (features * seen).sum(dim=(2, 3)) / seen.sum(dim=(2, 3))  # v b c
        apart = self.apart(self.project(pooled).float())
        return replace(out, loss=out.loss + self.weight * apart, metrics={**out.metrics, "loss_agree": apart})

    def apart(self, pooled: Tensor) -> Tensor:
        """Returns the disagreement of the views' features `[v, b, c]`, a scalar."""
        raise NotImplementedError


class Contrast(Agreement):
    """Agreement by contrast: views of an image find each other in the batch (InfoNCE, arXiv 1807.03748)."""

    def apart(self, pooled: Tensor) -> Tensor:
        """Returns the cross-entropy of finding the other view in the batch, at temperature 0.2."""
        first, second = F.normalize(pooled, dim=-1)
        scores = first @ second.T / 0.2
        own = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


class StrongContrast(Contrast):
    """Agreement by contrast with the same weight as the reconstruction."""

    weight = 1.0


class Gaussian(Agreement):
    """Agreement of views whose features follow an isotropic Gaussian (LeJEPA's SIGReg, arXiv 2511.08544)."""

    def apart(self, pooled: Tensor) -> Tensor:
        """Returns the views' squared distance plus the Epps-Pulley statistic on 256 random directions."""
        invariance = (pooled - pooled.mean(dim=0)).square().mean()
        directions = F.normalize(torch.randn(pooled.shape[-1], 256, device=pooled.device), dim=0)
        along = pooled.flatten(0, 1) @ directions
        t = torch.linspace(-5, 5, 17, device=pooled.device)
        phase = along[..., None] * t
        normal = torch.exp(-(t**2) / 2)
        error = (phase.cos().mean(dim=0) - normal).square() + phase.sin().mean(dim=0).square()
        return invariance + torch.trapezoid(error * normal, t, dim=-1).mean() * len(along) / 20


class AveragedTarget(CoMA):
    """CoMA that also predicts the features that the encoder's moving average has of the whole image."""

    weight, decay = 0.5, 0.99

    def __init__(self, config: CoMAConfig, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.average = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.to_features = nn.Linear(config.decoder.dim, encoder.num_features)
        init_xavier(self.to_features)

    def forward(self, images: Tensor, seeds: Tensor) -> ObjectiveOutput:
        """Returns the loss of one batch, on pixels and on normalised features (smooth L1) of hidden units."""
        features, visible = encode_views(self, images, seeds)
        states = self.decoder.states(features, visible)
        target = pixel_targets(patchify(images, self.encoder.unit), self.config.norm_pix)
        prediction = self.decoder.head(states)
        pixels = hidden_loss(prediction, target, visible)
        with torch.no_grad():
            whole = self.average.forward_features(images)
            whole = F.layer_norm(whole.float(), whole.shape[-1:])
        guess = self.to_features(states).float()
        error = F.smooth_l1_loss(guess, whole.expand_as(guess), reduction="none").mean(dim=-1)
        hidden = (~visible).float()
        learnt = (error * hidden).sum() / hidden.sum()
        return ObjectiveOutput(
            pixels + self.weight * learnt, prediction, target, visible, {"loss_features": learnt}
        )

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Updates the moving average: decay x average + (1 - decay) x encoder."""
        for own, new in zip(self.average.parameters(), self.encoder.parameters(), strict=True):
            own.lerp_(new, 1 - self.decay)


class CrossBlock(nn.Module):
    """A block whose queries look at the visible units, not at one another (CrossMAE, arXiv 2401.14391)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Returns the queries `x [n, q, c]` after they attended to `seen [n, s, c]`."""
        n, count, dim = x.shape
        query = self.q(self.norm1(x)).view(n, count, self.heads, -1).transpose(1, 2)
        key, value = self.kv(seen).view(n, seen.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, count, dim)
        x = x + self.proj(found)
        return x + self.mlp(self.norm2(x))


class Share(CoMA):
    """CoMA that decodes a share of what each view does not see, by cross-attention."""

    share = 0.5

    def __init__(self, config: CoMAConfig, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        decoder = config.decoder
        self.decoder.blocks = nn.ModuleList(
            CrossBlock(decoder.dim, decoder.heads) for _ in range(decoder.depth)
        )
        self.decoder.apply(init_xavier)

    def forward(self, images: Tensor, seeds: Tensor) -> ObjectiveOutput:
        """Returns the loss of one batch, on the units that were drawn; the predictions are left at zero."""
        h, w = self.grid(images)
        sizes = group_sizes(h * w, self.config.views)
        features, visible = encode_views(self, images, seeds)
        places = sincos_positions(h, w, self.config.decoder.dim, device=images.device).flatten(0, 1)
        tokens = self.decoder.embed(features.flatten(1, 2)) + places
        target = pixel_targets(patchify(images, self.encoder.unit), self.config.norm_pix).flatten(1, 2)
        losses = []
        for view in range(self.config.views):
            order = visible[view].flatten(1).int().argsort(dim=1, descending=True, stable=True)
            seen, hidden = order.split([sizes[view], h * w - sizes[view]], dim=1)
            count = max(1, round(self.share * hidden.shape[1]))
            drawn = keep(seeds, 1, hidden.shape[1], count, salt=7 + view).flatten(1)
            hidden = hidden[drawn].view(-1, count)
            rows = torch.arange(len(images), device=images.device)[:, None]
            x, keys = self.decoder.mask_token + places[hidden], tokens[rows, seen]
            for block in self.decoder.blocks:
                x = block(x, keys)
            guess = self.decoder.head(self.decoder.norm(x)).float()
            losses.append((guess - target[rows, hidden]).square().mean())
        empty = target.new_zeros(len(visible), *target.shape).unflatten(2, (h, w))
        return ObjectiveOutput(torch.stack(losses).mean(), empty, target.unflatten(1, (h, w)), visible, {})


class Fused(CoMA):
    """CoMA whose decoder also gets the first three stages' maps, a unit's tokens side by side.

    MCMAE (arXiv 2205.03892, sec. 3.2) fuses the maps of its stages so, with convolutions of a unit's size.
    """

    def __init__(self, config: CoMAConfig, encoder: DyViT) -> None:
        super().__init__(config, encoder)
        widths = [
            (encoder.unit // stride) ** 2 * encoder.config.dim * 2**stage
            for stage, stride in enumerate(encoder.strides[:-1])
        ]
        self.fuse = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, encoder.num_features)) for width in widths
        )
        self.fuse.apply(init_xavier)

    def forward(self, images: Tensor, seeds: Tensor) -> ObjectiveOutput:
        """Returns the loss of one batch."""
        h, w = self.grid(images)
        visible, encoder = self.draw_visible(seeds, h, w), cast("DyViT", self.encoder)
        group, sizes = visible.int().argmax(dim=0), group_sizes(h * w, self.config.views)
        sequences, tokens = encoder._run(images, group, sizes)
        fused = encoder.norm(tokens[-1]).squeeze(2)
        for layer, stage in zip(self.fuse, tokens[:-1], strict=True):
            fused = fused + layer(stage.flatten(2))
        features = sequences.scatter(fused[:, :, None])
        return self.predict(images, unnest(features, 1, h, w), visible)


class Unequal(CoMA):
    """CoMA whose first view sees a quarter of the units, and the second one the others."""

    def forward(self, images: Tensor, seeds: Tensor) -> ObjectiveOutput:
        """Returns the loss of one batch."""
        h, w = self.grid(images)
        quarter, *others = group_sizes(h * w, 4)
        group = (partition(seeds, h, w, 4) > 0).long()
        features = self.encoder.forward_features(images, group, (quarter, sum(others)))
        return self.predict(images, features, torch.stack([group == 0, group == 1]))


@dataclass(frozen=True)
class Idea:
    """Describes one row.

    Attributes:
        flags: Flags of `coma pretrain`, from `--method` on.
        images: Number of images of pre-training.
        kind: Class that takes the place of CoMA.
        first: Number of images that are first trained at half the size.
        batch: Number of images of a step.
    """

    flags: str
    images: int
    kind: type[CoMA] = CoMA
    first: int = 0
    batch: int = 16


MUON = "--optimizer muon --base-lr 0.096"
IDEAS: Mapping[str, Idea] = {
    "mae": Idea(f"mae {MUON}", 12_800),
    "coma": Idea(f"coma {MUON}", 6_400),
    "agree-contrast": Idea(f"coma {MUON}", 6_400, Contrast),
    "agree-contrast-strong": Idea(f"coma {MUON}", 6_400, StrongContrast),
    "agree-gaussian": Idea(f"coma {MUON}", 6_400, Gaussian),
    "averaged-target": Idea(f"coma {MUON}", 6_400, AveragedTarget),
    "share": Idea(f"coma {MUON}", 6_400, Share),
    "fused stages": Idea(f"coma {MUON}", 6_400, Fused),
    "a quarter and the rest": Idea(f"coma {MUON}", 6_400, Unequal),
    "three views": Idea(f"coma {MUON} --objective.views 3", 6_400),
    "four views": Idea(f"coma {MUON} --objective.views 4", 6_400),
    "one view of half": Idea(f"coma-single {MUON}", 12_800),
    "batch 32": Idea("coma --optimizer muon --base-lr 0.048", 6_400, batch=32),
    "batch 32, rate x 2": Idea("coma --optimizer muon --base-lr 0.096", 6_400, batch=32),
    "mae, batch 32": Idea("mae --optimizer muon --base-lr 0.048", 12_800, batch=32),
    "mae, batch 32, rate x 2": Idea("mae --optimizer muon --base-lr 0.096", 12_800, batch=32),
    "half size first": Idea(f"coma {MUON}", 3_200, first=6_400),
}


def coma(*arguments: object, idea: str) -> None:
    """Runs a command of the package in a process of its own, in which an idea takes CoMA's place."""
    command = [sys.executable, __file__, "--child", idea, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def child(name: str, arguments: list[str]) -> int:
    """Runs `coma ARGUMENTS` with the idea of this name."""
    from coma.cli import main as command

    kind = IDEAS[name].kind
    if kind is not CoMA:
        sys.modules["ideas"] = sys.modules[__name__]
        methods = cast("dict[str, registry.Method]", registry.METHODS)
        methods["coma"] = replace(methods["coma"], objective=f"ideas:{kind.__name__}")
    return command(arguments)


def train(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Trains and measures one run; returns the minutes of its steps, and accuracies in percent."""
    idea = IDEAS[name]
    own = args.work / name.replace(" ", "-").replace(",", "") / str(seed)
    done = own / "measured.json"
    if done.exists():
        return json.loads(done.read_text())
    seconds, start = 0.0, ["--model", *BACKBONES["DyViT"].split()]
    for size, images in ((args.image_size // 2, idea.first), (args.image_size, idea.images)):
        if not images:
            continue
        out = own / f"{size}px"
        steps = images // idea.batch
        text = f"--method {idea.flags} --batch-size {idea.batch} --steps {steps} --image-size {size}"
        text += f" --seed {seed} --model.patch {args.image_size // 32} --reconstruction-every 0 --workers 0"
        begin = [args.data / "train.npz", "--out", out, *flags(args), *text.split(), *start]
        if not (out / "loss_curve.png").exists():
            coma("pretrain", *(["--resume", out] if (out / "config.json").exists() else begin), idea=name)
        seconds += seconds_until(metrics_rows(out), steps, idea.batch)
        start = ["--init", out / "artifact"]
    measure = ["evaluate", own / f"{args.image_size}px" / "artifact", "--data", args.work / "labelled"]
    coma(*measure, "--no-random-baseline", "--out", own, "--workers", 0, idea=name)
    scores = json.loads((own / "results.json").read_text())["scores"]
    found = {"minutes": seconds / 60, **{score["protocol"]: 100 * score["top1"] for score in scores}}
    done.write_text(json.dumps(found))
    return found


def main() -> None:
    """Runs all rows, seed after seed."""
    parser = shared_flags(__doc__, ["DyViT"])
    parser.add_argument("--only", nargs="+", choices=IDEAS, default=list(IDEAS))
    parser.set_defaults(seeds=[0], out=Path("benchmarks/results/ideas_cpu.json"))
    args = parse(parser, "ideas")
    args.base_lr = 1.6e-2  # each row has a rate of its own
    labelled(args)
    print(describe(), flush=True)
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name in args.only:
            runs.setdefault(name, []).append(train(name, seed, args))
            print(name, seed, runs[name][-1], flush=True)
    kept = json.loads(args.out.read_text())["runs"] if args.out.exists() else {}
    runs = kept | runs
    rows = [
        {"what": name, "seeds": len(some), **{key: spread([run[key] for run in some]) for key in some[0]}}
        for name, some in runs.items()
    ]
    print(markdown(rows))
    about: dict[str, object] = {"machine": describe(), "data": args.data.name}
    about["flags"] = {name: IDEAS[name].flags for name in runs}
    args.out.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[2], sys.argv[3:]))
    main()
