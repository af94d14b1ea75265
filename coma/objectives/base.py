"""Base of all methods: encoder, decoder, reconstruction. Methods add masks or degradations, and a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from coma.config import ObjectiveConfig
from coma.config.artifact import ArtifactConfig
from coma.errors import BadInput
from coma.masking.patchify import pad_to_units, patchify, unit_grid, unpatchify
from coma.masking.sampling import group_of
from coma.models import Decoder, Encoder
from coma.models.view_sequences import listed_units
from coma.objectives.targets import Statistics, hidden_loss, nearby_statistics, pixel_targets, unit_statistics


@dataclass
class ObjectiveOutput:
    """One step's results.

    Attributes:
        loss: Scalar, float32.
        prediction: `[v, b, h, w, p]`: the p = unit*unit*c pixels of a unit, or features (CMT-MAE).
        target: `[b, h, w, p]`, float32.
        visible: bool `[v, b, h, w]`: the units that each of the v views sees.
        metrics: Scalars to log.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    visible: Tensor
    metrics: dict[str, Tensor]


class MaskedPixels(nn.Module):
    """Predicts the pixels of masked units.

    Args:
        config: The method's settings.
        encoder: Any encoder of this room.
    """

    artifact: ArtifactConfig
    """Description of the artifact that the model was loaded from; absent on other models."""

    def __init__(self, config: ObjectiveConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = Decoder(
            encoder.num_features, encoder.unit**2 * encoder.config.channels, config.decoder
        )

    picture_note = ""
    """Note that is shown under its reconstructions."""

    def draw_visible(self, seeds: Tensor, h: int, w: int) -> Tensor:
        """Returns the units that each view sees, bool `[v, b, h, w]`, drawn by int64 `seeds [b]`."""
        raise NotImplementedError

    def degraded(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Images `[b, c, H, W]` as the encoder gets them, but for what masks hide: here, as they are."""
        return images

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Features of the visible units, `[b, h, w, c]`, zeros elsewhere; images are whole units."""
        return self.encoder.forward_features(images, group_of(visible))

    def check_images(self, height: int, width: int) -> None:
        """Raises BadInput where the method cannot train on images of this size; nothing is computed."""

    def before_step(self, progress: float) -> None:
        """Called by the trainer before every optimizer step, with the share of the run that is done."""

    def after_step(self, progress: float) -> None:
        """Called after every optimizer step, with the same number as before it."""

    def predict(self, images: Tensor, features: Tensor, visible: Tensor) -> ObjectiveOutput:
        """Decode `features` (see `Decoder.forward`), compare with the hidden pixels of `images`."""
        prediction = self.decoder(features, visible)
        target = pixel_targets(patchify(images, self.encoder.unit), self.config.norm_pix)
        loss = hidden_loss(prediction, target, visible)
        explained = 1 - loss.detach() / target.var().clamp(min=1e-8)
        return ObjectiveOutput(loss, prediction, target, visible, {"explained_variance": explained})

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Returns rows and columns of mask units of `images [b, c, H, W]`.

        Raises:
            BadInput: H or W is not a multiple of the unit: a loss on padding would teach padding.
        """
        height, width = images.shape[-2:]
        unit = self.encoder.unit
        if height % unit or width % unit:
            raise BadInput(f"training images of {height} x {width} px are not whole mask units of {unit} px")
        return unit_grid(height, width, unit)

    def reconstruct(self, images: Tensor, visible: Tensor, statistics: Statistics = "visible") -> Tensor:
        """Fill in the hidden units from the visible ones.

        Args:
            images: `[b, c, H, W]`, normalised, any size of at least one unit.
            visible: bool `[b, h, w]`.
            statistics: With norm-pix, where mean and contrast of hidden units come from: `visible` carries
                over those of the visible units nearby; `target` takes the true ones, which leaks them.

        Returns:
            Images like the input; visible units keep their pixels.
        """
        return self.fill_in(images, visible, statistics)

    @torch.no_grad()
    def reconstruct_listed(self, images: Tensor, listed: Tensor) -> Tensor:
        """`reconstruct` from a list of the visible units: the encoder computes these alone.

        Args:
            images: `[b, c, H, W]`, normalised, any size of at least one unit.
            listed: Numbers of the visible units, row by row, each at most once: int64 `[b, s]`.
        """
        sequences = listed_units(*unit_grid(images.shape[-2], images.shape[-1], self.encoder.unit), listed)
        features = self.encoder.forward_listed(images.to(self.decoder.embed.weight.dtype), listed)
        features = sequences.scatter(features).unflatten(1, (sequences.rows, sequences.cols))
        visible = cast(Tensor, sequences.group) >= 0
        return self._fill_in(images, visible, features, "visible")

    @torch.no_grad()
    def fill_in(
        self, images: Tensor, visible: Tensor, statistics: Statistics, *, everywhere: bool = False
    ) -> Tensor:
        """`reconstruct`; with `everywhere`, visible units are predicted as well."""
        unit = self.encoder.unit
        units = patchify(pad_to_units(images, unit), unit).float()
        shown_only = unpatchify(units * visible[..., None], unit).to(self.decoder.embed.weight.dtype)
        return self._fill_in(
            images, visible, self.encode(shown_only, visible), statistics, everywhere=everywhere
        )

    def _fill_in(
        self,
        images: Tensor,
        visible: Tensor,
        features: Tensor,
        statistics: Statistics,
        *,
        everywhere: bool = False,
    ) -> Tensor:
        # features b h w c of the visible units
        height, width = images.shape[-2:]
        unit = self.encoder.unit
        units = patchify(pad_to_units(images, unit), unit).float()
        predicted = self.decoder(features, visible[None])[0].float()
        if self.config.norm_pix:
            honest = statistics == "visible"
            mean, std = nearby_statistics(units, visible) if honest else unit_statistics(units)
            predicted = predicted * std + mean
        filled = predicted if everywhere else torch.where(visible[..., None], units, predicted)
        return unpatchify(filled, unit)[..., :height, :width].to(images.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of storing them."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable
