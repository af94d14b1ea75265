"""Teachers, what they attend to, and the masks that this guides."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_models import ENCODERS, pictures
from taught_models import STATISTICS
from torch import nn

from coma.config import (
    CMTConfig,
    PretrainConfig,
    TeacherConfig,
)
from coma.errors import BadArtifact, BadInput
from coma.masking.sampling import deal, draw, group_sizes
from coma.models import build_encoder
from coma.models.attention_maps import attend, check_readable, on_grid
from coma.models.teacher import to_units
from coma.objectives.teachers import PUBLISHED, caveats, load_teacher, with_weights_hash

# guided masks ----------------------------------------------------------------------------------


def test_the_first_unit_drawn_follows_the_weights():
    weights = torch.tensor([0.05, 0.1, 0.15, 0.3, 0.4, 0.0]).view(1, 2, 3)
    draws = 20_000
    first = draw(weights.expand(draws, 2, 3), torch.arange(draws), 1).flatten(1).float().argmax(1)
    counts = first.bincount(minlength=6).double()
    expected = weights.flatten()[:5] * draws
    assert counts[5] == 0
    assert ((counts[:5] - expected) ** 2 / expected).sum() < 18.5  # 4 degrees of freedom, one in a thousand
    uniform = torch.full((5,), draws / 5)
    assert ((counts[:5] - uniform) ** 2 / uniform).sum() > 1000  # the test tells other weights apart


def test_the_second_is_drawn_by_what_is_left():
    weights = torch.tensor([0.5, 0.3, 0.2]).view(1, 1, 3)
    pairs = draw(weights.expand(20_000, 1, 3), torch.arange(20_000), 2).flatten(1)
    left_out = (~pairs).double().mean(0)
    expected = [
        0.3 * 0.2 / 0.7 + 0.2 * 0.3 / 0.8,
        0.5 * 0.2 / 0.5 + 0.2 * 0.5 / 0.8,
        0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7,
    ]
    np.testing.assert_allclose(left_out.numpy(), expected, atol=0.012)


@pytest.mark.parametrize("count", [0, 1, 12, 15])
def test_a_draw_has_its_size_and_belongs_to_the_sample(count):
    weights, seeds = torch.rand(8, 3, 5), torch.arange(8) - 4
    drawn = draw(weights, seeds, count)
    assert (drawn.flatten(1).sum(1) == count).all()
    alone = torch.cat([draw(weights[i : i + 1], seeds[i : i + 1], count) for i in range(8)])
    assert torch.equal(drawn, alone)


@pytest.mark.parametrize(("h", "w", "groups"), [(4, 4, 2), (5, 3, 2), (7, 7, 4), (3, 3, 5)])
def test_dealt_views_have_equal_sizes_and_one_unit_of_every_stratum(h, w, groups):
    weights, seeds = torch.rand(6, h, w), torch.arange(6)
    group = deal(weights, seeds, groups)
    for sample, weight in zip(group.flatten(1), weights.flatten(1), strict=True):
        assert tuple(sample.bincount(minlength=groups).tolist()) == group_sizes(h * w, groups)
        ranked = sample[weight.argsort(descending=True)]
        for stratum in ranked.split(groups):
            assert len(set(stratum.tolist())) == len(stratum)
    assert not torch.equal(group, deal(weights, seeds + 6, groups))
    assert torch.equal(group[2:3], deal(weights[2:3], seeds[2:3], groups))


def test_every_member_of_a_stratum_is_dealt_to_every_view_equally_often():
    weights = torch.arange(8.0).view(1, 2, 4).expand(8000, 2, 4)
    group = deal(weights, torch.arange(8000), 2).flatten(1)
    assert (group.double().mean(0) - 0.5).abs().max() < 0.025
    apart = [(group[:, i] != group[:, i + 1]).double().mean().item() for i in range(7)]
    assert apart[::2] == [1.0] * 4 and max(abs(a - 0.5) for a in apart[1::2]) < 0.025


def test_balanced_views_get_as_much_attention_and_random_ones_do_not():
    torch.manual_seed(0)
    weights = torch.rand(200, 4, 4) ** 4
    spread = {}
    for name, group in (
        ("dealt", deal(weights, torch.arange(200), 2)),
        ("random", torch.rand(200, 4, 4) > 0.5),
    ):
        first = (weights * (group == 0)).sum((1, 2)) / weights.sum((1, 2))
        spread[name] = (first - 0.5).abs().mean().item()
    assert spread["dealt"] < 0.5 * spread["random"]


# attention and teachers ------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("test_vit", "auto"),
        ("test_vit", "class"),
        ("test_vit", "mean"),
        ("test_vit2", "auto"),
        ("ours", "auto"),
    ],
)
def test_attention_of_our_vit_and_of_timms_is_what_their_layers_compute(name, query, block):
    """timm's with a cls token to ask; one with a register, but none; ours, whose cls token nobody asks."""
    torch.manual_seed(0)
    ours = name == "ours"
    network: Any = (build_encoder(ENCODERS["vit"]) if ours else timm.create_model(name, num_classes=0)).eval()
    images = torch.randn(2, 3, 160, 160)
    features, attention = attend(network, images, block=block, query=query)
    got: list[torch.Tensor] = []
    layer = network.blocks[-block].attn
    hook = layer.register_forward_pre_hook(lambda _, x: got.append(x[0]))
    tokens = network.forward_features(images)
    hook.remove()
    expected = tokens if ours else tokens[:, 1:].unflatten(1, features.shape[1:3])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    q, k, _ = layer.qkv(got[0]).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = layer.q_norm(q), layer.k_norm(k)
    weights = (q @ k.transpose(-1, -2) * layer.head_dim**-0.5).softmax(-1)
    asks_cls = name == "test_vit" and query != "mean"
    rows = weights[:, :, :1] if asks_cls else weights[:, :, 1:]
    expected = rows[..., 1:].mean((1, 2))
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(attention.flatten(1), expected)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_attention_of_our_encoders_adds_up_to_1_and_leaves_no_trace(encoder):
    model = build_encoder(ENCODERS[encoder]).eval()
    images = pictures(2, 40)
    before = model.forward_features(images)
    features, attention = attend(model, images)
    assert attention.shape == (2, 5, 5)
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(2))
    torch.testing.assert_close(features, before, rtol=1e-4, atol=1e-5)  # taken apart, not fused
    assert torch.equal(model.forward_features(images), before)
    hooks = [module for module in model.modules() if module._forward_pre_hooks]
    assert not hooks


