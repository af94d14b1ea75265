"""What plain vision transformers share: one map, one stride, and views that are encoded one sequence each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.fx
from einops import rearrange
from torch import Tensor, nn

from coma.config import TimmConfig, ViTConfig
from coma.config.artifact import ArtifactConfig
from coma.masking.patchify import pad_to_units
from coma.models.attention import WindowGate
from coma.models.dyvit import check_images
from coma.models.view_sequences import ViewSequences, image_sequences, listed_units

for _name in ("check_images", "image_sequences", "pad_to_units", "rearrange"):
    torch.fx.wrap(_name)  # one node each in graphs of torch.fx, which reads sizes at every call


class PlainEncoder(nn.Module):
    """Backbone: images to a pyramid of one map. Subclasses embed patches and encode sequences.

    Args:
        config: Settings of the encoder.
    """

    output_fmt = "NHWC"
    artifact: ArtifactConfig
    """Description of the artifact that the model was loaded from; absent on other models."""
    blocks: Any
    """Transformer blocks, which attend to all tokens of a sequence."""
    norm: nn.Module
    """Norm of the features."""
    num_prefix_tokens: int
    """Tokens that stand before the patches in every sequence."""

    def __init__(self, config: ViTConfig | TimmConfig) -> None:
        super().__init__()
        self.config = config
        self.unit = config.unit
        self.num_features = config.num_features
        self.strides = config.strides
        self.grad_checkpointing = False

    def forward(self, images: Tensor, group: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns one map `[b, dim, ceil(H/patch), ceil(W/patch)]`; `group` as in `DyViT.forward`."""
        return (rearrange(self.forward_features(images, group), "b h w c -> b c h w"),)

    pyramid = forward
    """The pyramid, also of a classifier, whose own `forward` returns logits."""

    def window_gates(self) -> list[tuple[int, WindowGate]]:
        """Returns no gates: every layer has one window, the whole image."""
        return []

    def forward_features(
        self, images: Tensor, group: Tensor | None = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """Returns one feature vector per mask unit, `[b, h, w, dim]`; see `DyViT.forward_features`."""
        check_images(images, group, self.config.channels, self.unit)
        x = self._embed(pad_to_units(images, self.unit))
        rows, cols = x.shape[1:3]
        sequences = image_sequences(rows, cols, group, sizes)
        x = self._encode(sequences.gather(x.flatten(1, 2)), sequences)
        return sequences.scatter(x).unflatten(1, (rows, cols))

    def forward_listed(self, images: Tensor, listed: Tensor) -> Tensor:
        """Returns the features of some units, from these alone; see `DyViT.forward_listed`."""
        check_images(images, None, self.config.channels, self.unit)
        x = self._embed(pad_to_units(images, self.unit))
        sequences = listed_units(x.shape[1], x.shape[2], listed)
        return self._encode(sequences.gather(x.flatten(1, 2)), sequences)

    def pool(self, images: Tensor) -> Tensor:
        """Mean of the map, `[b, dim]`: what linear and nearest-neighbour classifiers work on."""
        return self.forward_features(images).mean(dim=(1, 2))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable

    def _embed(self, images: Tensor) -> Tensor:
        # b c H W -> b h w c, positions included
        raise NotImplementedError

    def _encode(self, tokens: Tensor, sequences: ViewSequences) -> Tensor:
        # n s c -> n s c, normalised
        raise NotImplementedError
