"""Encoders under torch.jit.trace, which counters of operations use (mmengine's, fvcore's), and torch.fx."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torchvision.models.feature_extraction import create_feature_extractor

from coma.config import DyViTConfig, TimmConfig, ViTConfig
from coma.errors import BadInput
from coma.models import build_encoder
from coma.models.classifiers import build_classifier
from coma.models.timm_vit import timm_config

SMALL = DyViTConfig(dim=8, depths=(1, 1, 2, 1), heads=(2, 2, 2, 2), windows=((4, 8), (4,), (0, 2), (0,)))

CONFIGS = [SMALL, ViTConfig(patch=8, dim=16, depth=2, heads=2)]

pytestmark = pytest.mark.filterwarnings("ignore")  # traces fix sizes, and torch would rather not trace


@pytest.mark.parametrize("config", CONFIGS)
def test_a_traced_encoder_computes_the_same(config):
    encoder = _random(build_encoder(config))
    first, second = torch.randn(2, 2, 3, 70, 100)
    traced: Any = torch.jit.trace(encoder, first)
    for theirs, ours in zip(traced(second), encoder(second), strict=True):
        assert torch.allclose(theirs, ours, atol=1e-6) and ours.abs().max() > 0.1


@pytest.mark.parametrize("config", [*CONFIGS, timm_config("eva02_tiny_patch14_224")])
def test_a_graph_of_torch_fx_computes_the_same_at_every_size_and_for_every_view(config):
    encoder = _random(build_encoder(replace(config, depth=2) if isinstance(config, TimmConfig) else config))
    graph, unit = torch.fx.symbolic_trace(encoder), encoder.unit
    views = torch.randint(-1, 2, (1, 3, 5))
    for b, height, width, group in (
        (2, 2 * unit, 2 * unit, None),
        (1, 3 * unit - 1, 5 * unit, None),
        (1, 3 * unit, 5 * unit, views),
    ):
        images = torch.randn(b, 3, height, width)
        for theirs, ours in zip(graph(images, group), encoder(images, group), strict=True):
            assert torch.equal(theirs, ours) and ours.abs().max() > 0.1
    with pytest.raises(BadInput, match=r"takes \[batch, 3, height, width\]"):
        graph(torch.randn(1, 4, unit - 1, unit))


def test_features_are_taken_out_of_a_classifier_by_name_and_its_graph_trains():
    model, images = _random(build_classifier(SMALL, 5)), torch.randn(2, 3, 70, 100)
    names = {"stages.2.blocks.1.attn.proj": "attention", "head": "logits"}
    extractor: Any = create_feature_extractor(model, names)
    found, seen = extractor(images), []
    model.stages[2].blocks[1].attn.proj.register_forward_hook(lambda *args: seen.append(args[2]))
    assert torch.equal(found["logits"], model(images)) and torch.equal(found["attention"], seen[0])
    model(images).sum().backward()
    expected = {name: each.grad for name, each in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    torch.fx.symbolic_trace(model)(images).sum().backward()
    assert all(torch.equal(each.grad, expected[name]) for name, each in model.named_parameters())


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


def _random(model: Any) -> Any:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
