"""Encoders and the decoder: pure modules that know no loaders, no paths and no training."""

from __future__ import annotations

from coma.config import DyViTConfig, EncoderConfig
from coma.models.decoder import Decoder
from coma.models.dyvit import DyViT
from coma.models.vit import ViT

Encoder = DyViT | ViT

__all__ = ["Decoder", "DyViT", "Encoder", "ViT", "build_encoder"]


def build_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that `config` describes, freshly initialised."""
    return DyViT(config) if isinstance(config, DyViTConfig) else ViT(config)
