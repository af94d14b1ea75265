"""What the tests of encoders share: random weights, and how much one view gets to know of another."""

import torch

from coma.config import DyViTConfig
from coma.masking.patchify import unit_grid
from coma.masking.sampling import partition

TINY = DyViTConfig(
    patch=1, dim=16, depths=(1, 2, 1, 1), heads=(2, 2, 4, 4), windows=((4, 8), (3, 4), (0, 3), (2,))
)


def awake(encoder, std=0.08):
    """Random weights everywhere, so that no branch is silent (a fresh gate is)."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return encoder.eval()


def leak(encoder, height, width, views):
    """Largest change in the features of the other views when one view's pixels change."""
    torch.manual_seed(2)
    unit = encoder.unit
    h, w = unit_grid(height, width, unit)
    group = partition(torch.arange(2), h, w, views)
    images = torch.randn(2, encoder.config.channels, height, width)
    touched = (group == views - 1).repeat_interleave(unit, 1).repeat_interleave(unit, 2)[:, None]
    changed = torch.where(touched[..., :height, :width], images * -7 + 3, images)
    worst = 0.0
    with torch.no_grad():
        pyramids = encoder(images, group), encoder(changed, group)
        for before, after, stride in zip(*pyramids, encoder.strides, strict=True):
            h_i, w_i = before.shape[-2:]
            side = unit // stride
            others = (group != views - 1).repeat_interleave(side, 1).repeat_interleave(side, 2)
            difference = (before - after).abs().amax(1)
            worst = max(worst, float(difference[others[:, :h_i, :w_i]].max()))
            assert difference[~others[:, :h_i, :w_i]].max() > 0  # the view itself does change
    return worst
