"""Encoders and classifiers of this project as networks of timm, with equal features and logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from coma.image_size import ImageSize
from coma.masking.patchify import unit_grid
from coma.models.classifiers import DyViTClassifier
from coma.models.dyvit import DyViT
from coma.models.position_embeddings import sincos_positions
from coma.models.timm_vit import TimmViT
from coma.models.vit import ViT


def to_timm(encoder: Any, image_size: ImageSize) -> Any:
    """Returns the network of timm's classes that computes what an encoder or classifier computes.

    Args:
        encoder: Any encoder of this room, perhaps under a linear head. Its modules are used, not copied.
        image_size: Size of the images for which the positions of a plain ViT are tabulated; timm resamples
            them for others.

    Returns:
        DyViT in timm's registry, or timm's own VisionTransformer or Eva; with the head, or none.
    """
    if isinstance(encoder, DyViT):
        if isinstance(encoder, DyViTClassifier):
            return encoder
        network = DyViTClassifier(encoder.config, 0)
        network.load_state_dict(encoder.state_dict())
        return network
    network = encoder.timm if isinstance(encoder, TimmViT) else _vision_transformer(encoder, image_size)
    if isinstance(network.norm, nn.Identity):  # ours normalises before it pools
        network.norm, network.fc_norm = network.fc_norm, network.norm
    head = getattr(encoder, "head", None)
    network.reset_classifier(0 if head is None else head.out_features, "avg")
    if head is not None:
        network.head.load_state_dict(head.state_dict())
    return network


def _vision_transformer(encoder: ViT, image_size: ImageSize) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    config = encoder.config
    rows, cols = unit_grid(*image_size, config.patch)
    network = VisionTransformer(
        img_size=(rows * config.patch, cols * config.patch),
        patch_size=config.patch,
        in_chans=config.channels,
        num_classes=0,
        global_pool="avg",
        fc_norm=False,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        no_embed_class=True,
        dynamic_img_size=True,
    )
    network.norm, network.blocks = encoder.norm, nn.Sequential(*encoder.blocks)
    network.patch_embed.proj = encoder.stem
    places = sincos_positions(rows, cols, config.dim, device=torch.device("cpu"))
    network.pos_embed = nn.Parameter(places.flatten(0, 1)[None])
    network.cls_token = nn.Parameter(encoder.cls_token.detach()[None, None])
    return network
