"""Training steps of CoMA on DyViT and MAE on ViT: speed, share of the peak, memory; checkpointing."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from large import measure
from PIL import Image
from skimage import data as pictures
from train_step import Step, largest_batch

from coma.amp import choose_precision
from coma.models.window_variants import attention_variant
from gpu_steps.session import Session, free, median_seconds
from pretrain.training.throughput import peak_flops, peak_memory

REFERENCE = "MAE ViT-B"
EAGER = (REFERENCE, "CoMA DyViT-B", "CoMA DyViT-S", "MAE ViT-S")
COMPILED = ("CoMA DyViT-B", REFERENCE)
MERGED = "merged windows, "
"""Begins the name of a mode in which DM-MSA attends by the variant of that name."""
ON_CPU = {"eager": ("MAE ViT-T", "CoMA DyViT-T"), "compiled": ("CoMA DyViT-T",)}
LARGEST = 1024
"""Batch that is not exceeded: beyond it tensors have more elements than 32-bit indices reach."""
BATCH = 256
"""At which all models are compared, beside the largest batch that each can take."""


def run(session: Session) -> None:
    """Eager steps of all models, then compiled ones of the base models."""
    modes = (("eager", EAGER, 12.0), ("compiled", COMPILED, 25.0), (f"{MERGED}compiled", COMPILED[:1], 25.0))
    for mode, names, seconds in modes:
        for name in ON_CPU.get(mode, ()) if session.small else names:
            result = f"{name}, {mode}"
            if session.wants(result, 0.0 if session.small else seconds):
                variant = "merged" if mode.startswith(MERGED) else "reference"
                with session.attempt(result), attention_variant(variant):
                    measure_step(session, name, mode)
                free(session.device)
        compare(session, mode)


def compare(session: Session, mode: str) -> None:
    """Time of an image under CoMA over that under MAE; the goal is 0.9, then 0.6."""
    for size in "TSB":
        label = f"time of CoMA DyViT-{size} / MAE ViT-{size}, {mode}"
        names = f"CoMA DyViT-{size}, {mode}", f"MAE ViT-{size}, {mode.removeprefix(MERGED)}"
        found = [session.results.get(name) for name in names]
        speeds = [float(each.values["images/s"]) for each in found if each and "images/s" in each.values]
        if len(speeds) == 2 and label not in session.results:
            session.add(label, ratio=speeds[1] / speeds[0])


def measure_step(session: Session, name: str, mode: str) -> None:
    """One model: at batch 256, and at the largest batch that fits."""
    device, small = session.device, session.small
    step = Step(name, device, choose_precision("auto", device), 32 if small else 224)
    flops = step.flops()
    most = 2 if small else largest_batch(step, most=LARGEST)
    free(device)
    if mode.endswith("compiled"):
        step.model.compile(dynamic=False, backend="aot_eager" if small else "inductor")
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    batches = [most] if mode.endswith("compiled") else sorted({min(BATCH, most), most})
    for batch in batches:
        repeat = session.repeat
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(partial(step, batch), device, warm=1 if small else 3, seconds=repeat)
        speed = batch / seconds
        label = f"{name}, {mode}" if batch == most else f"{name}, {mode}, batch {batch}"
        values = {
            "batch": batch,
            "images/s": speed,
            "views/s": speed * step.views,
            "GFLOP/image": flops / 1e9,
            "MFU": f"{speed * flops / peak:.1%}" if peak else None,
            "GiB": peak_memory(device),
        }
        session.add(label, values)


def large_model(session: Session) -> None:
    """Speed and memory of `coma pretrain` with and without gradient checkpointing."""
    size, batch, steps, model = (32, 4, 3, "tiny") if session.small else (224, 256, 12, "large")
    shared = ["--model", model, "--image-size", str(size), "--batch-size", str(batch)]
    shared += ["--device", session.device.type]
    plain: float | None = None
    with tempfile.TemporaryDirectory() as work:
        photos = Path(work) / "photos"
        photos.mkdir()
        for name in ("astronaut", "chelsea", "coffee", "rocket"):
            Image.fromarray(getattr(pictures, name)()).save(photos / f"{name}.jpg", quality=95)
        ways = [("plain", []), ("gradient checkpointing", ["--grad-checkpointing"])]
        for name, flags in ways[1:] if session.small else ways:
            label = f"{model}, {size} px, {name}"
            if not session.wants(label, 0.0 if session.small else 8.0):
                continue
            with session.attempt(label):
                found = measure(shared + flags, 1, photos, Path(work) / name.replace(" ", "-"), steps, "auto")
                if found is None:
                    session.add(label, note="does not fit", batch=batch)
                    continue
                plain = plain or found["speed"]
                values = {"images/s": found["speed"], "time": plain / found["speed"]}
                session.add(label, values, batch=batch, GiB=found["memory"])
