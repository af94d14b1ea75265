"""Encoders and the decoder: pure modules that know no loaders, no paths and no training."""

from __future__ import annotations

from coma.config import EncoderConfig
from coma.models.decoder import Decoder
from coma.models.dyvit import DyViT
from coma.models.timm_vit import TimmViT
from coma.models.vit import ViT
from coma.registry import entry_of, resolve

Encoder = DyViT | ViT | TimmViT

__all__ = ["Decoder", "DyViT", "Encoder", "TimmViT", "ViT", "build_encoder"]


def build_encoder(config: EncoderConfig) -> Encoder:
    """Returns the encoder that `config` describes, freshly initialised."""
    return resolve(entry_of(config).encoder)(config)
