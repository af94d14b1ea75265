"""Whether a GPU computes the right thing: against the CPU, across views, compiled, and after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from train_step import build

from coma.amp import Precision, autocast, choose_attention
from coma.artifact import load_artifact
from coma.config import (
    DataConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    dyvit_preset,
    method_preset,
)
from coma.image_size import ImageSize
from coma.masking.patchify import unit_grid
from coma.masking.sampling import partition
from coma.models import DyViT, build_encoder
from coma.objectives import build_objective
from gpu_steps.session import Session, free
from pretrain.training import pretrain
from pretrain.training.train_step import TrainStep

LIMITS: dict[Precision, float] = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest relative error of all gradients together, by precision."""


def run(session: Session) -> None:
    """All checks; each is a row that says whether it holds."""
    torch.backends.cudnn.allow_tf32 = False
    small = session.small
    for encoder, method in (("tiny", "coma"),) if small else (("base", "coma"), ("vit-base", "mae")):
        against_the_cpu(session, encoder, method, 32 if small else 224, 2 if small else 4)
        free(session.device)
    with session.attempt("leak between views"):
        changed = leak(session.device, "tiny" if small else "base", 64 if small else 224)
        session.add("leak between views", ok=changed == 0.0, largest_change=changed, limit=0.0)
    if session.wants("resumed against uninterrupted"):
        with session.attempt("resumed against uninterrupted"):
            resumed(session)
    for method in ("coma",) if small else ("coma", "mae"):
        name = f"compiled against eager, {method}"
        if session.wants(name):
            with session.attempt(name):
                compiled_against_eager(session, name, method)


def against_the_cpu(session: Session, encoder: str, method: str, size: int, batch: int) -> None:
    """Loss and gradients of one batch, in fp32 and bf16, against fp32 on the CPU."""
    model = awake(encoder, method, size)
    images, seeds = torch.randn(batch, 3, size, size), torch.arange(batch)
    expected = loss_and_gradients(model, images, seeds, "fp32")
    for precision in LIMITS:
        name = f"{method} on {encoder}, {precision} against the CPU's fp32"
        if session.wants(name):
            with session.attempt(name):
                found = loss_and_gradients(model.to(session.device), images, seeds, precision)
                compare(session, name, found, expected, LIMITS[precision])


def awake(encoder: str, method: str, size: int) -> nn.Module:
    """An objective with weights of seed 0, its gates awake."""
    torch.manual_seed(0)
    model = build(encoder, method, size)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.out.weight"):
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def loss_and_gradients(
    model: nn.Module, images: Tensor, seeds: Tensor, precision: Precision
) -> tuple[float, dict[str, Tensor]]:
    """On the device of the model; gradients in float64 on the CPU."""
    device = next(model.parameters()).device
    choose_attention(model, precision, device)
    model.zero_grad(set_to_none=True)
    with autocast(precision, device):
        loss = model(images.to(device), seeds.to(device)).loss
    loss.backward()
    gradients = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


Found = tuple[float, dict[str, Tensor]]


def error(found: Found, expected: Found) -> tuple[float, float, str]:
    """Relative error of all gradients together, of the worst tensor, and that tensor's name."""
    ours, theirs = found[1], expected[1]
    whole = sum(g.square().sum() for g in theirs.values()) ** 0.5
    off = {name: (ours[name] - theirs[name]).norm().item() for name in theirs}
    relative = {name: off[name] / max(theirs[name].norm().item(), 1e-3 * float(whole)) for name in theirs}
    worst = max(relative, key=lambda name: relative[name])
    return sum(each**2 for each in off.values()) ** 0.5 / float(whole), relative[worst], worst


def compare(session: Session, name: str, found: Found, expected: Found, limit: float) -> None:
    """Record the errors of a loss and its gradients."""
    together, worst, tensor = error(found, expected)
    loss = abs(found[0] - expected[0]) / abs(expected[0])
    same = found[1].keys() == expected[1].keys()
    session.add(
        name,
        ok=bool(same and loss < limit and together < limit),  # NaN is not below a limit
        loss=found[0],
        loss_error=loss,
        gradient_error=together,
        limit=limit,
        worst_tensor=worst,
        note=f"worst: {tensor}",
    )