def test_dyvits_attention_is_plain_attention_with_rotary_positions():
    torch.manual_seed(0)
    model: Any = build_encoder(ENCODERS["dyvit"]).eval()
    layer = model.stages[-1].blocks[-1].attn
    taken: list[torch.Tensor] = []
    real = nn.functional.scaled_dot_product_attention

    def watch(q, k, v, **rest):
        taken.append((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1))
        return real(q, k, v, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", watch)
        _, attention = attend(model, pictures(2))
    assert taken[-1].shape == (2, layer.heads, 16, 16)
    torch.testing.assert_close(attention.flatten(1), taken[-1].mean((1, 2)), rtol=1e-4, atol=1e-6)


def test_a_dyvit_that_sees_no_whole_map_cannot_tell_where_it_looks():
    model = build_encoder(replace(ENCODERS["dyvit"], windows=((4, 8), (2, 4), (2, 4), (2,))))
    with pytest.raises(BadInput, match="does not see the whole map"):
        attend(model, pictures(1))


def test_maps_are_brought_to_the_grid_of_units():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    assert on_grid(maps, 4, 4) is maps
    assert on_grid(maps, 2, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert on_grid(maps, 8, 8).shape == (1, 1, 8, 8)
    given = torch.randn(2, 6, 6, 8)
    features, attention = to_units(given, torch.rand(2, 6, 6), 3, 3)
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(2))
    torch.testing.assert_close(features[:, 1, 2], given[:, 2:4, 4:6].mean((1, 2)))


def test_a_teacher_gets_images_of_its_size_and_statistics(weights):
    config = TeacherConfig("timm:test_vit", weights)
    taught = load_teacher(config, STATISTICS)
    got: list[torch.Tensor] = []
    network: Any = taught.model
    network.patch_embed.register_forward_pre_hook(lambda _, x: got.append(x[0]))
    pixels = torch.rand(2, 3, 160, 160)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
    taught((pixels - mean) / std, 5, 5)
    known = network.pretrained_cfg
    mean, std = (torch.tensor(known[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(got[0], (pixels - mean) / std, rtol=1e-4, atol=1e-5)
    features, attention = taught(torch.randn(2, 3, 64, 64), 4, 4)
    assert got[1].shape == (2, 3, 160, 160)
    assert features.shape == (2, 4, 4, taught.features) and attention.shape == (2, 4, 4)


def test_teachers_are_loaded_strictly_from_local_files(weights, tmp_path, monkeypatch):
    fill = PretrainConfig(objective=CMTConfig(teacher=TeacherConfig("test_vit", weights)))
    found = with_weights_hash(fill).objective
    assert isinstance(found, CMTConfig) and found.teacher.sha256 is not None
    network = timm.create_model("test_vit")
    taught = load_teacher(found.teacher, STATISTICS)
    assert not any(p.requires_grad for p in taught.model.parameters()) and not taught.model.training
    tensors = dict(network.state_dict())
    other, short, long = (tmp_path / f"{name}.safetensors" for name in ("other", "short", "long"))
    save_file(tensors, other)
    with pytest.raises(BadInput, match="not the weights of teacher test_vit"):
        load_teacher(replace(found.teacher, weights=other), STATISTICS)
    save_file({name: t for name, t in tensors.items() if name != "norm.weight"}, short)
    with pytest.raises(BadArtifact, match=r"1 missing: norm\.weight"):
        load_teacher(TeacherConfig("test_vit", short), STATISTICS)
    save_file(tensors | {"extra": torch.zeros(1)}, long)
    with pytest.raises(BadArtifact, match="1 unexpected: extra"):
        load_teacher(TeacherConfig("test_vit", long), STATISTICS)
    pickle = tmp_path / "weights.pt"
    torch.save(tensors, pickle)
    with pytest.raises(BadInput, match=r"existing \.safetensors file"):
        load_teacher(TeacherConfig("test_vit", pickle), STATISTICS)
    pickle.rename(tmp_path / "pickle.safetensors")
    with pytest.raises(BadInput, match=r"not a readable \.safetensors"):
        load_teacher(TeacherConfig("test_vit", tmp_path / "pickle.safetensors"), STATISTICS)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(weights))
    assert load_teacher(TeacherConfig("test_vit"), STATISTICS).features == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TeacherConfig("vit_bas_patch16_224"), "no model of timm's, and no artifact; did you mean vit_base"),
        (TeacherConfig("resnet18"), "no plain vision transformer"),
        (TeacherConfig("swin_tiny_patch4_window7_224"), "no plain vision transformer"),
        (TeacherConfig("naflexvit_base_patch16_gap"), "its patches lie on no fixed grid; take one such as"),
        (TeacherConfig("qwen3_vit_88m_enc"), r"its attention cannot be read \(RuntimeError: unflatten"),
        (TeacherConfig("somewhere/artifact"), "if the artifact was moved, give its directory"),
        (TeacherConfig("test_vit.nonsense"), "nonsense"),
        (TeacherConfig("clip.safetensors"), "does not say of which network"),
        (TeacherConfig("tests"), "no model.safetensors"),
        (TeacherConfig("test_vit2", query="class"), "no class token that was trained"),
        (TeacherConfig("test_vit", block=7), "block 7 from the end: it has 6 blocks"),
    ],
)
def test_teachers_that_cannot_teach_are_refused(config, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(BadInput, match=message):
        load_teacher(config, STATISTICS)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"patch_embed.proj.weight": torch.zeros(5)}, r"not weights of test_vit \(RuntimeError"),
        ({"pos_embed": torch.zeros(5)}, r"not weights of test_vit \(IndexError"),
        ({"model": torch.zeros(5)}, r"not weights of test_vit \(AttributeError"),
        ({"state_dict": torch.zeros(5)}, r"not weights of test_vit \(RuntimeError"),
        ({}, "78 missing"),
    ],
)
def test_files_that_timm_stumbles_over_are_refused(held, message, tmp_path):
    save_file(held, tmp_path / "odd.safetensors")
    with pytest.raises(BadInput, match=rf"odd\.safetensors: .*{message}"):
        load_teacher(TeacherConfig("test_vit", tmp_path / "odd.safetensors"), STATISTICS)


