"""Introspection of an encoder: feature pyramid in colour, window gates, attention of a position.

Hooks record the inputs and outputs of layers while the encoder runs unchanged on one picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from coma.errors import BadInput
from coma.masking.patchify import unit_grid
from coma.models import Encoder
from coma.models.attention import DynamicMultiWindowAttention, Layout
from coma.models.dyvit import FIRST_SIDE, DyViT
from coma.models.windows import nest, unnest


@dataclass(frozen=True)
class BlockGates:
    """The window gates of one block.

    Attributes:
        stage: Stage, 1 to 4.
        block: Block of the stage, from 1.
        windows: Window sides in tokens; 0 is the whole map.
        weights: Gate of each window, averaged over channels; their mean is 1.
        wins: Share of channels in which each window has the largest gate.
        strongest: `[h, w]`, index of the window with the largest output norm at each position.
    """

    stage: int
    block: int
    windows: tuple[int, ...]
    weights: tuple[float, ...]
    wins: tuple[float, ...]
    strongest: np.ndarray


@torch.no_grad()
def feature_pyramid(encoder: Encoder, image: Tensor) -> tuple[Tensor, ...]:
    """Returns the feature maps of a normalised image `[1, c, H, W]`, finest first."""
    return encoder.pyramid(image)


def pyramid_colours(maps: tuple[Tensor, ...]) -> list[np.ndarray]:
    """Returns the first three principal components of every map `[1, c, h, w]` as uint8 `[h, w, 3]`.

    Similar features have similar colours within a map; colours of two maps are not comparable.
    """
    return [_principal_colours(each[0].float()) for each in maps]


def _principal_colours(features: Tensor) -> np.ndarray:
    h, w = features.shape[1:]
    rows = features.flatten(1).T.double()  # positions, channels
    rows = rows - rows.mean(dim=0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    axes = directions[:3]
    strongest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    scores = rows @ (axes * strongest.sign()).T  # the sign of a component is arbitrary: fix it
    low, high = (torch.quantile(scores, q, dim=0) for q in (0.02, 0.98))
    colours = ((scores - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    filled = torch.full((h * w, 3), 0.5, dtype=colours.dtype)
    filled[:, : colours.shape[1]] = colours
    return (filled.view(h, w, 3) * 255).round().byte().numpy()


@torch.no_grad()
def attention_received(encoder: Encoder, image: Tensor) -> Tensor:
    """Returns the attention that every mask unit receives in the last block, `[h, w]`, with sum 1.

    Args:
        encoder: Encoder in evaluation mode.
        image: Normalised image, `[1, c, H, W]`.

    Raises:
        BadInput: an encoder whose last block does not attend globally.
    """
    from coma.models.attention_maps import attend, on_grid

    _, attention = attend(encoder, image)
    return on_grid(attention[:, None], *unit_grid(image.shape[-2], image.shape[-1], encoder.unit))[0, 0]


@torch.no_grad()
def gate_weights(encoder: Encoder, image: Tensor) -> list[BlockGates]:
    """Returns the gates of every block that has several windows.

    Args:
        encoder: DyViT in evaluation mode.
        image: Normalised image, `[1, c, H, W]`.

    Raises:
        BadInput: an encoder without gates.
    """
    if not encoder.window_gates():
        raise BadInput("This model has no gates: all its layers have one window, the whole picture.")
    encoder = cast(DyViT, encoder)
    found: list[BlockGates] = []
    for stage, block, attention in _attentions(encoder):
        if attention.gate is None:
            continue
        with (
            _watching(attention.gate) as gate,
            _watching(attention.proj) as proj,
            _watching(attention) as all_,
        ):
            encoder.pyramid(image)
        layout: Layout = all_.inputs[1]
        count = len(layout.windows)
        weights = gate.output.flatten().unflatten(0, (count, -1))  # windows, channels of each
        weighted: Tensor = proj.inputs[0]  # n s t c: the windows' outputs side by side
        strength = weighted.unflatten(-1, (count, -1)).norm(dim=-1).argmax(dim=-1)  # n s t
        whole = block - 1 in encoder.stages[stage - 1].whole  # pyright: ignore[reportOperatorIssue]
        found.append(
            BlockGates(
                stage,
                block,
                (0,) * count if whole else encoder.config.windows[stage - 1],
                tuple(weights.mean(dim=1).tolist()),
                tuple(torch.bincount(weights.argmax(dim=0), minlength=count).div(weights.shape[1]).tolist()),
                _as_map(strength[..., None], layout, stage)[..., 0].numpy(),
            )
        )
    return found


@torch.no_grad()
def attention_maps_of(
    encoder: Encoder, image: Tensor, stage: int, row: float, col: float
) -> dict[str, np.ndarray]:
    """Returns the attention of one position in the last block of a stage, averaged over heads.

    Args:
        encoder: DyViT or a plain ViT (which has one stage) in evaluation mode.
        image: Normalised image, `[1, c, H, W]`.
        stage: Stage, 1 to 4.
        row: Vertical position, 0 (top) to 1.
        col: Horizontal position, 0 (left) to 1.

    Returns:
        Maps `[h, w]` with sum 1, by the name of the window; zero outside the position's window.
    """
    if len(encoder.strides) == 1:
        return {"whole picture": _plain_attention(encoder, image, row, col)}
    encoder = cast(DyViT, encoder)
    attention = encoder.stages[stage - 1].blocks[-1].attn  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    with _watching(attention) as watched:
        encoder.pyramid(image)
    x, layout = watched.inputs
    side = FIRST_SIDE >> (stage - 1)
    h, w = layout.sequences.rows * side, layout.sequences.cols * side
    place = torch.zeros(1, h, w, 1)
    place[0, min(int(row * h), h - 1), min(int(col * w), w - 1)] = 1
    chosen = _as_tokens(place, layout, side)  # n s t 1
    q, k, _ = attention.project(x, layout)  # n s t heads d
    maps = {}
    groups = len(layout.windows)
    for i, (window, q_, k_) in enumerate(
        zip(layout.windows, q.chunk(groups, dim=3), k.chunk(groups, dim=3), strict=True)
    ):
        query = (q_ * chosen[..., None]).sum(dim=(0, 1, 2))  # heads d
        scores = (k_ * query).sum(dim=-1) * query.shape[-1] ** -0.5  # n s t heads
        scores = scores.masked_fill(~_same_window(window, chosen)[..., None], -torch.inf)
        weights = scores.flatten(0, 2).softmax(dim=0).view(scores.shape).mean(dim=-1, keepdim=True)
        sides = encoder.config.windows[stage - 1][i] if encoder.config.windows[stage - 1] else 0
        whole = len(encoder.stages[stage - 1].blocks) - 1 in encoder.stages[stage - 1].whole  # pyright: ignore
        name = "whole picture" if whole or not sides or sides >= max(h, w) else f"{sides} x {sides} tokens"
        maps[name if name not in maps else f"{name} ({i + 1})"] = _as_map(weights, layout, stage)[
            ..., 0
        ].numpy()
    return maps


def _same_window(window: Any, chosen: Tensor) -> Tensor:
    """Returns the tokens in the chosen token's window, bool `[n, s, t]`, found by uniform attention."""
    silent = torch.zeros(*chosen.shape[:3], 1, 4)
    heard = chosen[..., None, :].expand_as(silent).contiguous()
    return window.attend(silent, silent, heard, fused=False)[..., 0] > 0


