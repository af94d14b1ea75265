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


def rates(model, rate=0.5):
    """Learning rate and weight decay of every parameter by name, as the constructor sets them."""
    from mmengine.optim import build_optim_wrapper

    settings = {
        "type": "OptimWrapper",
        "constructor": "LayerDecayConstructor",
        "paramwise_cfg": {"decay_rate": rate},
        "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1},
    }
    groups = build_optim_wrapper(model, settings).optimizer.param_groups
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


@pytest.mark.parametrize("settings", [{}, {"decay_rate": 0.0}, {"decay_rate": 0.5, "custom_keys": {}}])
def test_layer_decay_refuses_other_settings(models, settings):
    from mmengine.optim import build_optim_wrapper

    model = Model(models.build({"type": "PlainViT", "encoder": to_plain(VIT, EncoderConfig)}))
    optimizer = {"type": "AdamW", "lr": 1.0}
    with pytest.raises(BadInput, match="decay_rate"):
        build_optim_wrapper(
            model,
            {"constructor": "LayerDecayConstructor", "paramwise_cfg": settings, "optimizer": optimizer},
        )


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
