"""Encoders without gradients at 224 px and at detection size, beside timm's of like size."""

from __future__ import annotations

from functools import partial

import torch
from inference import Features, gmacs
from inference import run as infer

from gpu_steps.session import Session, free, median_seconds

MODELS = ("ViT-B", "DyViT-B", "DyViT-S", "Swin-B", "Hiera-B", "ConvNeXt-B")
REFERENCE = "ViT-B"


def run(session: Session) -> None:
    """Eager at both sizes, then compiled at 224 px."""
    device, small = session.device, session.small
    names = ("DyViT-S",) if small else MODELS
    sizes = [((64, 64), (1,)), ((64, 96), (1,))] if small else [((224, 224), (1, 128)), ((800, 1344), (1, 8))]
    for mode in ("eager",) if small else ("eager", "compiled"):
        for size, batches in sizes if mode == "eager" else sizes[:1]:
            for name in names:
                place = f"{size[0]} x {size[1]}"
                wanted = [
                    batch
                    for batch in batches
                    if f"{name}, {place}, batch {batch}, {mode}" not in session.results
                ]
                least = 0.0 if small else 1.5 if mode == "eager" else 12.0
                if not wanted or session.left() < least:
                    continue
                with session.attempt(f"{name}, {place}, {mode}"):
                    model = Features(name, size).eval().to(device)
                    image = torch.zeros(1, 3, *size, device=device)
                    count = gmacs(model, image)
                    if mode == "compiled":
                        model.compile(dynamic=False)
                    for batch in wanted:
                        images = torch.randn(batch, 3, *size, device=device)
                        seconds = median_seconds(
                            partial(infer, model, images), device, warm=1 if small else 3,
                            seconds=session.repeat,
                        )  # fmt: skip
                        label = f"{name}, {place}, batch {batch}, {mode}"
                        theirs = session.results.get(label.replace(name, REFERENCE))
                        speed = batch / seconds
                        values = {"GMACs": count, "images/s": speed, "ms": 1e3 * seconds}
                        if theirs:
                            values["speed / ViT-B"] = speed / float(theirs.values["images/s"])
                        session.add(label, values)
                    del model
                free(device)
