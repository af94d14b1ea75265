"""CMT-MAE and balanced CoMA: teachers, attention, guided masks, targets, moving average, runs.

The curves in `tests/golden/loss_curves_cmt.json` are renewed by `python tests/test_pretrain_cmt.py`.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from short_runs import MODEL, assert_same, at, interrupted, learned
from torch import nn

from pretrain import cli, load_pretrained
from pretrain.config import (
    BalancedCoMAConfig,
    CMTConfig,
    DataConfig,
    DecoderConfig,
    DyViTConfig,
    PretrainConfig,
    TeacherConfig,
    ViTConfig,
    method_preset,
)
from pretrain.errors import BadArtifact, BadInput
from pretrain.masking.guided import deal, draw
from pretrain.masking.partition import group_sizes
from pretrain.models import build_encoder
from pretrain.models.attending import attend, check_readable, on_grid
from pretrain.models.teacher import Teacher, to_units
from pretrain.objectives import CMT, BalancedCoMA, build_objective
from pretrain.plain import from_plain, to_plain
from pretrain.teaching import PUBLISHED, identified, load_teacher, remarks, training_objective
from pretrain.training import pretrain
from pretrain.training.learner import Learner
from pretrain.training.state import read_state

DECODER = DecoderConfig(dim=32, depth=1, heads=2)
ENCODERS = {
    "dyvit": DyViTConfig(
        patch=1, dim=16, depths=(1, 1, 1, 1), heads=(2, 2, 4, 4), windows=((4, 8), (2, 4), (2, 0), (0,))
    ),
    "vit": ViTConfig(patch=8, dim=32, depth=2, heads=2),
}
GOLDEN = Path(__file__).parent / "golden" / "loss_curves_cmt.json"
STATISTICS = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
METHODS = {"cmt": CMTConfig(decoder=DECODER), "coma-balanced": BalancedCoMAConfig(decoder=DECODER)}


def teacher() -> Any:
    torch.manual_seed(11)
    return Teacher(
        build_encoder(ViTConfig(patch=8, dim=24, depth=1, heads=2)), 24, (48, 48), STATISTICS, STATISTICS
    )


def objective(encoder="vit", method="cmt", **changes: Any) -> Any:
    torch.manual_seed(0)
    model = build_objective(replace(METHODS[method], **changes), build_encoder(ENCODERS[encoder]), teacher())
    return model.train()


def pictures(count=4, size=32):
    torch.manual_seed(3)
    ramp = torch.linspace(-1, 1, size)
    slopes = torch.randn(count, 3, 2, 1, 1)
    return slopes[:, :, 0] * ramp + slopes[:, :, 1] * ramp[:, None] + 0.05 * torch.randn(count, 3, size, size)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of weights of timm's smallest vision transformer, classifier included."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


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


def test_attention_of_our_vit_and_of_timms_is_what_their_layers_compute():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 160, 160)
    for name in ("test_vit", "test_vit2"):  # with a cls token; with a register, but none
        network: Any = timm.create_model(name, num_classes=0).eval()
        features, attention = attend(network, images)
        tokens = network.forward_features(images)
        torch.testing.assert_close(features.flatten(1, 2), tokens[:, 1:], rtol=1e-4, atol=1e-5)
        got: list[torch.Tensor] = []
        hook = network.blocks[-1].attn.register_forward_pre_hook(lambda _, x, got=got: got.append(x[0]))
        network.forward_features(images)
        hook.remove()
        layer = network.blocks[-1].attn
        q, k, _ = layer.qkv(got[0]).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = layer.q_norm(q), layer.k_norm(k)
        weights = (q @ k.transpose(-1, -2) * layer.head_dim**-0.5).softmax(-1)
        rows = weights[:, :, :1] if network.has_class_token else weights[:, :, 1:]
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
    features, attention = to_units(torch.randn(2, 6, 6, 8), torch.rand(2, 6, 6), 3, 3)
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(2))
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(-1, correction=0), torch.ones(2, 3, 3), atol=1e-3, rtol=0)


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
    found = identified(fill).objective
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
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(weights))
    assert load_teacher(TeacherConfig("test_vit"), STATISTICS).features == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TeacherConfig("vit_bas_patch16_224"), "no model of timm's, and no artifact; did you mean vit_base"),
        (TeacherConfig("resnet18"), "no plain vision transformer"),
        (TeacherConfig("swin_tiny_patch4_window7_224"), "no plain vision transformer"),
        (TeacherConfig("test_vit.nonsense"), "nonsense"),
        (TeacherConfig("clip.safetensors"), "does not say of which network"),
        (TeacherConfig("tests"), "no model.safetensors"),
    ],
)
def test_teachers_that_cannot_teach_are_refused(config, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(BadInput, match=message):
        load_teacher(config, STATISTICS)


def test_missing_weights_are_asked_for(weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(
        BadInput, match=r"create_model\('test_vit', pretrained=True\).*--teacher-weights FILE"
    ):
        load_teacher(TeacherConfig("test_vit"), STATISTICS)
    with pytest.raises(BadInput, match="takes images of 3 channels, these have 1"):
        load_teacher(TeacherConfig("test_vit", weights), ((0.5,), (0.5,)))
    assert check_readable(nn.Linear(1, 1))


def test_it_is_said_that_published_numbers_are_clips():
    assert "says nothing about this run" in remarks(CMTConfig(teacher=TeacherConfig("test_vit")))[0]
    assert "another GELU" in remarks(CMTConfig(teacher=TeacherConfig(PUBLISHED[1])))[0]
    assert remarks(CMTConfig()) == () and CMTConfig().teacher.name == PUBLISHED[0]
    assert all(timm.is_model(name) for name in PUBLISHED)


# the objectives --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
def test_shapes_gradients_and_where_the_loss_lies(encoder):
    model = objective(encoder)
    assert isinstance(model, CMT)
    out = model(pictures(), torch.arange(4))
    width = 24 + model.encoder.num_features
    assert out.prediction.shape == (1, 4, 4, 4, width) and out.target.shape == (4, 4, 4, width)
    assert (out.visible.flatten(2).sum(-1) == 4).all()
    (gradient,) = torch.autograd.grad(out.loss, out.prediction, retain_graph=True)
    assert gradient[out.visible].abs().max() == 0
    assert (gradient[~out.visible] != 0).float().mean() > 0.99
    out.loss.backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith("average.") for name in learning)
    assert all(p.grad is None for p in (model._teacher or teacher()).model.parameters())
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {"encoder", "decoder", "average", "to_teacher", "to_student"}


def test_pixels_are_learned_beside_without_telling_the_rest():
    grads = []
    for factor in (1.0, 100.0):
        model = objective()
        with torch.no_grad():
            model.decoder.head.weight.mul_(factor)
        out = model(pictures(), torch.arange(4))
        out.loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        expected = 0.5 * out.metrics["loss_teacher"] + 0.5 * out.metrics["loss_student"]
        torch.testing.assert_close(out.loss, expected)
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]) == (not name.startswith("decoder.head")), name


@pytest.mark.parametrize(("distance", "share"), [("cosine", 0.3), ("smooth-l1", 1.0)])
def test_the_loss_computed_by_hand(distance, share):
    model = objective(distance=distance, target_share=share)
    out = model(pictures(), torch.arange(4))
    guess, target, hidden = out.prediction[0].detach().numpy(), out.target.numpy(), ~out.visible[0].numpy()
    losses = []
    for part in (slice(0, 24), slice(24, None)):
        a, b = guess[hidden][:, part].astype(np.float64), target[hidden][:, part].astype(np.float64)
        if distance == "cosine":
            losses.append(np.mean(1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))
        else:
            d = np.abs(a - b)
            losses.append(np.where(d < 1, d * d / 2, d - 0.5).mean())
    assert out.loss.item() == pytest.approx(share * losses[0] + (1 - share) * losses[1], rel=1e-4)


def test_targets_and_attention_are_those_of_teacher_and_average():
    model = objective(mask_share=0.25)
    images = pictures()
    (taught, learnt), attention = model.ask(images)
    expected, looked = teacher()(images, 4, 4)
    torch.testing.assert_close(taught, expected)
    features, own = to_units(*attend(model.average, images), 4, 4)
    torch.testing.assert_close(learnt, features)
    torch.testing.assert_close(attention, 0.25 * looked + 0.75 * own)
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(4))


@pytest.mark.parametrize("hide", ["attended", "ignored"])
def test_polarity(hide):
    model = objective(hide=hide)
    peak = torch.full((500, 4, 4), 0.001)
    peak[:, 1, 2] = 1
    hidden = ~model.guided_visible(peak, torch.arange(500))[0]
    assert (hidden.flatten(1).sum(1) == 12).all()
    assert (
        hidden[:, 1, 2].float().mean() > 0.99 if hide == "attended" else hidden[:, 1, 2].float().mean() < 0.01
    )


def test_masks_are_random_at_first_and_guided_then():
    model = objective(random_share=0.5)
    images, seeds = pictures(), torch.arange(4)
    model.before_step(0.49)
    assert torch.equal(model(images, seeds).visible, model.draw_visible(seeds, 4, 4))
    model.before_step(0.5)
    guided = model.guided_visible(model.ask(images)[1], seeds)
    assert torch.equal(model(images, seeds).visible, guided)
    assert not torch.equal(guided, model.draw_visible(seeds, 4, 4))


def test_the_average_follows_the_formula_and_the_teacher_does_not_move():
    model = objective(ema=0.9)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    frozen = {name: t.clone() for name, t in model._teacher.model.state_dict().items()}
    average = {name: t.clone() for name, t in model.encoder.state_dict().items()}
    for step in range(4):
        model.before_step(step / 4)
        model(pictures(), torch.arange(4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step / 4)
        m = 1 - (1 - 0.9) * (math.cos(math.pi * step / 4) + 1) / 2
        average = {n: m * average[n] + (1 - m) * t for n, t in model.encoder.state_dict().items()}
    for name, tensor in model.average.state_dict().items():
        torch.testing.assert_close(tensor, average[name])
        assert not torch.equal(tensor, model.encoder.state_dict()[name])
    assert all(torch.equal(t, frozen[name]) for name, t in model._teacher.model.state_dict().items())
    last = {name: t.clone() for name, t in model.average.state_dict().items()}
    model.after_step(1.0)  # m = 1
    assert all(torch.equal(t, last[name]) for name, t in model.average.state_dict().items())


def test_the_average_is_asked_without_drop_path():
    torch.manual_seed(0)
    encoder = build_encoder(replace(ENCODERS["vit"], drop_path=0.5))
    model: Any = build_objective(METHODS["cmt"], encoder, teacher()).train()
    assert model.encoder.training and not model.average.training
    one, other = model.ask(pictures())[0][1], model.ask(pictures())[0][1]
    assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_loss_does_not_depend_on_how_a_batch_is_split(encoder, method):
    model = objective(encoder, method)
    images, seeds = pictures(), torch.arange(4)
    with torch.no_grad():
        whole = model(images, seeds).loss
        halves = [model(images[part], seeds[part]).loss for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_balanced_coma_is_coma_with_other_views(encoder):
    model = objective(encoder, "coma-balanced")
    assert isinstance(model, BalancedCoMA)
    out = model(pictures(), torch.arange(4))
    assert (out.visible.sum(0) == 1).all() and (out.visible.flatten(2).sum(-1) == 8).all()
    _, attention = teacher()(pictures(), 4, 4)
    assert torch.equal(out.visible[1].long(), deal(attention, torch.arange(4), 2))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_without_its_teacher_it_reconstructs_but_does_not_learn(method):
    model = build_objective(METHODS[method], build_encoder(ENCODERS["vit"])).eval()
    assert all(name.startswith(("encoder.", "decoder.")) for name in model.state_dict())
    visible = model.draw_visible(torch.arange(2), 4, 4)[0]
    assert model.reconstruct(pictures(2), visible).shape == (2, 3, 32, 32)
    with pytest.raises(RuntimeError, match="does not learn"):
        model(pictures(), torch.arange(4))


def test_settings():
    config = PretrainConfig(objective=method_preset("cmt"))
    assert from_plain(to_plain(config), PretrainConfig, source="x") == config
    balanced = PretrainConfig(objective=method_preset("coma-balanced"))
    assert to_plain(balanced)["objective"]["method"] == "coma-balanced"
    assert from_plain(to_plain(balanced), PretrainConfig, source="x") == balanced
    with pytest.raises(BadInput, match="hidden ratio"):
        CMTConfig(hidden_ratio=1)
    with pytest.raises(BadInput, match=r"mask share 1\.5 must be 0 to 1"):
        CMTConfig(mask_share=1.5)
    with pytest.raises(BadInput, match="cannot be balanced"):
        BalancedCoMAConfig(masks="single")
    with pytest.raises(BadInput, match="leaves none to see"):
        objective(hidden_ratio=0.99)(pictures(), torch.arange(4))


# runs ------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Without pictures."""
    for name in ("reconstruction_sheet", "loss_curve"):
        monkeypatch.setattr(f"pretrain.training.keeping.{name}", lambda *_, **__: None)