def leak(device: torch.device, preset: str, size: int) -> float:
    """Largest change in the features of one view when the pixels of the other change; 0 is right."""
    torch.manual_seed(1)
    encoder = DyViT(dyvit_preset(preset, size)).to(device).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.08)
    h, w = unit_grid(size, size, encoder.unit)
    group = partition(torch.arange(2, device=device), h, w, 2)
    images = torch.randn(2, 3, size, size, device=device)
    touched = (group == 1).repeat_interleave(encoder.unit, 1).repeat_interleave(encoder.unit, 2)[:, None]
    changed = torch.where(touched, images * -7 + 3, images)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        before, after = (encoder.forward_features(each, group) for each in (images, changed))
    difference = (before - after).float().abs().amax(dim=-1)
    if not difference[group == 1].max() > 0:
        raise AssertionError("the changed view itself did not change: this proves nothing")
    return float(difference[group == 0].max())


def compiled_against_eager(session: Session, name: str, method: str) -> None:
    """A shallow model in fp32: the same graphs as a deep one, compiled in less time."""
    results = []
    device, size = session.device, 32 if session.small else 224
    for compiled in (False, True):
        torch.manual_seed(0)
        shape = dyvit_preset("tiny" if session.small else "small", size)
        model = build_objective(method_preset(method, decoder_depth=1), build_encoder(
            replace(shape, depths=(1, 1, 1, 1))
        )).to(device)  # fmt: skip
        images = torch.randn(
            2 if session.small else 16, 3, size, size, generator=torch.Generator().manual_seed(1)
        )
        if compiled:
            model.compile(dynamic=False, backend="aot_eager" if session.small else "inductor")
        results.append(loss_and_gradients(model, images, torch.arange(len(images)), "fp32"))
    compare(session, name, results[1], results[0], LIMITS["fp32"])


def resumed(session: Session) -> None:
    """A run that was ended in the middle of a step and resumed against one that was not."""
    photos = session.folder / "photos"
    photos.mkdir(exist_ok=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), np.uint8)):
        Image.fromarray(pixels).save(photos / f"{number}.png")
    config = PretrainConfig(
        data=DataConfig(photos, image_size=ImageSize.of(32), mean=(0.5,) * 3, std=(0.3,) * 3, workers=0),
        model=replace(dyvit_preset("tiny", 32), depths=(1, 1, 1, 1), drop_path=0.2),
        objective=method_preset("coma", decoder_dim=64, decoder_depth=1),
        optimizer=OptimizerConfig(steps=6, batch_size=4, micro_batch=2, base_lr=0.02, ema_decay=0.9),
        run=RunConfig(save_steps=2, reconstruction_every=0, log_steps=1, device=session.device.type),  # type: ignore[arg-type]
    )
    ends = []
    for name in ("whole", "ended"):
        out = session.folder / name
        this = replace(config, run=replace(config.run, out=out))
        if name == "ended":
            with ended_in(step=3):
                pretrain(this)
            pretrain(this, resume=True)
        else:
            pretrain(this)
        ends.append(load_artifact(out / "artifact").tensors)
    one, other = ends
    off = max(float((one[key] - other[key]).abs().max()) for key in one)
    session.add("resumed against uninterrupted", ok=off < 1e-4, largest_difference=off, limit=1e-4)


@contextmanager
def ended_in(step: int) -> Iterator[None]:
    """A run inside ends in the middle of this step, as if killed."""
    take = TrainStep.__call__

    def take_or_end(self: TrainStep, number: int, *rest: Any) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return take(self, number, *rest)

    TrainStep.__call__ = take_or_end  # type: ignore[method-assign]
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        TrainStep.__call__ = take  # type: ignore[method-assign]
