"""What only a GPU can show of pre-training: its kernels, its memory, its queue. Skipped without one."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from encoders import TINY, awake
from PIL import Image
from short_runs import MODEL, OBJECTIVE, Killed, at, killed_in, learned

from coma.config import DataConfig, DyViTConfig, MAEConfig, ViTConfig, dyvit_preset, method_preset
from coma.data import BatchLayout, open_source, training_batches
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.masking.sampling import keep, partition
from coma.models import DyViT, build_encoder
from coma.models.window_variants import VARIANTS, attention_variant
from coma.objectives import build_objective
from coma.objectives.load import load_pretrained
from pretrain.training import pretrain

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # the compiler's own

VIT = ViTConfig(patch=8, dim=32, depth=2, heads=2)
MAE = MAEConfig(decoder=OBJECTIVE.decoder)
LARGER = DyViTConfig(
    patch=1, dim=32, depths=(1, 1, 2, 1), heads=(2, 2, 4, 4), windows=((4, 8), (2, 4), (2, 6), (3,))
)


def build(config, objective=OBJECTIVE, device="cpu"):
    torch.manual_seed(0)
    return build_objective(objective, build_encoder(config)).to(device)


def loss_and_gradients(model, images, seeds, dtype=None):
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        loss = model(images.to(device), seeds.to(device)).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])


@contextmanager
def no_wait_for(device):
    """Anything inside that makes the CPU wait for the GPU is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("config", [LARGER, VIT], ids=["dyvit", "vit"])
