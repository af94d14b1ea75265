"""One optimizer step: accumulation, averages, number formats, schedule, and losses that are no numbers."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import torch
from short_runs import MODEL, OBJECTIVE, rows
from torch import nn

from coma.amp import choose_precision
from coma.artifact import load_artifact
from coma.config import (
    DataConfig,
    DecoderConfig,
    MAEConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    ViTConfig,
)
from coma.data import Batch, BatchLayout, open_source, training_batches
from coma.errors import BadInput, CheckFailed
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.objectives import build_objective
from pretrain.training import pretrain, replay_nonfinite
from pretrain.training.distributed import Processes
from pretrain.training.ema import MovingAverage
from pretrain.training.optimizer import learning_rate, parameter_groups
from pretrain.training.train_step import NotFinite, TrainStep

CPU = torch.device("cpu")


def train_step(micro: int = 4, precision: Any = "fp32", model: Any = MODEL, **settings: Any) -> TrainStep:
    """A train_step of 4 images per step, always from the same start."""
    run = RunConfig(**{name: settings.pop(name) for name in ("grad_checkpointing",) if name in settings})
    torch.manual_seed(0)
    objective = build_objective(OBJECTIVE, build_encoder(model))
    optimizer = OptimizerConfig(batch_size=4, **settings)
    slices = BatchLayout(4, micro)
    return TrainStep(objective, optimizer, run, Processes(CPU), slices, precision, (0.5,) * 3, (0.3,) * 3)


def batches(photos: Path, micro: int = 4) -> Iterator[Batch]:
    return training_batches(
        open_source(photos),
        DataConfig(image_size=ImageSize.of(16), workers=0),
        channels=3,
        seed=0,
        batch=BatchLayout(4, micro),
    )


def weights(train_step: TrainStep) -> torch.Tensor:
    return nn.utils.parameters_to_vector(train_step.objective.parameters()).detach().clone()


def moved(photos: Path, steps: int = 3, micro: int = 4, **settings: Any) -> torch.Tensor:
    """How far the weights are from the start after some steps."""
    one, stream = train_step(micro, **settings), batches(photos, micro)
    start = weights(one)
    for number in range(steps):
        one(number, 1e-3, stream)
    return weights(one) - start


# the step ---------------------------------------------------------------------------------------


def test_a_step_is_what_adamw_would_do_by_hand(photos):
    one = train_step(clip_grad=0.1)
    by_hand = train_step().objective
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    decayed, _ = parameter_groups(by_hand)
    batch = next(batches(photos))
    loss = by_hand((batch.images / 255 - 0.5) / 0.3, batch.seeds).loss
    loss.backward()
    norm = nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
    with torch.no_grad():
        for parameter in decayed:
            parameter.mul_(1 - 1e-3 * 0.05)
    optimizer.step()
    step = one(0, 1e-3, batches(photos))
    assert step.values["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert step.values["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert step.values["grad_norm"] > 0.1
    torch.testing.assert_close(weights(one), nn.utils.parameters_to_vector(by_hand.parameters()).detach())


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_batches_are_the_batch(photos, micro):
    together, apart = moved(photos), moved(photos, micro=micro)
    assert together.abs().max() > 2e-3
    torch.testing.assert_close(
        apart, together, rtol=0, atol=2e-4
    )  # Adam magnifies rounding of tiny gradients
    assert (apart - together).abs().mean() < 1e-7


def test_recomputed_activations_change_nothing(photos):
    dropping = replace(MODEL, drop_path=0.5)
    recomputing = train_step(model=dropping, grad_checkpointing=True)
    passes = []
    block = recomputing.objective.get_submodule("encoder.stages.0.blocks.0")
    block.register_forward_pre_hook(lambda *_: passes.append(1))
    recomputing(0, 1e-3, batches(photos))
    assert len(passes) == 2
    assert torch.equal(moved(photos, model=dropping), moved(photos, model=dropping, grad_checkpointing=True))


def test_random_numbers_follow_the_position_in_the_stream(photos):
    dropping, stream = replace(MODEL, drop_path=0.5), batches(photos)
    first = next(stream)
    losses = []
    for number, foreign in ((0, 0), (0, 5), (1, 0)):
        torch.manual_seed(foreign)
        losses.append(train_step(model=dropping)(number, 0.0, iter([first])).values["loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("bf16", False), ("fp16", False)])
def test_fused_attention_is_for_32_bits_on_a_cpu(photos, precision, fused):
    one = train_step(precision=precision)
    with torch.profiler.profile(acc_events=True) as profile:
        one(0, 1e-3, batches(photos))
    used = {event.key for event in profile.key_averages()}
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in used) == fused
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu_backward" in used) == fused


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_nearly_the_same(photos, precision):
    exact, rounded = moved(photos), moved(photos, precision=precision)
    assert not torch.equal(exact, rounded)
    assert nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.9


def test_an_fp16_overflow_is_skipped_and_scaled_down(photos):
    one, stream = train_step(precision="fp16"), batches(photos)
    scaler = one._scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    before = weights(one)
    step = one(0, 1e-3, stream)
    assert math.isfinite(step.values["loss"])
    assert not math.isfinite(step.values["grad_norm"])
    assert torch.equal(weights(one), before)
    assert scaler.get_scale() == 2.0**39
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**10})
    one(1, 1e-3, stream)
    assert not torch.equal(weights(one), before)


def test_what_auto_means(monkeypatch):
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"
    gpu = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla V100")
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda has=has_bf16, **_: has)
        assert choose_precision("auto", gpu) == expected
    with pytest.raises(BadInput, match="Tesla V100 has none; use fp16 or fp32"):
        choose_precision("bf16", gpu)
    with pytest.raises(BadInput, match="fp16 on mps"):
        choose_precision("fp16", torch.device("mps"))


# optimizer, schedule, average -------------------------------------------------------------------


@pytest.mark.parametrize("model", [MODEL, ViTConfig(patch=8, dim=8, depth=1, heads=2)])
def test_vectors_are_not_decayed(model):
    objective = build_objective(MAEConfig(decoder=DecoderConfig(8, 1, 2)), build_encoder(model))
    decayed, free = (set(map(id, group)) for group in parameter_groups(objective))
    for name, parameter in objective.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim >= 2), name
        assert (id(parameter) in free) == (parameter.ndim < 2), name


def test_a_module_may_exempt_its_own_parameters():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.kernel = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))

        def no_weight_decay(self) -> set[str]:
            return {"rows"}

    model = nn.ModuleDict({"table": Table()})
    decayed, free = parameter_groups(model)
    assert [id(p) for p in decayed] == [id(model["table"].kernel)]
    assert [id(p) for p in free] == [id(model["table"].rows)]


def test_learning_rate():
    config = OptimizerConfig(batch_size=512, base_lr=1e-3, warmup=0.2)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    cosine = [1e-3 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([1e-3, 2e-3, *cosine])
    assert learning_rate(0, 1, config) == config.lr == 2e-3


def test_moving_average():
    parameter = nn.Parameter(torch.zeros(3))
    average = MovingAverage([parameter], 0.5)
    expected = torch.zeros(3)
    for steps in range(1, 30):
        with torch.no_grad():
            parameter += steps
        average.update(steps)
        decay = min(0.5, (1 + steps) / (10 + steps))
        expected = decay * expected + (1 - decay) * parameter.detach()
    own = parameter.detach().clone()
    with average.in_place_of_weights():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter, own)


def test_the_average_is_what_is_published(photos):
    one, stream = train_step(ema_decay=0.9), batches(photos)
    average = MovingAverage(list(one.objective.parameters()), 0.9)
    for number in range(3):
        one(number, 1e-3, stream)
        average.update(number + 1)
    own = weights(one)
    with average.in_place_of_weights():
        expected = weights(one)
    published = torch.cat([tensor.flatten() for tensor in one.weights_to_publish().values()])
    torch.testing.assert_close(published.sort().values, expected.sort().values)
    assert not torch.equal(expected, own)
    assert torch.equal(weights(one), own)


# not finite -------------------------------------------------------------------------------------


def settings(photos: Path, out: Path, **optimizer: Any) -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(images=photos, image_size=ImageSize.of(16), workers=0),
        model=replace(MODEL, drop_path=0.3),
        objective=OBJECTIVE,
        optimizer=replace(OptimizerConfig(steps=6, batch_size=4, micro_batch=2), **optimizer),
        run=RunConfig(out=out, log_steps=1, save_steps=2, reconstruction_every=0, device="cpu"),
    )


def poison(patch: pytest.MonkeyPatch, step: int, change: Any) -> None:
    take = TrainStep.__call__

    def poisoned(self: TrainStep, n: int, *rest: Any) -> Any:
        if n == step:
            with torch.no_grad():
                change(self.objective)
        return take(self, n, *rest)

    patch.setattr(TrainStep, "__call__", poisoned)


def blow_up_loss(objective: nn.Module) -> None:
    objective.get_parameter("decoder.head.bias")[0] = float("inf")


def blow_up_gradient(objective: nn.Module) -> None:
    objective.get_parameter("decoder.head.weight").mul_(1e18)  # squares to a finite loss of about 1e36


@pytest.mark.parametrize("change", [blow_up_loss, blow_up_gradient])
def test_a_loss_that_is_no_number_stops_the_run_and_can_be_replayed(photos, tmp_path, change):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckFailed) as raised:
        poison(patch, 4, change)
        pretrain(settings(photos, run, clip_grad=0.0))
    path = run / "nonfinite" / "step-000005.safetensors"
    assert str(raised.value).startswith("step 5: loss ")
    assert str(path) in str(raised.value)
    damaged = "the weights were not finite any more before this step (decoder.head.bias)"
    assert (damaged if change is blow_up_loss else "try a lower --base-lr") in str(raised.value)
    facts = json.loads(path.with_suffix(".json").read_text())
    replay = replay_nonfinite(path)
    for value, saved in zip(replay, (facts["loss"], facts["grad_norm"]), strict=True):
        assert math.isfinite(value) == math.isfinite(float(saved))
    assert math.isfinite(replay.loss) == (change is blow_up_gradient)
    assert not math.isfinite(replay.grad_norm)
    assert len(facts["images"]) == 4
    assert load_artifact(run / "artifact").config.trained["steps"] == 4  # of before
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


@pytest.fixture
def mixed_depths(tmp_path: Path) -> Path:
    """Eight images, every second one with 16 bits."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), np.uint8)
    (tmp_path / "mixed").mkdir()
    for number, pixels in enumerate(noise):
        content = imagecodecs.png_encode(pixels.astype(np.uint16) * 257 if number % 2 else pixels)
        (tmp_path / "mixed" / f"{number}.png").write_bytes(content)
    return tmp_path / "mixed"


