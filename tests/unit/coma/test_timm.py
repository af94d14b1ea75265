"""DyViT inside timm, by timm's own conventions."""

from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay

import coma.models.classifiers  # noqa: F401 (registers the models)
from coma.config import dyvit_preset
from coma.models import DyViT

TINY = {"img_size": 32, "depths": (1, 1, 2, 1)}


def create(**kwargs) -> Any:
    return timm.create_model("dyvit_tiny", **TINY, **kwargs).eval()


def test_registered_models_and_their_configuration():
    assert set(timm.list_models("dyvit_*")) == {"dyvit_tiny", "dyvit_small", "dyvit_base", "dyvit_large"}
    model = create(num_classes=7)
    assert model.default_cfg["first_conv"] == "stem.conv" and model.default_cfg["classifier"] == "head"
    data = resolve_model_data_config(model)
    assert data["input_size"][0] == 3 and len(data["mean"]) == 3
    assert model.pretrained_cfg["architecture"] == "dyvit_tiny"


@pytest.mark.parametrize("size", [(32, 32), (40, 27)])
def test_features_only_describes_what_it_returns(size):
    model = create(features_only=True, out_indices=(0, 2, 3), in_chans=4)
    maps = model(torch.randn(2, 4, *size))
    strides, channels = model.feature_info.reduction(), model.feature_info.channels()
    assert (strides, channels) == ([1, 4, 8], [32, 128, 256])
    for x, stride, channel in zip(maps, strides, channels, strict=True):
        assert x.shape == (2, channel, -(-size[0] // stride), -(-size[1] // stride))


def test_features_only_prunes_what_it_does_not_need():
    short = create(features_only=True, out_indices=(1,))
    assert not any("stages.2" in name or "head" in name for name, _ in short.named_parameters())
    assert [x.shape for x in short(torch.randn(1, 3, 32, 32))] == [(1, 64, 16, 16)]


def test_forward_is_features_then_head():
    model = create(num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    torch.testing.assert_close(model(images), model.forward_head(features))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert create(num_classes=0)(images).shape == (2, 256)
    assert create(num_classes=0, global_pool="")(images).shape == (2, 4, 4, 256)


def test_forward_intermediates():
    model = create(num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images))
    assert [x.shape[1] for x in maps] == [32, 64, 128, 256]
    last = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(last[0].permute(0, 2, 3, 1), final)
    early = model.forward_intermediates(images, indices=[0, 1], stop_early=True, output_fmt="NHWC")[1]
    torch.testing.assert_close(early[1], maps[1].permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="NCHW or NHWC"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_reset_classifier():
    model = create(num_classes=5)
    model.reset_classifier(9)
    assert model.get_classifier().out_features == model.num_classes == 9
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 9)
    model.reset_classifier(0, "avg")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 256)
    with pytest.raises(ValueError, match="avg"):
        model.reset_classifier(0, "max")


@pytest.mark.parametrize("coarse", [False, True])
def test_every_parameter_belongs_to_a_layer_group(coarse):
    model = create(num_classes=5)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    depth = {name: layer for layer, group in groups.items() for name in group}
    order = ["stem.conv.weight", "stages.0.blocks.0.attn.qkv.weight", "stages.2.blocks.1.mlp.fc1.weight"]
    assert depth[order[0]] < depth[order[1]] < depth[order[2]] <= depth["norm.weight"] <= depth["head.weight"]


def test_layer_decay_scales_rise_from_stem_to_head():
    model = create(num_classes=5)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.stem.conv.weight)] < scale[id(model.stages[2].blocks[0].mlp.fc1.weight)]
    assert scale[id(model.head.weight)] == 1.0
    assert all(not group["weight_decay"] for group in groups for p in group["params"] if p.ndim == 1)
    assert create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.75).param_groups


def test_encoder_weights_carry_over_by_name():
    config = create().config
    encoder, model = DyViT(config).eval(), create(num_classes=5)
    report = model.load_state_dict(encoder.state_dict(), strict=False)
    assert set(report.missing_keys) == {"head.weight", "head.bias"} and not report.unexpected_keys
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.forward_features(images), encoder.forward_features(images))


def test_grad_checkpointing_and_drop_path_are_set_through_timm():
    model = create(num_classes=5, drop_path_rate=0.2)
    assert model.config.drop_path == 0.2
    model.set_grad_checkpointing(True)
    passes = []
    model.get_submodule("stages.0.blocks.0").register_forward_pre_hook(lambda *_: passes.append(1))
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.stem.conv.weight.grad is not None
    assert len(passes) == 2


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="wndows"):
        timm.create_model("dyvit_tiny", wndows=((4,),))


def test_presets_match_the_registered_models():
    assert timm.create_model("dyvit_small").config == dyvit_preset("small")
