"""Backbones, neck and learning rates as mmengine builds them, and checkpoints that load safely."""

import logging
import pickle
from dataclasses import replace

import pytest
import torch
from downstream_data import DYVIT, VIT, artifact

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # mmengine's and mmcv's own
]

from coma.artifact import load_artifact, load_encoder, save_artifact  # noqa: E402
from coma.config import EncoderConfig  # noqa: E402
from coma.config.serialization import to_plain  # noqa: E402
from coma.errors import BadArtifact, BadInput  # noqa: E402


@pytest.fixture(scope="module")
def models():
    """mmengine's registry, with our modules in it."""
    from mmengine.registry import MODELS

    import downstream.openmmlab  # noqa: F401

    return MODELS


def test_a_pyramid_of_any_image_with_the_weights_of_the_artifact(models, tmp_path, caplog):
    path = artifact(tmp_path / "a")
    with caplog.at_level(logging.INFO, "downstream.openmmlab.backbones"):
        backbone = models.build({"type": "DyViT", "artifact": str(path), "out_norms": False}).eval()
    encoder = load_encoder(path)
    images = torch.randn(2, 3, 70, 101)
    with torch.no_grad():
        maps, expected = backbone(images), encoder(images)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 18, 26), (2, 16, 9, 13), (2, 32, 5, 7), (2, 64, 3, 4)]
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other)
    count = len(encoder.state_dict())
    assert f"all {count} tensors of its encoder loaded, 0 missing, 0 unexpected" in caplog.text


def test_stages_are_normalised_and_chosen(models):
    backbone = models.build(
        {"type": "DyViT", "encoder": to_plain(DYVIT, EncoderConfig), "out_indices": [1, 3]}
    )
    second, last = backbone.eval()(torch.randn(1, 3, 64, 64))
    assert second.shape[1] == 16 and last.shape[1] == 64
    torch.testing.assert_close(second.mean(dim=1), torch.zeros(1, 8, 8), atol=1e-5, rtol=0)


def test_other_channels(models, tmp_path):
    path = artifact(tmp_path / "a", replace(DYVIT, channels=5))
    assert models.build({"type": "DyViT", "artifact": str(path)})(torch.randn(1, 5, 64, 64))[0].shape[1] == 8


@pytest.mark.parametrize(("stages", "trained"), [(-1, 7), (0, 6), (2, 4), (4, 0)])
def test_frozen_stages_learn_nothing_and_drop_nothing(models, stages, trained):
    settings = {"encoder": to_plain(DYVIT, EncoderConfig), "frozen_stages": stages, "drop_path": 0.5}
    backbone = models.build({"type": "DyViT", "out_norms": False, **settings}).train()
    encoder = backbone.encoder
    parts = [encoder.stem, *encoder.stages, encoder.norm]
    learning = [all(p.requires_grad for p in part.parameters()) for part in parts]
    still = [not any(p.requires_grad for p in part.parameters()) for part in parts]
    first = len(parts) if stages == 4 else stages + 1
    assert still == [True] * first + [False] * (len(parts) - first) and learning == [not s for s in still]
    assert all(part.training == learns for part, learns in zip(parts, learning, strict=True))


def test_checkpointing_changes_nothing_but_memory(models):
    settings = {"type": "DyViT", "encoder": to_plain(DYVIT, EncoderConfig)}
    plain, thrifty = models.build(settings), models.build({**settings, "with_cp": True})
    thrifty.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 64)
    gradients = []
    for backbone in (plain, thrifty):
        torch.stack([m.square().mean() for m in backbone.train()(images)]).sum().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_global_blocks_keep_the_artifacts_weights(models, tmp_path):
    path = artifact(tmp_path / "a", replace(DYVIT, windows=((4,), (4,), (2, 2), (1,))))
    settings = {"type": "DyViT", "artifact": str(path), "out_norms": False}
    narrow, wide = models.build(settings).eval(), models.build({**settings, "global_blocks": 1}).eval()
    images = torch.randn(1, 3, 64, 96)
    assert {k: v.sum() for k, v in narrow.state_dict().items()} == {
        k: v.sum() for k, v in wide.state_dict().items()
    }
    assert torch.equal(narrow(images)[1], wide(images)[1])
    assert not torch.allclose(narrow(images)[2], wide(images)[2])


