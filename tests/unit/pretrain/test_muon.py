"""Muon for hidden matrices: which those are, its step by hand, states, and fine-tuning."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from short_runs import MODEL, OBJECTIVE, rows
from torch import nn

from coma.config import DataConfig, FinetuneRecipe, OptimizerConfig, PretrainConfig, RunConfig, encoder_preset
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.models.classifiers import build_classifier
from coma.objectives import build_objective
from coma.objectives.classification import Classification
from pretrain.training import pretrain
from pretrain.training.checkpoint import read_state, write_state
from pretrain.training.muon import MuonWithAdamW, orthogonalised
from pretrain.training.optimizer import build_optimizer, hidden_matrices

MUON = OptimizerConfig(optimizer="muon", batch_size=4)


def with_gradients(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return module


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return with_gradients(build_objective(OBJECTIVE, build_encoder(MODEL)))


@pytest.mark.parametrize("preset", ["tiny", "vit-tiny"])
def test_stems_tokens_heads_and_vectors_are_not_hidden_matrices(preset):
    objective = build_objective(OBJECTIVE, build_encoder(encoder_preset(preset, 64)))
    chosen = set(hidden_matrices(objective))
    layers = {name for name, parameter in objective.named_parameters() if parameter in chosen}
    last = {name.removesuffix(".weight").rpartition(".")[2] for name in layers}
    assert last == {"qkv", "proj", "fc1", "fc2"} | (
        {"hidden", "out", "linear"} if preset == "tiny" else set()
    )
    assert sum(p.numel() for p in chosen) > 0.9 * sum(p.numel() for p in objective.parameters())


def test_a_step_is_that_of_muon_and_of_adamw():
    ours, theirs = fresh(), fresh()
    optimizer = build_optimizer(ours, MUON)
    matrices = set(hidden_matrices(theirs))
    others = [p for p in theirs.parameters() if p not in matrices]
    lr = MUON.lr
    by_hand = (
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in others if p.ndim > 1], lr=lr, betas=MUON.betas, weight_decay=0.05),
        torch.optim.AdamW([p for p in others if p.ndim < 2], lr=lr, betas=MUON.betas, weight_decay=0.0),
    )
    for _ in range(2):
        for each in (optimizer, *by_hand):
            each.step()
    exempt = {name for name, p in theirs.named_parameters() if "token" in name or "pos" in name}
    for (name, found), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3 * lr if name in exempt else 1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (16, 48), (64, 256)])
def test_matrices_in_a_batch_become_orthogonal(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrices).float()
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(1), (left @ right).flatten(1)).min() > 0.95
    alone = torch.cat([orthogonalised(each[None]) for each in matrices])
    torch.testing.assert_close(found, alone.float(), atol=0.02, rtol=0)


def test_its_steps_are_as_long_as_those_of_adamw():
    lengths = {}
    for name in ("muon", "adamw"):
        module = fresh()
        before = [p.detach().clone() for p in hidden_matrices(module)]
        build_optimizer(module, replace(MUON, optimizer=name, weight_decay=0.0)).step()  # type: ignore[arg-type]
        steps = [p.detach() - old for p, old in zip(hidden_matrices(module), before, strict=True)]
        lengths[name] = torch.stack([each.square().mean().sqrt() for each in steps])
    assert (lengths["muon"] / lengths["adamw"]).max() < 0.5  # 0.2 of AdamW's first step, which is its longest
    assert (lengths["muon"] / lengths["adamw"]).min() > 0.1


def test_layers_of_a_classifier_keep_their_rates():
    classifier = build_classifier(MODEL, 3)
    recipe = FinetuneRecipe(optimizer="muon", layer_decay=0.5)
    optimizer = build_optimizer(Classification(recipe, classifier, 3), recipe)
    assert isinstance(optimizer, MuonWithAdamW)
    muon, adamw = (
        {g["lr_scale"] for g in optimizer.param_groups if ("momentum" in g) is wanted}
        for wanted in (True, False)
    )
    assert max(muon) < max(adamw) == 1.0 and len(muon) > 1
    grouped = [*chain.from_iterable(g["params"] for g in optimizer.param_groups)]
    assert len(set(grouped)) == len(grouped) == len(list(classifier.parameters()))


def with_settings_of_torch_muon(folder: Path) -> None:
    """Writes the state again as a version with `torch.optim.Muon` wrote it."""
    state = read_state(folder, print)
    assert state
    for group in state["optimizer"]["param_groups"]:
        group |= {"nesterov": True, "ns_steps": 5, "eps": 1e-7} if "momentum" in group else {}
    write_state(folder, state, keep=None)


def test_a_resumed_run_is_the_whole_one(photos, tmp_path):
    config = PretrainConfig(
        data=DataConfig(
            images=photos, image_size=ImageSize.of(16), workers=0, mean=(0.5,) * 3, std=(0.3,) * 3
        ),
        model=MODEL,
        objective=OBJECTIVE,
        optimizer=replace(MUON, steps=4),
        run=RunConfig(
            out=tmp_path / "whole", log_steps=1, save_steps=2, device="cpu", reconstruction_every=0
        ),
    )
    pretrain(config)
    half = replace(config, run=replace(config.run, out=tmp_path / "half"))
    with pytest.MonkeyPatch.context() as patch:
        step, left = MuonWithAdamW.step, iter(range(2))
        patch.setattr(MuonWithAdamW, "step", lambda self: (next(left), step(self)))  # the third ends the run
        with pytest.raises(StopIteration):
            pretrain(half)
    with_settings_of_torch_muon(tmp_path / "half" / "state")
    pretrain(half, resume=True)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows(tmp_path / "half")] == [row[key] for row in rows(tmp_path / "whole")]
