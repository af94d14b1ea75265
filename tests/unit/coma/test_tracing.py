"""Encoders under torch.jit.trace, which mmengine's complexity analysis uses, too."""

from typing import Any

import pytest
import torch

from coma.config import DyViTConfig, ViTConfig
from coma.models import build_encoder

SMALL = DyViTConfig(dim=8, depths=(1, 1, 2, 1), heads=(2, 2, 2, 2), windows=((4, 8), (4,), (0, 2), (0,)))

pytestmark = pytest.mark.filterwarnings("ignore")  # traces fix sizes, and torch would rather not trace


@pytest.mark.parametrize("config", [SMALL, ViTConfig(patch=8, dim=16, depth=2, heads=2)])
def test_a_traced_encoder_computes_the_same(config):
    encoder = build_encoder(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first, second = torch.randn(2, 2, 3, 70, 100)
    traced: Any = torch.jit.trace(encoder, first)
    for theirs, ours in zip(traced(second), encoder(second), strict=True):
        assert torch.allclose(theirs, ours, atol=1e-6) and ours.abs().max() > 0.1


@pytest.mark.openmmlab
def test_mmengine_counts_operations_and_parameters():
    from mmengine.analysis import get_model_complexity_info

    encoder = build_encoder(SMALL).eval()
    small, large = (
        get_model_complexity_info(encoder, (3, side, side), show_table=False, show_arch=False)
        for side in (64, 128)
    )
    assert small["params"] == large["params"] == sum(each.numel() for each in encoder.parameters())
    assert 3.5 < large["flops"] / small["flops"] < 4.5
