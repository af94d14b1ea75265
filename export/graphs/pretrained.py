"""What pre-training made: an encoder that gives features, a reconstructor that fills in what is hidden."""

from __future__ import annotations

from torch import Tensor, nn

from coma.models import Encoder
from coma.objectives import MaskedPixels


class EncoderForm(nn.Module):
    """Images to the feature pyramid and the pooled feature.

    Args:
        encoder: DyViT or plain ViT.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images `[b, c, H, W]` to maps `[b, c_i, ceil(H/s_i), ceil(W/s_i)]`, finest first, and `[b, c]`.

        The last one is the mean of the last map over the whole units that cover the image.
        """
        pyramid = self.encoder(images.to(self.encoder.norm.weight.dtype))
        pooled = pyramid[-1].float().mean(dim=(2, 3))
        return *(each.float() for each in pyramid), pooled


class ReconstructorForm(nn.Module):
    """Images and a map of what is visible to images whose hidden units were predicted.

    Mean and contrast of hidden units come from visible ones nearby (see `objectives.targets`): hidden pixels
    have no influence on the output.

    Args:
        objective: A pre-trained objective.
    """

    def __init__(self, objective: MaskedPixels) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor, visible: Tensor) -> tuple[Tensor]:
        """Images `[b, c, H, W]` and bool `[b, h, w]`, one for each mask unit, to `[b, c, H, W]`."""
        return (self.objective.reconstruct(images, visible),)