@pytest.mark.parametrize(("images", "micro_batch"), [("photos", 2), ("mixed_depths", 1)])
def test_a_finite_step_replays_to_the_same_numbers(request, tmp_path, images, micro_batch):
    """So what a replay gives is what the step gave, drop path, accumulation and mixed depths included."""
    run, seen = tmp_path / "run", {}
    check = TrainStep._check

    def refuse(self: TrainStep, loss: float, grad_norm: float) -> None:
        check(self, loss, grad_norm)
        seen["calls"] = seen.get("calls", 0) + 1
        if seen["calls"] == 4:
            seen["values"], seen["dtypes"] = (loss, grad_norm), {b.images.dtype for b in self.batches}
            raise NotFinite(loss, grad_norm)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckFailed, match="try a lower --base-lr"):
        patch.setattr(TrainStep, "_check", refuse)
        pretrain(settings(request.getfixturevalue(images), run, micro_batch=micro_batch))
    assert len(seen["dtypes"]) == (2 if images == "mixed_depths" else 1)
    replay = replay_nonfinite(run / "nonfinite" / "step-000004.safetensors")
    assert replay == pytest.approx(seen["values"], rel=1e-6)


def test_weights_are_not_touched_by_a_bad_step(photos):
    one, stream = train_step(), batches(photos)
    with torch.no_grad():
        blow_up_loss(one.objective)
    before = weights(one)
    with pytest.raises(NotFinite):
        one(0, 1e-3, stream)
    assert torch.equal(weights(one), before)


@pytest.mark.parametrize("content", [b"", b"{}"])
def test_replaying_something_else(tmp_path, content):
    path = tmp_path / "step.safetensors"
    path.write_bytes(content)
    path.with_suffix(".json").write_bytes(content)
    with pytest.raises(BadInput, match="not a saved step"):
        replay_nonfinite(path)
