"""Vision transformers of timm as encoders: timm's features, dropped tokens, views, sizes, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from encoders import awake, leak
from small_models import DECODER, loss_curve, pictures
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from coma.config import (
    BeyondConfig,
    CMTConfig,
    CoMAConfig,
    EncoderConfig,
    MAEConfig,
    TimmConfig,
    decoder_dim,
    encoder_preset,
)
from coma.config.serialization import from_plain, to_plain
from coma.errors import BadInput
from coma.models import TimmViT
from coma.models.attention_maps import attend, check_readable
from coma.models.blocks import freeze_stages
from coma.models.classifiers import build_classifier
from coma.models.position_embeddings import cubic_weights
from coma.objectives import build_objective

FAMILIES = (
    "vit_tiny_patch16_224",  # class token, learned positions
    "vit_small_patch14_reg4_dinov2",  # registers, layer scale
    "vit_base_patch16_clip_224",  # norm before the blocks, no bias in the stem
    "vit_base_patch16_siglip_224",  # no class token, attention pooling
    "vit_small_patch16_dinov3",  # rotary positions only, registers
    "eva02_tiny_patch14_336",  # learned and rotary positions, SwiGLU, fc_norm
    "vit_small_patch16_rope_mixed_ape_224",  # learned rotary frequencies for every block and head
    "vit_wee_patch16_reg1_gap_256",  # register without class token, fc_norm
    "vit_pwee_patch16_reg1_gap_256",  # attention and MLP side by side
)


def small(name, **changes):
    return replace(encoder_preset(f"timm:{name}"), patch=4, depth=2, **changes)


def build_encoder(config: Any) -> Any:
    return TimmViT(config)


def timms_features(network, images):
    """The patch tokens of timm's `forward_features`, under the norm that timm may apply after pooling."""
    tokens = network.fc_norm(network.forward_features(images))[:, network.num_prefix_tokens :]
    return tokens.unflatten(1, [side // 4 for side in images.shape[-2:]])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features_are_those_of_timm(name):
    encoder = awake(build_encoder(small(name)))
    theirs: Any = timm.create_model(
        name, patch_size=4, depth=2, img_size=[4 * n for n in encoder.config.position_grid],
        num_classes=0, dynamic_img_size=True,
    ).eval()  # fmt: skip
    theirs.attn_pool = None
    theirs.load_state_dict(
        {n.removeprefix("timm."): tensor for n, tensor in encoder.state_dict().items()}, strict=True
    )
    images = torch.randn(2, 3, 12, 20)
    expected = timms_features(theirs, images)
    torch.testing.assert_close(encoder.forward_features(images), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder(images)[0], expected.permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    if isinstance(theirs.fc_norm, nn.Identity):
        last = theirs.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(encoder(images)[0], last[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_dropped_tokens_are_as_if_they_were_never_there(name):
    """Each view equals timm's network run on the tokens of this view alone."""
    encoder = awake(build_encoder(small(name)))
    network, before = encoder.timm, encoder.num_prefix_tokens
    images = torch.randn(1, 3, 16, 16)
    group = torch.tensor([0, 1, 1, -1, 0, 0, 1, 1, -1, 1, 0, 1, 1, 1, 0, 1]).view(1, 4, 4)
    found = encoder.forward_features(images, group)[0].flatten(0, 1)
    given = network._pos_embed(network.patch_embed(images))  # class and register tokens first
    tokens, rope = given if isinstance(given, tuple) else (given, None)
    for view in (0, 1):
        seen = (group == view).flatten().nonzero()[:, 0]
        x = network.norm_pre(torch.cat([tokens[:, :before], tokens[:, before + seen]], dim=1))
        for i, block in enumerate(network.blocks):
            angles = None if rope is None else (rope[i] if network.rope_mixed else rope)[..., seen, :]
            x = block(x) if rope is None else block(x, rope=angles)
        expected = network.fc_norm(network.norm(x))[0, before:]
        torch.testing.assert_close(found[seen], expected, rtol=0, atol=1e-5)
    assert not found[(group == -1).flatten()].any()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("views", [2, 3])
def test_views_know_nothing_of_each_other(name, views):
    assert leak(awake(build_encoder(small(name))), 19, 12, views) == 0


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_hidden_tokens_are_not_computed(name):
    encoder = build_encoder(small(name)).eval()
    lengths = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape))
    group = torch.full((2, 8, 8), -1)
    group[:, :2, :2] = 0
    encoder(torch.randn(2, 3, 32, 32), group)
    assert lengths == [(2, 4 + encoder.num_prefix_tokens, encoder.config.dim)]


@pytest.mark.parametrize("name", FAMILIES)
def test_buffers_that_no_file_holds_are_computed_for_assigned_weights(name):
    encoder = awake(build_encoder(small(name)))
    with torch.device("meta"):
        classifier = build_classifier(encoder.config, 2).eval()
    head = {"head.weight": torch.zeros(2, encoder.num_features), "head.bias": torch.zeros(2)}
    classifier.load_state_dict(encoder.state_dict() | head, assign=True)
    images = torch.randn(1, 3, 8, 12)
    torch.testing.assert_close(classifier.pool(images), encoder.pool(images), rtol=0, atol=0)


@pytest.mark.parametrize("sides", [(14, 14), (14, 5), (7, 16), (37, 16), (1, 3), (3, 1)])
def test_matrices_resample_positions_as_timm_does(sides):
    old, new = sides
    table = torch.randn(1, old * 5, 8)
    resample: Any = resample_abs_pos_embed
    expected = resample(table, [new, 9], [old, 5], num_prefix_tokens=0)
    down, across = (cubic_weights(a, b, device=table.device) for a, b in ((old, new), (5, 9)))
    found = torch.einsum("rh,bhwc,sw->brsc", down, table.unflatten(1, (old, 5)), across)
    torch.testing.assert_close(found.flatten(1, 2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        CoMAConfig(decoder=DECODER),
        MAEConfig(decoder=DECODER),
        BeyondConfig(decoder=DECODER),
        BeyondConfig(degrade="zoom-in+coma", decoder=DECODER),
    ],
    ids=["coma", "mae", "zoom-in+mask", "zoom-in+coma"],
)
@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch16_dinov3"])
def test_every_method_trains_it(name, objective):
    torch.manual_seed(0)
    model: Any = build_objective(objective, build_encoder(small(name)))
    curve = loss_curve(model, pictures(), 6)
    assert curve[-1] < curve[0]
    assert all(p.grad is not None for p in model.parameters())
    model.set_grad_checkpointing(True)
    assert loss_curve(model, pictures(), 1)[0] < curve[0]


def test_the_student_of_cmt_may_be_one_of_them():
    encoder = build_encoder(small("vit_small_patch16_dinov3"))
    build_objective(CMTConfig(decoder=DECODER), encoder).check_images(16, 16)
    features, attention = attend(encoder.eval(), torch.randn(2, 3, 16, 20))
    assert features.shape == (2, 4, 5, 384) and attention.shape == (2, 4, 5)
    torch.testing.assert_close(attention.sum(dim=(1, 2)), torch.ones(2))
    assert "class token that was trained" in check_readable(encoder, 3, 16, 16, query="class")
    side_by_side = build_encoder(small("vit_pwee_patch16_reg1_gap_256"))
    assert "cannot be read" in check_readable(side_by_side, 3, 16, 16)


def test_settings_are_resolved_once_and_stored_as_plain_data():
    config = encoder_preset("timm:vit_small_patch14_reg4_dinov2.lvd142m", channels=4)
    assert config == TimmConfig("vit_small_patch14_reg4_dinov2", 14, 384, 12, (37, 37), channels=4)
    assert (config.unit, config.strides, config.widths, decoder_dim(config)) == (14, (14,), (384,), 512)
    assert decoder_dim(encoder_preset("timm:vit_tiny_patch16_224")) == 192
    plain = to_plain(config, EncoderConfig)
    assert plain["architecture"] == "timm" and plain["position_grid"] == (37, 37)


def test_channels_patch_and_drop_path_are_timms():
    encoder = build_encoder(small("test_vit", channels=5, drop_path=0.3))
    assert encoder.timm.patch_embed.proj.weight.shape[1:] == (5, 4, 4)
    assert [block.drop_path1.drop_prob for block in encoder.blocks[1:]] == pytest.approx([0.3])


def test_frozen_stages_freeze_tokens_and_positions():
    encoder = build_encoder(small("vit_small_patch16_rope_mixed_ape_224"))
    freeze_stages(encoder, 1)
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert all(name.startswith(("timm.blocks.1.", "timm.norm.")) for name in trained) and len(trained) > 4
    freeze_stages(encoder, 2)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_belongs_to_a_layer(name):
    from timm.models import group_parameters

    classifier = build_classifier(small(name), 3)
    layers: Any = group_parameters(classifier, classifier.group_matcher(), reverse=True)
    assert not [n for n, layer in layers.items() if layer == 0 and ("head" in n or "blocks." in n)]
    blocks = {n: layer for n, layer in layers.items() if "blocks." in n}
    assert all(layer == 1 + int("blocks.1." in n) for n, layer in blocks.items())
    assert layers["head.weight"] >= 2
    assert classifier(torch.randn(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_small_patch14_dinov4", "did you mean vit_small_patch14_dinov2"),
        ("resnet18", "not a vision transformer that can drop tokens"),
        ("vit_small_r26_s32_224", "not a vision transformer that can drop tokens"),
        ("deit_tiny_distilled_patch16_224", "not a vision transformer that can drop tokens"),
        ("beit_base_patch16_224", "not a vision transformer that can drop tokens"),
        ("vit_tiny_patch16_224.nothing", "nothing"),
        ("hf-hub:someone/something", "no model of timm's"),
    ],
)
def test_other_networks_are_refused(name, message):
    with pytest.raises(BadInput, match=message):
        encoder_preset(f"timm:{name}")


@pytest.mark.parametrize("name", ["hf-hub:someone/something", "local-dir:.", "../x", "vit_tiny.tag", ""])
def test_files_can_name_nothing_but_architectures(name):
    config = to_plain(encoder_preset("timm:test_vit")) | {"name": name}
    with pytest.raises(BadInput, match="not the name of an architecture"):
        from_plain(config, TimmConfig, source="config.json")


def test_settings_that_do_not_fit_each_other_are_refused():
    with pytest.raises(BadInput, match="cannot be built with these settings"):
        build_encoder(replace(encoder_preset("timm:vit_tiny_patch16_224"), dim=100))
