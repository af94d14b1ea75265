"""Encoder, mean pooling, linear head: a classifier whose encoder's parameters keep their names.

Importing this registers DyViT with timm (see `timm_models`), whose classifier is used as it is.
"""

from __future__ import annotations

from torch import Tensor, nn

from coma.config import DyViTConfig, EncoderConfig, ViTConfig
from coma.models.timm_models import DyViTClassifier
from coma.models.vit import ViT


class ViTClassifier(ViT):
    """Plain ViT with a linear head on mean-pooled tokens (MAE, He et al. 2021, app. A.2: without cls token).

    Args:
        config: The backbone.
        num_classes: Outputs.
    """

    def __init__(self, config: ViTConfig, num_classes: int) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Images `[b, c, H, W]` to logits `[b, num_classes]`."""
        return self.head(self.pool(images))


Classifier = DyViTClassifier | ViTClassifier


def build_classifier(config: EncoderConfig, num_classes: int) -> Classifier:
    """The encoder that `config` describes under a linear head, freshly initialised."""
    if isinstance(config, DyViTConfig):
        return DyViTClassifier(config, num_classes)
    return ViTClassifier(config, num_classes)
