"""DyViT and CoMA in one file, for reading: what the toolkit computes, without what makes it fast.

CoMA (Li et al. 2025, arXiv 2511.05929) partitions the mask units of an image into K views. Each view is
encoded from its own pixels only and predicts all the others:

    L = sum_k sum_{u not in V_k} |g(f(x, V_k))_u - t_u|^2 / p   /   sum_k |U - V_k|

DyViT is a hierarchical ViT whose heads attend inside windows of several sizes (DM-MSA). What the paper's
abstract does not state is this project's own. Weights of the toolkit's models load here by name:

    model = CoMA(DyViT(...), Decoder(...)); model.load_state_dict(coma.load_pretrained(path).state_dict())

The letters of shapes: b images, H x W pixels, c channels; h x w mask units; n sequences (views of images) of
s units of t tokens; v = K views; d channels of a head; p = unit * unit * c pixels of a unit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

SIDES = (8, 4, 2, 1)  # tokens along the edge of a mask unit, stage by stage


class DyViT(nn.Module):
    """Images to one feature vector per mask unit. Each of four stages halves the map."""

    def __init__(self, channels, patch, dim, depths, heads, windows):
        super().__init__()
        self.unit, self.patch, dims = 8 * patch, patch, [dim * 2**i for i in range(4)]
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(channels, dim, patch, patch), "norm": nn.LayerNorm(dim)})
        self.stages = nn.ModuleList(
            Stage(dims[i], depths[i], heads[i], windows[i], SIDES[i]) for i in range(4)
        )
        self.norm = nn.LayerNorm(dims[3])

    def forward(self, images: Tensor, views: list[Tensor]) -> list[Tensor]:
        """Features of each view.

        Args:
            images: `[b, c, H, W]`, normalised; H and W whole mask units.
            views: For each view, which units it sees: bool `[b, h, w]`, equally many in every image.

        Returns:
            For each view, `[b, s, C]`: features of the s units that it sees, row by row.
        """
        x = self.stem["norm"](rearrange(self.stem["conv"](images), "b c h w -> b h w c"))
        x = nest(x, SIDES[0])  # b h*w t c: all patches of a unit together
        return [self.encode(x, visible) for visible in views]

    def encode(self, x: Tensor, visible: Tensor) -> Tensor:
        """One view: its units are dealt out into a sequence of their own, so nothing else can be seen."""
        b, h, w = visible.shape
        seen = visible.flatten(1)  # b h*w
        units = x[seen].unflatten(0, (b, -1))  # b s t c
        places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)
        places = repeat(places.flatten(0, 1), "n two -> b n two", b=b)[seen].unflatten(0, (b, -1))  # b s 2
        for stage in self.stages:
            units = stage(units, places)
        return self.norm(units).squeeze(2)  # one token is left of each unit


class Stage(nn.Module):
    """Blocks at one resolution, after a merge of 2 x 2 tokens (not in the first stage)."""

    def __init__(self, dim, depth, heads, windows, side):
        super().__init__()
        if side < SIDES[0]:
            self.merge = nn.ModuleDict(
                {"norm": nn.LayerNorm(2 * dim), "linear": nn.Linear(2 * dim, dim, bias=False)}
            )
        self.blocks = nn.ModuleList(Block(dim, heads, windows) for _ in range(depth))
        self.side, self.head_dim = side, dim // heads

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """`[n, s, t, c]` and the units' places `[n, s, 2]` to `[n, s, t/4, 2c]` (first stage: same size)."""
        if self.side < SIDES[0]:  # 2 x 2 tokens are four consecutive ones, as tokens are nested
            x = rearrange(x, "n s (t four) c -> n s t (four c)", four=4)
            x = self.merge["linear"](self.merge["norm"](x))
        inside = torch.stack(torch.meshgrid(*[torch.arange(self.side)] * 2, indexing="ij"), dim=-1)
        inside = nest(inside[None], self.side)[
            0, 0
        ]  # t 2: row and column inside a unit, in the tokens' order
        rotary = rotary_table(places[:, :, None] * self.side + inside, self.head_dim)
        for block in self.blocks:
            x = block(x, rotary)
        return x


class Block(nn.Module):
    """Pre-norm transformer block (ViT, Dosovitskiy et al. 2021, eq. 2 and 3) with DM-MSA."""

    def __init__(self, dim, heads, windows, eps=1e-5):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = MultiWindowAttention(dim, heads, windows)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`[n, s, t, c]` -> `[n, s, t, c]`."""
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class MultiWindowAttention(nn.Module):
    """DM-MSA: each set of heads attends inside windows of its own size; a gate weights their outputs.

        out = W_o (w * [o_1; ...; o_G]),   w = G softmax_windows(MLP(mean over the view of [o_1; ...; o_G]))

    A window is a square inside a unit, or at least as large as the image: the whole view, as is 0. Near to
    DW-ViT (Ren et al. 2022, arXiv 2203.12856). A mean over the image would tell one view about the others.
    """

    def __init__(self, dim, heads, windows):
        super().__init__()
        self.heads, self.windows, hidden = heads, windows, max(dim // 4, 8)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if len(windows) > 1:
            self.gate = nn.ModuleDict({"hidden": nn.Linear(dim, hidden), "out": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[n, s, t, c]` -> `[n, s, t, c]`."""
        s, t, count = x.shape[1], x.shape[2], len(self.windows)
        q, k, v = rearrange(self.qkv(x), "n s t (three h d) -> three n h (s t) d", three=3, h=self.heads)
        if rotary:
            q, k = rotate(q, rotary), rotate(k, rotary)
        outputs = []
        for window, *qkv in zip(self.windows, *(part.chunk(count, dim=1) for part in (q, k, v)), strict=True):
            length = min(
                window * window or s * t, s * t
            )  # tokens of a window: consecutive, as they are nested
            qkv = [rearrange(part, "n h (windows m) d -> (n windows) h m d", m=length) for part in qkv]
            out = attention(*qkv)
            outputs.append(rearrange(out, "(n windows) h m d -> n (windows m) (h d)", n=len(x)))
        out = torch.cat(outputs, dim=-1)  # n s*t c
        if count > 1:
            logits = self.gate["out"](F.gelu(self.gate["hidden"](out.mean(dim=1, keepdim=True))))
            weights = rearrange(logits, "n one (g c) -> n one g c", g=count).softmax(dim=2) * count
            out = out * weights.flatten(2)
        return self.proj(out).unflatten(1, (s, t))