def _plain_attention(encoder: Any, image: Tensor, row: float, col: float) -> np.ndarray:
    from coma.models.attention_maps import softmax_of

    with softmax_of(encoder.blocks[-1].attn) as taken:
        features = encoder.pyramid(image)[0]
    h, w = -(-image.shape[-2] // encoder.unit), -(-image.shape[-1] // encoder.unit)
    side = encoder.unit // encoder.strides[0]
    h, w = h * side, w * side
    before = encoder.num_prefix_tokens
    place = before + min(int(row * h), h - 1) * w + min(int(col * w), w - 1)
    received = taken[0][0, :, place, before:]  # heads s
    weights = (received / received.sum(dim=1, keepdim=True)).mean(dim=0)
    return weights.view(h, w).numpy()[: features.shape[-2], : features.shape[-1]]


def _attentions(encoder: DyViT) -> Iterator[tuple[int, int, DynamicMultiWindowAttention]]:
    for stage, layers in enumerate(encoder.stages, start=1):
        for number, block in enumerate(layers.blocks, start=1):  # pyright: ignore
            yield stage, number, block.attn  # pyright: ignore


def _as_map(tokens: Tensor, layout: Layout, stage: int) -> Tensor:
    # n s t c -> h w c
    sequences = layout.sequences
    return unnest(sequences.scatter(tokens), FIRST_SIDE >> (stage - 1), sequences.rows, sequences.cols)[0]


def _as_tokens(place: Tensor, layout: Layout, side: int) -> Tensor:
    return layout.sequences.gather(nest(place, side))


class _Watched:
    """The last inputs and output of a module."""

    inputs: tuple[Any, ...]
    output: Any


@contextmanager
def _watching(module: nn.Module) -> Iterator[_Watched]:
    seen = _Watched()

    def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.inputs, seen.output = inputs, output

    handle = module.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