@pytest.mark.parametrize("objective", [OBJECTIVE, MAE], ids=["coma", "mae"])
@pytest.mark.parametrize(("dtype", "limit"), [(None, 1e-3), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_a_cpu(accelerator, config, objective, dtype, limit):
    images, seeds = torch.randn(4, 3, 24, 24), torch.arange(4)
    loss, gradients = loss_and_gradients(build(config, objective), images, seeds)
    found, others = loss_and_gradients(build(config, objective, accelerator), images, seeds, dtype)
    assert found == pytest.approx(loss, rel=limit)
    assert (others - gradients).norm() < limit * gradients.norm()


@pytest.mark.parametrize("config", [LARGER, VIT], ids=["dyvit", "vit"])
@pytest.mark.parametrize("objective", [OBJECTIVE, MAE], ids=["coma", "mae"])
def test_a_step_never_waits_for_the_device(accelerator, config, objective):
    model = build(config, objective, accelerator)
    images, seeds = torch.randn(4, 3, 24, 24, device=accelerator), torch.arange(4, device=accelerator)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for number in range(2):  # the first one sets things up
        with no_wait_for(accelerator) if number else nullcontext():
            with torch.autocast(accelerator.type, torch.bfloat16):
                loss = model(images, seeds).loss
            loss.backward()
            optimizer.step()


def test_no_view_sees_another_there(accelerator):
    encoder = awake(DyViT(replace(dyvit_preset("tiny", 64), depths=(1, 1, 1, 1)))).to(accelerator)
    group = partition(torch.arange(2, device=accelerator), 4, 4, 2)
    images = torch.randn(2, 3, 64, 64, device=accelerator)
    touched = (group == 1).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    with torch.no_grad(), torch.autocast(accelerator.type, torch.bfloat16):
        before, after = (
            encoder.forward_features(each, group)
            for each in (images, torch.where(touched, images * -7 + 3, images))
        )
    assert torch.equal(before[group == 0], after[group == 0])
    assert not torch.equal(before[group == 1], after[group == 1])


def test_more_windows_than_one_call_of_a_kernel_takes(accelerator):
    encoder = awake(DyViT(replace(TINY, windows=((2, 4),) * 2 + ((1, 2),) + ((1,),)))).to(accelerator)
    batch = 70 if accelerator.type == "cpu" else 2200  # of 9 units of 16 windows of 2 x 2 tokens each
    images = torch.randn(batch, 3, 24, 24, device=accelerator)
    with torch.no_grad():
        whole = encoder.forward_features(images)
        last = encoder.forward_features(images[-2:])
    torch.testing.assert_close(whole[-2:], last, rtol=1e-3, atol=1e-3)


def test_masks_are_those_of_a_cpu(accelerator):
    seeds = torch.arange(64) * 7919
    for here, there in (
        (partition(seeds, 7, 7, 2), partition(seeds.to(accelerator), 7, 7, 2)),
        (keep(seeds, 7, 7, 12, salt=1), keep(seeds.to(accelerator), 7, 7, 12, salt=1)),
    ):
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_a_gpu_are_pinned(accelerator, photos, workers):
    data = DataConfig(photos, image_size=ImageSize.of(16), workers=workers)
    batches = training_batches(
        open_source(photos), data, channels=3, seed=0, batch=BatchLayout(4, 4), device=accelerator
    )
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert batch.images.is_pinned() == batch.seeds.is_pinned() == (accelerator.type == "cuda")


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_a_run_trains_saves_and_reconstructs(accelerator, settings, tmp_path, precision):
    config = at(settings, tmp_path / "run", device=accelerator.type, precision=precision)
    pretrain(config)
    rows, weights = learned(tmp_path / "run")
    assert len(rows) == 3 and all(torch.isfinite(each).all() for each in weights.values())
    objective = load_pretrained(tmp_path / "run" / "artifact")
    images = torch.randn(2, 3, 16, 16)
    shown = objective.draw_visible(torch.arange(2), 2, 2)[0]
    expected = objective.reconstruct(images, shown)
    found = objective.to(accelerator).reconstruct(images.to(accelerator), shown.to(accelerator))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)


def test_a_run_goes_on_after_it_was_killed(accelerator, resumable, no_pictures, tmp_path):
    config = replace(resumable, run=replace(resumable.run, device=accelerator.type, precision="fp32"))
    pretrain(at(config, tmp_path / "whole"))
    ended = at(config, tmp_path / "ended")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_in(patch, 5)
        pretrain(ended)
    pretrain(ended, resume=True)
    (rows, weights), (others, other_weights) = (learned(tmp_path / name) for name in ("whole", "ended"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in others], rel=1e-3)
    for name, each in weights.items():
        torch.testing.assert_close(other_weights[name], each, rtol=1e-2, atol=1e-3)


def test_too_large_a_batch_is_an_error_of_one_line(accelerator, tmp_path):
    if accelerator.type == "cpu":
        pytest.skip("a CPU has no memory limit of its own")
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    config = replace(
        at(settings_of(tmp_path), tmp_path / "run", device="cuda"), model=dyvit_preset("base", 224)
    )
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(BadInput, match="out of GPU memory with 64 images per pass"):
            pretrain(config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def settings_of(folder):
    from coma.config import OptimizerConfig, PretrainConfig, RunConfig

    return PretrainConfig(
        data=DataConfig(folder, image_size=ImageSize.of(224), mean=(0.5,) * 3, std=(0.3,) * 3, workers=0),
        model=MODEL,
        objective=method_preset("coma"),
        optimizer=OptimizerConfig(steps=1, batch_size=64),
        run=RunConfig(reconstruction_every=0),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_attention_equal_the_reference_there(accelerator, name):
    if name in ("flex", "pieces") and accelerator.type == "cpu":
        pytest.skip("FlexAttention has no backward pass on CPUs, and compiling takes minutes there")
    model = build(LARGER, device=accelerator)
    images, seeds = torch.randn(4, 3, 24, 24), torch.arange(4)
    loss, gradients = loss_and_gradients(model, images, seeds, torch.bfloat16)
    with attention_variant(name):
        found, others = loss_and_gradients(model, images, seeds, torch.bfloat16)
    assert found == pytest.approx(loss, rel=2e-2)
    assert (others - gradients).norm() < 5e-2 * gradients.norm()