def test_an_artifact_with_a_tensor_missing_is_refused(models, tmp_path):
    path = artifact(tmp_path / "a")
    whole = load_artifact(path)
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name != "norm.weight"}
    save_artifact(tmp_path / "b", tensors=tensors, config=whole.config)
    with pytest.raises(BadArtifact, match=r"1 missing: norm.weight"):
        models.build({"type": "DyViT", "artifact": str(tmp_path / "b")})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of artifact, encoder"),
        ({"preset": "tiny", "encoder": {}}, "give one of artifact, encoder"),
        ({"preset": "tiny", "out_indices": [4]}, "must be some of 0, 1, 2, 3"),
        ({"preset": "tiny", "frozen_stages": 5}, "must be -1 to 4"),
        ({"preset": "tiny", "global_blocks": 9}, "stage 3 has 6 blocks"),
        ({"preset": "vit-tiny"}, r"use backbone=dict\(type='PlainViT'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(models, settings, message):
    with pytest.raises(BadInput, match=message):
        models.build({"type": "DyViT", **settings})


def test_a_plain_vit_and_a_simple_pyramid(models, tmp_path):
    path = artifact(tmp_path / "v", VIT)
    backbone = models.build({"type": "PlainViT", "artifact": str(path), "frozen_stages": 1})
    neck = models.build({"type": "SimpleFeaturePyramid", "in_channels": 16, "out_channels": 8, "num_outs": 5})
    maps = neck(backbone(torch.randn(1, 3, 64, 96)))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (8, 8, 12), (8, 4, 6), (8, 2, 3), (8, 1, 2)]
    coarse = models.build(
        {"type": "SimpleFeaturePyramid", "in_channels": 16, "num_outs": 5, "start_level": 1}
    )
    assert [m.shape[-1] for m in coarse(backbone(torch.randn(1, 3, 64, 96)))] == [12, 6, 3, 2, 1]
    assert not any(p.requires_grad for p in backbone.encoder.blocks[0].parameters())
    assert all(p.requires_grad for p in backbone.encoder.blocks[1].parameters())
    assert not backbone.encoder.cls_token.requires_grad
    with pytest.raises(BadArtifact, match=r"use backbone=dict\(type='PlainViT'"):
        models.build({"type": "DyViT", "artifact": str(path)})


@pytest.mark.parametrize("stages", [-3, 3, 99])
def test_a_plain_vit_freezes_what_there_is(models, stages):
    settings = {"type": "PlainViT", "encoder": to_plain(VIT, EncoderConfig)}
    with pytest.raises(BadInput, match="frozen_stages"):
        models.build({**settings, "frozen_stages": stages})
    whole = models.build({**settings, "frozen_stages": 2})
    assert not any(p.requires_grad for p in whole.parameters())


