"""Encoders and reconstructions from a list of visible units equal those from a mask."""

import pytest
import torch
from export_files import DYVIT, OBJECTIVE, VIT, awake

from coma.config import DyViTConfig
from coma.masking.patchify import mask_of
from coma.masking.sampling import group_of
from coma.models import build_encoder
from coma.models.timm_vit import timm_config
from coma.objectives import build_objective

CROSSING = DyViTConfig(
    patch=2, dim=8, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), windows=((4, 12), (2, 6), (2, 3), (2,))
)
"""Windows that cross units without covering the map."""
MODELS = {
    "dyvit": lambda: DYVIT,
    "crossing windows": lambda: CROSSING,
    "vit": lambda: VIT,
    "timm": lambda: timm_config("vit_tiny_patch16_224"),
}
SIZE = (50, 64)  # 4 x 4 units of 16 px, the last row of them padded


def lists(count: int) -> torch.Tensor:
    return torch.stack([torch.randperm(16)[:count] for _ in range(3)])


def mask(listed: torch.Tensor) -> torch.Tensor:
    return torch.stack([mask_of(each, 4, 4) for each in listed])


@pytest.mark.parametrize("count", [1, 5, 16])
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_features_are_those_of_the_mask_in_the_order_of_the_list(model, count):
    encoder = build_encoder(MODELS[model]())
    awake(encoder).eval()
    images, listed = torch.randn(3, 3, *SIZE), lists(count)
    features = encoder.forward_features(images, group_of(mask(listed))).flatten(1, 2)
    wanted = features.gather(1, listed[..., None].expand(-1, -1, features.shape[-1]))
    torch.testing.assert_close(encoder.forward_listed(images, listed), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["dyvit", "vit"])
@torch.no_grad()
def test_a_reconstruction_is_that_of_the_mask_and_sees_no_hidden_pixel(model):
    objective = build_objective(OBJECTIVE, build_encoder(MODELS[model]()))
    awake(objective).eval()
    images, listed = torch.randn(3, 3, *SIZE), lists(5)
    found = objective.reconstruct_listed(images, listed)
    torch.testing.assert_close(found, objective.reconstruct(images, mask(listed)), rtol=1e-4, atol=1e-5)
    hidden = ~mask(listed).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None, :50]
    changed = objective.reconstruct_listed(images + 3 * hidden, listed)
    assert torch.equal(changed, found)
