"""DyViT inside timm, by timm's own conventions."""

import shutil
from dataclasses import replace
from typing import Any

import export_files
import pytest
import timm
import torch
from artifact_files import rewrite
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay

import coma
import coma.models.classifiers  # registers the models
from coma.config import dyvit_preset, encoder_preset
from coma.errors import BadArtifact, BadInput
from coma.models import DyViT

WIDE = ("tiny at 64 px", "plain", "timm")
"""Artifacts that are there for images of 32 x 64 px as well."""
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


def test_encoder_weights_carry_over_by_name(caplog):
    config = create().config
    encoder, model = DyViT(config).eval(), create(num_classes=5)
    head = model.head.weight.clone()
    model.load_state_dict(encoder.state_dict())
    assert "head.weight and head.bias: not among the tensors" in caplog.text
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.forward_features(images), encoder.forward_features(images))
    assert torch.equal(model.head.weight, head)
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.bias"):
        model.load_state_dict({n: t for n, t in encoder.state_dict().items() if n != "norm.bias"})


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Artifacts of every kind and patch, by name."""
    folder = tmp_path_factory.mktemp("artifacts")
    models = {
        "tiny at 32 px": dyvit_preset("tiny", 32),
        "tiny at 64 px": dyvit_preset("tiny", 64),
        "tiny at 224 px": dyvit_preset("tiny"),
        "plain": export_files.VIT,
        "timm": replace(encoder_preset("timm:eva02_tiny_patch14_336"), dim=24, depth=2, patch=8),
    }
    for name, model in models.items():
        export_files.pretrained(folder / name, model)
        export_files.classifier(folder / f"{name}, classifier", model)
    for name in WIDE:
        for kind in ("", ", classifier"):
            wide = shutil.copytree(folder / f"{name}{kind}", folder / f"wide {name}{kind}")
            rewrite(wide, image_size=[32, 64])
    return folder


@pytest.mark.parametrize(("name", "side"), [("32", 32), ("64", 64), ("224", 64)])
@pytest.mark.parametrize("kind", ["", ", classifier"])
@torch.no_grad()
def test_timm_loads_an_artifact_of_any_patch(artifacts, name, side, kind, caplog):
    folder = artifacts / f"tiny at {name} px{kind}"
    classes = 3 if kind else 7
    weights = folder / "model.safetensors"
    model: Any = timm.create_model("dyvit_tiny", num_classes=classes, checkpoint_path=weights).eval()
    own: Any = coma.load_classifier(folder) if kind else coma.load_encoder(folder)
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(model.forward_features(images), own.forward_features(images))
    assert model(images).shape == (2, classes)
    if kind:
        torch.testing.assert_close(model(images), own(images))
    assert ("coma.create_timm" in caplog.text) == (name != "224")
    assert ("head keeps its initial weights" in caplog.text) == (not kind)

    chosen = {"features_only": True, "out_indices": (1, 2), "checkpoint_path": weights}
    backbone: Any = timm.create_model("dyvit_tiny", **chosen).eval()
    assert backbone.feature_info.reduction() == list(own.strides[1:3])
    for found, expected in zip(backbone(images), own.pyramid(images)[1:3], strict=True):
        torch.testing.assert_close(found, expected)


def test_nothing_is_loaded_silently():
    backbone = create(features_only=True, out_indices=(0, 1))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    encoder = DyViT(create().config)
    for strange in ({}, {"patch_embed.weight": torch.zeros(1)}):
        for strict in (True, False):
            with pytest.raises(BadInput, match=f"none of {len(strange)} tensors"):
                backbone.load_state_dict(strange, strict=strict)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    backbone.load_state_dict(encoder.state_dict())
    loaded = backbone.state_dict()
    assert all(torch.equal(encoder.state_dict()[n.removeprefix("model.")], t) for n, t in loaded.items())
    backbone.load_state_dict(loaded)
    with pytest.raises(RuntimeError, match="Missing key"):
        backbone.load_state_dict({n: t for n, t in loaded.items() if "gate" not in n})


@pytest.mark.parametrize("name", ["tiny at 32 px", *WIDE, *(f"wide {each}" for each in WIDE)])
@torch.no_grad()
def test_create_timm_gives_networks_of_timm_with_equal_outputs(artifacts, name):
    encoder, classifier = (
        coma.load_encoder(artifacts / name),
        coma.load_classifier(artifacts / f"{name}, classifier"),
    )
    size = encoder.artifact.image_size
    images = torch.randn(2, 3, *size)
    tokens = coma.create_timm(artifacts / name).forward_features(images)
    expected = encoder.forward_features(images)
    if tokens.ndim == 3:  # class tokens first
        tokens = tokens[:, 1:].unflatten(1, expected.shape[1:3])
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    model = coma.create_timm(artifacts / f"{name}, classifier")
    torch.testing.assert_close(model(images), classifier(images), rtol=0, atol=1e-5)
    data = resolve_model_data_config(model)
    assert data["input_size"] == (3, *size) and data["mean"] == encoder.artifact.mean
    assert coma.create_timm(artifacts / name, num_classes=7)(images).shape == (2, 7)

    backbone = coma.create_timm(artifacts / name, features_only=True, norm=True)
    maps = backbone(images)
    assert len(maps) == len(encoder.strides)
    for found, expected, stride in zip(maps, encoder(images), backbone.feature_info.reduction(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert stride * found.shape[-2] >= size.height and stride * found.shape[-1] >= size.width
    first = coma.create_timm(artifacts / name, features_only=True, out_indices=(0,))(images)
    assert [each.shape[1] for each in first] == [backbone.model.feature_info[0]["num_chs"]]


def test_create_timm_refuses_other_kinds_and_stages(artifacts, tmp_path):
    with pytest.raises(BadArtifact, match="no such directory"):
        coma.create_timm(tmp_path / "nothing")
    with pytest.raises(BadInput, match="out_indices"):
        coma.create_timm(artifacts / "tiny at 64 px", features_only=True, out_indices=(7,))


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