class Decoder(nn.Module):
    """Features of the visible units to pixels of all units (MAE, He et al. 2021, sec. 3)."""

    def __init__(self, features, pixels, dim, depth, heads):
        super().__init__()
        self.embed, self.mask_token = nn.Linear(features, dim), nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(Block(dim, heads, (0,), eps=1e-6) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, pixels)

    def forward(self, features: Tensor, visible: Tensor) -> Tensor:
        """`[b, s, C]` and bool `[b, h, w]` to `[b, h, w, p]`."""
        (b, h, w), dim = visible.shape, self.mask_token.numel()
        x = self.mask_token.expand(b, h, w, dim).clone()
        x[visible] = self.embed(features).flatten(0, 1)
        x = (x + sincos_positions(h, w, dim)).flatten(1, 2)[:, :, None]  # one token of each unit
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).reshape(b, h, w, -1)


class CoMA(nn.Module):
    """Complementary masked autoencoder with K views."""

    def __init__(self, encoder: DyViT, decoder: Decoder, views: int = 2):
        super().__init__()
        self.encoder, self.decoder, self.views = encoder, decoder, views

    def forward(self, images: Tensor, keys: Tensor) -> Tensor:
        """The loss of a batch: the mean squared error over the units that the views do not see.

        Args:
            images: `[b, c, H, W]`, normalised.
            keys: `[b, h*w]`, random numbers that choose the views.
        """
        targets = normalised(patchify(images, self.encoder.unit))  # b h w p
        views = partition(keys, *targets.shape[1:3], self.views)
        error, hidden = torch.tensor(0.0), torch.tensor(0.0)
        for visible, features in zip(views, self.encoder(images, views), strict=True):
            squared = (self.decoder(features, visible) - targets).square().mean(dim=-1)  # b h w
            error, hidden = error + squared[~visible].sum(), hidden + (~visible).sum()
        return error / hidden

    def reconstruct(self, images: Tensor, visible: Tensor) -> Tensor:
        """Images with their hidden units predicted; mean and contrast of a unit are its true ones."""
        units = patchify(images, self.encoder.unit)
        predicted = self.decoder(self.encoder(images, [visible])[0], visible)
        predicted = predicted * (units.var(-1, keepdim=True) + 1e-6).sqrt() + units.mean(-1, keepdim=True)
        filled = torch.where(visible[..., None], units, predicted)
        return rearrange(filled, "b h w (p q c) -> b c (h p) (w q)", p=self.encoder.unit, q=self.encoder.unit)


def partition(keys: Tensor, h: int, w: int, views: int) -> list[Tensor]:
    """K masks that partition the units at random, equally large (±1): bool `[b, h, w]` each."""
    rank = keys.argsort(dim=1, stable=True).argsort(dim=1)  # b h*w
    return [(rank % views == view).unflatten(1, (h, w)) for view in range(views)]


def patchify(images: Tensor, unit: int) -> Tensor:
    """`[b, c, H, W]` -> `[b, h, w, p]`."""
    return rearrange(images, "b c (h p) (w q) -> b h w (p q c)", p=unit, q=unit)


def normalised(units: Tensor) -> Tensor:
    """Each unit less its mean, over its standard deviation (MAE sec. 4.1)."""
    return (units - units.mean(-1, keepdim=True)) / (units.var(-1, keepdim=True) + 1e-6).sqrt()


def nest(x: Tensor, side: int) -> Tensor:
    """A map `[b, h*side, w*side, c]` unit by unit, each in Z-order: `[b, h*w, side*side, c]`."""
    b = len(x)
    x = rearrange(x, "b (h p) (w q) c -> (b h w) p q c", p=side, q=side)
    while x.shape[1] > 1:  # the four quarters of each square one after another
        x = rearrange(x, "n (top p) (left q) c -> (n top left) p q c", top=2, left=2)
    return rearrange(x, "(b n t) 1 1 c -> b n t c", b=b, t=side * side)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1), `[..., m, d]` each."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def rotary_table(places: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Places `[n, s, t, 2]` to cosines and sines, `[n, 1, s*t, d/2]` (RoFormer, sec. 3.2.2)."""
    frequencies = 100.0 ** -(torch.arange(d // 4) / (d // 4))
    angles = (places[..., None] * frequencies).flatten(3).flatten(1, 2)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + d/2) of `[n, heads, s*t, d]` by the angles of their tokens."""
    (cos, sin), (a, b) = table, x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def sincos_positions(h: int, w: int, dim: int) -> Tensor:
    """Fixed positions `[h, w, dim]` (Vaswani et al. 2017, sec. 3.5; in 2-D: MAE, appendix A.1)."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    rows, cols = torch.arange(h)[:, None, None] * frequencies, torch.arange(w)[:, None] * frequencies
    return torch.cat([part.expand(h, w, -1) for part in (cols.sin(), cols.cos(), rows.sin(), rows.cos())], -1)