def test_weights_of_another_size_are_not_interpolated(weights, tmp_path):
    """As they come from OpenCLIP: timm renames them, and would bring them to the network's size."""
    held = {f"visual.trunk.{name}": tensor for name, tensor in load_file(weights).items()}
    path = tmp_path / "open.safetensors"
    save_file(held, path)
    load_teacher(TeacherConfig("test_vit", path), STATISTICS)
    for name, shape in (("patch_embed.proj.weight", (64, 3, 32, 32)), ("pos_embed", (1, 26, 64))):
        save_file(held | {f"visual.trunk.{name}": torch.zeros(shape)}, path)
        with pytest.raises(BadInput, match=f"of other sizes: timm would interpolate {name}"):
            load_teacher(TeacherConfig("test_vit", path), STATISTICS)


def test_missing_weights_are_asked_for(weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(
        BadInput, match=r"create_model\('test_vit', pretrained=True\).*--teacher-weights FILE"
    ):
        load_teacher(TeacherConfig("test_vit"), STATISTICS)
    with pytest.raises(BadInput, match="takes images of 3 channels, these have 1"):
        load_teacher(TeacherConfig("test_vit", weights), ((0.5,), (0.5,)))
    assert check_readable(nn.Linear(1, 1), 3, 32, 32)


def test_it_is_said_that_published_numbers_are_clips():
    assert "says nothing about this run" in caveats(CMTConfig(teacher=TeacherConfig("test_vit")))[0]
    assert "another GELU" in caveats(CMTConfig(teacher=TeacherConfig(PUBLISHED[1])))[0]
    assert caveats(CMTConfig()) == () and CMTConfig().teacher.name == PUBLISHED[0]
    given = TeacherConfig(PUBLISHED[0], Path("elsewhere/clip.safetensors"), "c0ffee")
    (note,) = caveats(CMTConfig(teacher=given))  # a file is what its giver says it is
    assert "clip.safetensors (SHA-256 c0ffee) are OpenAI's is taken from you" in note
    assert "elsewhere" not in note  # an artifact tells no places
    assert all(timm.is_model(name) for name in PUBLISHED)
