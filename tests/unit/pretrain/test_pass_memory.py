"""The memory of a step is known before the first one, and a pass that would not fit is refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from short_runs import MODEL, OBJECTIVE, at

from coma.config import (
    DataConfig,
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneRecipe,
    FinetuneRunConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
)
from coma.data import BatchLayout
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.memory import GIB, PeakBytes
from pretrain.training import pretrain, step_memory

CPU = torch.device("cpu")
PRETRAIN = PretrainConfig(
    data=DataConfig(image_size=ImageSize.of(64)),
    model=MODEL,
    objective=OBJECTIVE,
    optimizer=OptimizerConfig(batch_size=12),
    run=RunConfig(out=Path("out")),
)
CLASSIFY = FinetuneConfig(
    artifact=Path("artifact"),
    data=FinetuneDataConfig(images=Path("images"), image_size=ImageSize.of(64)),
    model=MODEL,
    optimizer=FinetuneRecipe(batch_size=12),
    run=FinetuneRunConfig(out=Path("out")),
    class_names=("a", "b", "c"),
)


@pytest.mark.parametrize("config", [PRETRAIN, CLASSIFY], ids=["pretrain", "classify"])
def test_shapes_tell_what_a_step_takes(config):
    predicted = step_memory.step_bytes(config, 8, "fp32")
    model, peak = step_memory._build(config).train(), PeakBytes()
    peak.leave_out(model)
    with peak:
        beside = torch.zeros(8, dtype=torch.int64)
        images = torch.randn(8, 3, 64, 64)
        output = model(images, beside) if config is PRETRAIN else model(images)
        loss = output.loss if config is PRETRAIN else torch.nn.functional.cross_entropy(output, beside)
        loss.backward()
    moments = 2 * sum(each.nbytes for each in model.parameters())
    assert predicted == pytest.approx(peak.peak + moments, rel=0.05)
    assert step_memory.step_bytes(config, 16, "fp32") > 1.5 * predicted
    less = replace(config, run=replace(config.run, grad_checkpointing=True))
    assert step_memory.step_bytes(less, 8, "fp32") < predicted


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("config", "fitting"), [(PRETRAIN, 3), (CLASSIFY, 2)])
def test_a_pass_that_does_not_fit_is_refused_with_one_that_does(config, fitting, recompute, monkeypatch):
    config = replace(config, run=replace(config.run, grad_checkpointing=recompute))
    resident = step_memory.RECOMPUTED if recompute else step_memory.RESIDENT
    plan: Any = SimpleNamespace(config=config, slices=BatchLayout(12, 12))
    monkeypatch.setattr(step_memory, "step_bytes", lambda config, images, precision: images * GIB)
    monkeypatch.setattr(step_memory, "memory_of_process", lambda device: 3.9 * resident * GIB)
    with pytest.raises(BadInput, match=rf"12 images takes .* --micro-batch {fitting} would fit"):
        step_memory.check_step_memory(plan, "fp32", CPU)
    plan.slices = BatchLayout(12, fitting)
    step_memory.check_step_memory(plan, "fp32", CPU)
    plan.slices, recipe = BatchLayout(12, 12), replace(config.optimizer, micro_batch=12)
    plan.config = replace(config, optimizer=recipe)  # --micro-batch 12: tries anyway
    step_memory.check_step_memory(plan, "fp32", CPU)


def test_a_run_is_refused_before_it_writes_anything(photos, tmp_path, monkeypatch):
    data = replace(PRETRAIN.data, images=photos, workers=0)
    config = at(replace(PRETRAIN, data=data, optimizer=OptimizerConfig(batch_size=2)), tmp_path / "run")
    monkeypatch.setattr(step_memory, "SMALL", 0)
    monkeypatch.setattr(step_memory, "memory_of_process", lambda device: 1.0)
    with pytest.raises(BadInput, match=r"2 images takes about .*; no smaller pass would"):
        pretrain(config)
    assert not (tmp_path / "run").exists()