class Model(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = torch.nn.Linear(4, 2)


def rates(model, constructor="LayerDecayConstructor", optimizer=None, **settings):
    """Learning rate and weight decay of every parameter by name, as the constructor sets them."""
    from mmengine.optim import build_optim_wrapper

    config = {
        "type": "OptimWrapper",
        "constructor": constructor,
        "paramwise_cfg": settings or {"decay_rate": 0.5},
        "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1} if optimizer is None else optimizer,
    }
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    return found


def test_layers_of_dyvit_learn_at_their_own_rates(models):
    model = Model(models.build({"type": "DyViT", "encoder": to_plain(DYVIT, EncoderConfig)}))
    found = rates(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    expected = {  # stem 0, one block in stages 1, 2 and 4, two in stage 3: layers 1 to 5; heads are layer 6
        "backbone.encoder.stem.conv.weight": (0.5**6, 0.1),
        "backbone.encoder.stem.norm.weight": (0.5**6, 0.0),
        "backbone.encoder.stages.0.blocks.0.attn.qkv.weight": (0.5**5, 0.1),
        "backbone.encoder.stages.1.merge.linear.weight": (0.5**4, 0.1),
        "backbone.encoder.stages.2.blocks.0.mlp.fc1.bias": (0.5**3, 0.0),
        "backbone.encoder.stages.2.blocks.1.mlp.fc1.weight": (0.5**2, 0.1),
        "backbone.encoder.stages.3.blocks.0.norm1.bias": (0.5, 0.0),
        "backbone.encoder.norm.weight": (0.5, 0.0),
        "backbone.norms.0.weight": (1.0, 0.0),
        "head.weight": (1.0, 0.1),
        "head.bias": (1.0, 0.0),
    }
    assert {name: found[name] for name in expected} == expected


def test_layers_of_a_vit_and_frozen_ones(models):
    settings = {"type": "PlainViT", "encoder": to_plain(VIT, EncoderConfig), "frozen_stages": 0}
    found = rates(Model(models.build(settings)))
    assert "backbone.encoder.stem.weight" not in found and "backbone.encoder.cls_token" not in found
    assert found["backbone.encoder.blocks.0.attn.qkv.weight"] == (0.25, 0.1)
    assert found["backbone.encoder.blocks.1.attn.qkv.weight"] == (0.5, 0.1)
    assert found["head.weight"] == (1.0, 0.1)


class Convolutions(Model):
    """A model with every kind of parameter that mmengine has a rule for."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.neck = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.BatchNorm2d(4))
        self.scale = torch.nn.Parameter(torch.ones(1))


MMENGINE_RULES = [
    {"norm_decay_mult": 0.0, "bias_decay_mult": 0.5},
    {"norm_decay_mult": 2.0, "flat_decay_mult": 0.75, "bias_lr_mult": 3.0},
    {"dwconv_decay_mult": 0.0, "flat_decay_mult": 0.25, "dcn_offset_lr_mult": 0.1},
    {"custom_keys": {"neck": {"lr_mult": 2.0}, "neck.0": {"decay_mult": 0.0}, "norm": {"lr": 7.0},
                     "cls_token": {"decay_mult": 0.5}}, "flat_decay_mult": 0.0, "bias_lr_mult": 2.0},
    {"custom_keys": {"backbone": {"lr_mult": 0.1, "decay_mult": 0.0}, "head": {}}, "flat_decay_mult": 0.0},
    {"bypass_duplicate": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", MMENGINE_RULES)
@pytest.mark.parametrize("kind", ["DyViT", "PlainViT"])
def test_without_decay_the_rules_are_those_of_mmengine(kind, settings, models):
    encoder = {"DyViT": DYVIT, "PlainViT": VIT}[kind]
    model = Convolutions(models.build({"type": kind, "encoder": to_plain(encoder, EncoderConfig)}))
    theirs = rates(model, "DefaultOptimWrapperConstructor", **settings)
    ours = rates(model, decay_rate=1.0, **settings)
    free = {f"backbone.encoder.{name}" for name in model.backbone.encoder.no_weight_decay()}
    free |= {name for name, p in model.named_parameters() if p.ndim < 2}
    if "custom_keys" not in settings:  # what no rule of mmengine's changes: ours has two of its own
        theirs |= {name: (lr, 0.0) for name, (lr, decay) in theirs.items() if name in free and decay == 0.1}
    assert ours == theirs and len(set(ours.values())) > 1


def test_the_decay_multiplies_the_rates_of_other_rules_but_not_rates_of_their_own(models, caplog):
    model = Model(models.build({"type": "PlainViT", "encoder": to_plain(VIT, EncoderConfig)}))
    keys = {"blocks.0": {"lr_mult": 2.0}, "blocks.1": {"lr": 7.0}, "head": {"lr_mult": 3.0}, "gamma": {}}
    found = rates(model, decay_rate=0.5, custom_keys=keys, bias_lr_mult=10.0)
    assert found["backbone.encoder.blocks.0.attn.qkv.weight"] == (0.25 * 2, 0.1)
    assert found["backbone.encoder.blocks.1.attn.qkv.weight"] == (7.0, 0.1)
    assert found["backbone.encoder.stem.bias"] == (0.125 * 10, 0.0)
    assert found["head.weight"] == (3.0, 0.1)
    assert "custom_keys: gamma: no parameter has this in its name" in caplog.text


def test_without_weight_decay_of_its_own_the_optimizer_keeps_its_default(models):
    model = Model(models.build({"type": "PlainViT", "encoder": to_plain(VIT, EncoderConfig)}))
    found = rates(model, optimizer={"type": "AdamW", "lr": 1.0})
    assert found["head.weight"] == (1.0, 0.01) and found["head.bias"] == (1.0, 0.0)


def test_shared_parameters_are_optimized_once(models):
    model = Model(models.build({"type": "PlainViT", "encoder": to_plain(VIT, EncoderConfig)}))
    model.twin = torch.nn.Sequential(model.head)
    assert "head.weight" in rates(model)
    with pytest.warns(UserWarning, match="duplicate parameters"), pytest.raises(AssertionError):
        rates(model, decay_rate=0.5, bypass_duplicate=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"custom_keys": {}}, "decay_rate must be above 0 and up to 1"),
        ({"decay_rate": 0.0}, "decay_rate must be above 0"),
        ({"decay_rate": "0.5"}, "decay_rate must be above 0"),
        ({"decay_rate": float("nan")}, "decay_rate must be above 0"),
        ({"decay_rate": 0.5, "num_layers": 12}, "has no num_layers; it may hold decay_rate, custom_keys"),
        ({"decay_rate": 0.5, "custom_keys": []}, "custom_keys must be a dict"),
        ({"decay_rate": 0.5, "custom_keys": {"neck": 0.1}}, "LayerDecayConstructor: "),
        ({"decay_rate": 0.5, "norm_decay_mult": -1.0}, "norm_decay_mult must be a number from 0 on"),
        ({"decay_rate": 0.5, "custom_keys": {"neck": {"lr_mult": "x"}}}, "neck.lr_mult must be a number"),
    ],
)
def test_layer_decay_refuses_settings_that_mean_nothing(settings, message, models):
    model = Model(models.build({"type": "PlainViT", "encoder": to_plain(VIT, EncoderConfig)}))
    with pytest.raises(BadInput, match=message):
        rates(model, **settings)


def test_rules_of_weight_decay_need_one(models):
    model = Model(models.build({"type": "PlainViT", "encoder": to_plain(VIT, EncoderConfig)}))
    with pytest.raises(BadInput, match="base_wd should not be None"):
        rates(model, optimizer={"type": "AdamW", "lr": 1.0}, decay_rate=0.5, norm_decay_mult=0.0)


def test_layer_decay_needs_one_of_our_backbones(models):
    with pytest.raises(BadInput, match="not Linear"):
        rates(Model(torch.nn.Linear(1, 1)))


def test_checkpoints_unpickle_histories_and_nothing_else(models, tmp_path):
    import numpy as np
    from mmengine.logging import HistoryBuffer

    torch.save(
        {"h": HistoryBuffer([1.0, np.float32(2.0)], [1, 1]), "n": np.float64(3)}, tmp_path / "good.pth"
    )
    assert torch.load(tmp_path / "good.pth")["h"].mean() == 1.5
    for name, trap in (("register_statistics", Reach()), ("eval", Evaluate())):
        torch.save({"trap": trap}, tmp_path / f"{name}.pth")
        with pytest.raises(pickle.UnpicklingError, match=name):
            torch.load(tmp_path / f"{name}.pth")


class Reach:
    def __reduce__(self):
        from mmengine.logging import HistoryBuffer

        return getattr, (HistoryBuffer, "register_statistics")


class Evaluate:
    def __reduce__(self):
        return eval, ("1",)