@pytest.fixture
def guided(resumable, weights):
    method = CMTConfig(
        teacher=TeacherConfig("test_vit", weights), random_share=0.3, ema=0.9, decoder=DecoderConfig(8, 1, 2)
    )
    return replace(resumable, objective=method)


@pytest.mark.usefixtures("quick")
def test_interrupted_and_resumed_is_uninterrupted(guided, tmp_path):
    whole, run = pretrain(at(guided, tmp_path / "whole")), tmp_path / "run"
    interrupted(at(guided, run), 4)
    torch.rand(3)
    pretrain(at(guided, run), resume=True)
    assert_same(run, whole)
    state = read_state(run / "state", warn=pytest.fail)
    assert state is not None
    assert any(name.startswith("average.") for name in state["model"])
    names = learned(run)[1]
    assert names and all(name.startswith(("encoder.", "decoder.")) for name in names)


@pytest.mark.usefixtures("quick")
def test_a_forgotten_average_would_be_noticed(guided, tmp_path, monkeypatch):
    whole, run = pretrain(at(guided, tmp_path / "whole")), tmp_path / "run"
    interrupted(at(guided, run), 4)
    load = Learner.load_state_dict

    def forget(self, state):
        load(self, state)
        self.objective.average.load_state_dict(self.objective.encoder.state_dict())

    monkeypatch.setattr(Learner, "load_state_dict", forget)
    pretrain(at(guided, run), resume=True)
    with pytest.raises(AssertionError):
        assert_same(run, whole)


