"""Last-layer features of an image, and the attention that each position gets there.

Attention is that of one block, the last unless said, averaged over heads, and normalised to add up to 1 over
the places. The query is the class token's where a model was trained with one (timm's); otherwise, or if asked
for, the mean over all places. This room's encoders may have a class token, but no loss reads it, so its
attention means nothing: the mean for them as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from coma.config.objectives import AttentionQuery
from coma.errors import BadInput
from coma.models.attention import Consecutive, DynamicMultiWindowAttention, Layout
from coma.models.dyvit import DyViT
from coma.models.plain import PlainEncoder


def attend(
    model: nn.Module, images: Tensor, *, block: int = 1, query: AttentionQuery = "auto"
) -> tuple[Tensor, Tensor]:
    """Features and attention.

    Args:
        model: DyViT, plain ViT, or one of timm's vision transformers; see `check_readable`.
        images: `[b, c, H, W]`, normalised for it.
        block: Block whose attention is read, counted from the last, which is 1; of DyViT, in its last stage.
        query: Query of the attention: `class` token, `mean` over all places, or `auto`.

    Returns:
        Last-layer features `[b, h, w, c]` and attention `[b, h, w]`, which adds up to 1 for every image.

    Raises:
        BadInput: a block or a class token that it does not have, or a DyViT whose block does not see the
            whole map.
    """
    if query == "class" and not _has_cls(model):
        raise BadInput("it has no class token that was trained, so query 'class' cannot be asked")
    if isinstance(model, DyViT):
        with _watching_dyvit(_from_the_end(model.stages[-1].blocks, block).attn) as taken:  # type: ignore[union-attr, arg-type]
            features = model.forward_features(images)
        received = taken[0].mean(dim=(1, 2))
    elif isinstance(model, PlainEncoder):
        with softmax_of(_from_the_end(model.blocks, block).attn) as taken:
            features = model.forward_features(images)
        before = model.num_prefix_tokens
        received = taken[0][:, :, before:, before:].mean(dim=(1, 2))
    else:
        network: Any = model
        with softmax_of(_from_the_end(network.blocks, block).attn) as taken:
            tokens = network.forward_features(images)
        before = network.num_prefix_tokens
        rows = slice(0, 1) if query != "mean" and _has_cls(network) else slice(before, None)
        received = taken[0][:, :, rows, before:].mean(dim=(1, 2))
        features = tokens[:, before:].unflatten(1, network.patch_embed.grid_size)
    received = received.float()
    received = received / received.sum(dim=1, keepdim=True)
    return features, received.unflatten(1, features.shape[1:3])


def check_readable(
    model: nn.Module,
    channels: int,
    height: int,
    width: int,
    *,
    block: int = 1,
    query: AttentionQuery = "auto",
) -> str:
    """Returns why `attend` cannot read a model's attention at this image size; empty if it can.

    It is tried on tensors that have shapes only: nothing is computed.
    """
    if not isinstance(model, DyViT | PlainEncoder) and (unfit := _unlike_a_vit(model)):
        return unfit
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            attend(model, torch.empty(1, channels, height, width), block=block, query=query)
    except BadInput as error:
        return str(error)
    except Exception as error:  # a network of timm's may be built in any way
        reason = str(error).partition("\n")[0]
        return f"its attention cannot be read ({type(error).__name__}: {reason})"
    return ""


def _unlike_a_vit(network: Any) -> str:
    blocks = getattr(network, "blocks", None)
    attention = (
        getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
    )
    if not hasattr(attention, "attn_drop") or not hasattr(attention, "fused_attn"):
        return "it is no plain vision transformer, whose last block attends to all patches"
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if not hasattr(network, "num_prefix_tokens") or not grid:
        return "its patches lie on no fixed grid"
    return ""


def on_grid(maps: Tensor, h: int, w: int) -> Tensor:
    """Bring maps `[b, c, H, W]` to `h x w`: averages where that is coarser, else bilinear."""
    if maps.shape[-2:] == (h, w):
        return maps
    if maps.shape[-2] >= h and maps.shape[-1] >= w:
        return F.adaptive_avg_pool2d(maps, (h, w))
    return F.interpolate(maps, (h, w), mode="bilinear", align_corners=False)


def _from_the_end(blocks: Any, block: int) -> Any:
    if not 1 <= block <= len(blocks):
        raise BadInput(
            f"attention of block {block} from the end: it has {len(blocks)} blocks that could be asked"
        )
    return blocks[-block]


def _has_cls(network: Any) -> bool:
    if isinstance(network, DyViT | PlainEncoder):
        return False
    known = getattr(network, "has_class_token", None)
    return getattr(network, "cls_token", None) is not None if known is None else known


@contextmanager
def softmax_of(attention: Any) -> Iterator[list[Tensor]]:
    """Inside, the list takes the softmax `[n, heads, q, k]` of an attention layer of timm's when it runs."""
    taken: list[Tensor] = []
    fused = attention.fused_attn
    attention.fused_attn = False  # a fused kernel keeps its softmax to itself
    handle = attention.attn_drop.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    try:
        yield taken
    finally:
        handle.remove()
        attention.fused_attn = fused


@contextmanager
def _watching_dyvit(attention: DynamicMultiWindowAttention) -> Iterator[list[Tensor]]:
    """Records the softmax of DM-MSA, whose windows must be the whole map, by computing it again."""
    taken: list[Tensor] = []

    def compute(_: nn.Module, args: tuple[Tensor, Layout]) -> None:
        x, layout = args
        tokens = x.shape[1] * x.shape[2]
        if not all(isinstance(window, Consecutive) and window.length == tokens for window in layout.windows):
            raise BadInput(
                "the last stage of this DyViT does not see the whole map, so it does not say where it looks; "
                "its windows must be as large as the map, or 0"
            )
        q, k = (each.flatten(1, 2) for each in attention.project(x, layout)[:2])  # n s heads d
        scores = torch.einsum("nqhd,nkhd->nhqk", q * q.shape[-1] ** -0.5, k)
        taken.append(scores.float().softmax(dim=-1))

    handle = attention.register_forward_pre_hook(compute)
    try:
        yield taken
    finally:
        handle.remove()