@pytest.mark.usefixtures("quick")
def test_another_teacher_is_refused_when_a_run_goes_on(guided, tmp_path, weights):
    run, moved, other = tmp_path / "run", tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    interrupted(at(guided, run), 2)
    save_file(timm.create_model("test_vit").state_dict(), other)
    moved.write_bytes(weights.read_bytes())

    def taught_by(path):
        method = replace(guided.objective, teacher=replace(guided.objective.teacher, weights=path))
        return at(replace(guided, objective=method), run)

    with pytest.raises(BadInput, match="not the weights of teacher test_vit that the run was started with"):
        pretrain(taught_by(other), resume=True)
    pretrain(taught_by(moved), resume=True)


@pytest.mark.parametrize("method", ["cmt", "coma-balanced"])
def test_a_run_from_the_command_line(method, photos, weights, tmp_path, capsys):
    small = ["--model", "tiny", "--image-size", "16", "--steps", "2", "--batch-size", "2", "--workers", "0"]
    common = ["pretrain", str(photos), "--device", "cpu", *small, "--objective.decoder.depth", "1"]
    teach = ["--method", method, "--teacher", "test_vit", "--teacher-weights", str(weights)]
    out = tmp_path / "run"
    assert cli.main([*common, *teach, "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert ("not CLIP ViT-B/16" in said) == (method == "cmt")
    assert next((out / "reconstructions").glob("*.png")).stat().st_size > 5000
    model, about = load_pretrained(out / "artifact")
    assert ("remarks" in about.trained) == (method == "cmt")
    assert about.trained["method"] == method
    assert model.reconstruct(pictures(2), model.draw_visible(torch.arange(2), 4, 4)[0]).isfinite().all()
    plain = json.loads((out / "config.json").read_text())
    assert len(plain["objective"]["teacher"]["sha256"]) == 64
    again = ["--method", method, "--teacher", str(out / "artifact"), "--out", str(tmp_path / "second")]
    assert cli.main([*common, *again]) == 0
    assert (
        cli.main(["pretrain", "--resume", str(out), "--steps", "3", "--teacher-weights", str(weights)]) == 0
    )


def test_what_the_command_line_refuses(photos, weights, tmp_path, capsys):
    common = [
        "pretrain",
        str(photos),
        "--out",
        str(tmp_path / "run"),
        "--model",
        "tiny",
        "--image-size",
        "16",
    ]
    for argv, message in (
        (["--method", "mae", "--teacher", "test_vit"], "--teacher test_vit belongs to --method cmt"),
        (["--teacher-weights", str(weights)], "belongs to --method cmt and coma-balanced"),
        (["--method", "cmt", "--teacher", "test_vti"], "did you mean"),
        (["--method", "cmt", "--teacher", "test_vit", "--teacher-weights", "none.safetensors"], "existing"),
        (
            [
                "--method",
                "cmt",
                "--teacher",
                "test_vit",
                "--teacher-weights",
                str(weights),
                "--channels",
                "1",
            ],
            "takes images of 3 channels",
        ),
    ):
        assert cli.main([*common, *argv]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_dyvit_taught_by_an_artifact_of_another_size(settings, tmp_path):
    folder = pretrain(at(replace(settings, model=MODEL), tmp_path / "first"))
    method = CMTConfig(teacher=TeacherConfig(str(folder / "artifact")), decoder=DecoderConfig(8, 1, 2))
    data = DataConfig(images=settings.data.images, image_size=24, workers=0)
    config = replace(settings, model=ENCODERS["vit"], objective=method, data=data)
    filled = replace(config, data=replace(data, mean=STATISTICS[0], std=STATISTICS[1]))
    model = training_objective(filled)
    out = model(pictures(2, 24), torch.arange(2))
    assert out.target.shape == (2, 3, 3, 64 + 32)
    with pytest.raises(BadInput, match="did you mean"):
        load_teacher(TeacherConfig(str(folder)), STATISTICS)


def loss_curve(encoder, method, steps=20):
    model = objective(encoder, method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    images, curve = pictures(8), []
    for step in range(steps):
        model.before_step(step / steps)
        loss = model(images, torch.arange(8) + 8 * step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(step / steps)
        curve.append(loss.item())
    return curve


CURVES = [("dyvit", "cmt"), ("vit", "cmt"), ("vit", "coma-balanced")]


@pytest.mark.parametrize(("encoder", "method"), CURVES)
def test_golden_loss_curve(encoder, method):
    curve = loss_curve(encoder, method)
    assert curve == pytest.approx(json.loads(GOLDEN.read_text())[f"{encoder} {method}"], rel=0.01)
    assert curve[-1] < 0.9 * curve[0]


if __name__ == "__main__":
    curves = {f"{e} {m}": [round(x, 5) for x in loss_curve(e, m)] for e, m in CURVES}
    GOLDEN.write_text(json.dumps(curves, indent=0) + "\n")
