"""Images on their way to the device, and a real pre-training on photographs that come with scikit-image."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import skimage
import torch
from PIL import Image
from train_step import Step

from coma.amp import choose_precision
from coma.config import (
    DataConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    dyvit_preset,
    method_preset,
)
from coma.data import BatchLayout, normalize, open_source, training_batches
from coma.data.worker_pool import default_workers
from coma.errors import Interrupted
from coma.image_size import ImageSize
from gpu_steps.session import Session, free, median_seconds
from pretrain.commands.quickstart import PHOTOGRAPHS
from pretrain.training import pretrain

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(folder: Path, count: int, side: int) -> Path:
    """`count` JPEGs, square pieces of scikit-image's photographs of different sizes and places."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = [path for name in PHOTOGRAPHS if (path := Path(skimage.data_dir) / name).exists()]
    opened = [Image.open(path).convert("RGB") for path in shipped]
    for number in range(count):
        image = opened[number % len(opened)]
        piece = int(min(image.size) * (0.4 + 0.6 * ((number * 37 % 100) / 100)))
        left, top = (number * 61 % (image.width - piece + 1), number * 89 % (image.height - piece + 1))
        square = image.crop((left, top, left + piece, top + piece)).resize((side, side))
        square.save(folder / f"{number:04}.jpg", quality=90)
    return folder


def run(session: Session) -> None:
    """The loader alone, the copy alone, normalisation on the device, and how long training waits."""
    small, device = session.small, session.device
    batch, size = (4, 32) if small else (256, 224)
    folder = photographs(session.folder / "photos", 8 if small else 512, 64 if small else 375)
    source = open_source(folder)
    workers = 0 if small else default_workers()
    for repeats in (1,) if small else (1, 4):
        data = DataConfig(folder, image_size=ImageSize.of(size), workers=workers, aug_repeats=repeats)
        batches = training_batches(
            source, data, channels=3, seed=0, batch=BatchLayout(batch, batch), device=device
        )
        next(batches)
        started = time.perf_counter()
        count = sum(1 for _ in islice(batches, 2 if small else 20))
        seconds = time.perf_counter() - started
        batches.close()  # type: ignore[attr-defined]
        values = {"images/s": count * batch / seconds, "workers": workers}
        session.add(f"loader alone, repeats {repeats}", values)
    for dtype in (torch.uint8, torch.float32):
        images = torch.zeros(batch, 3, size, size, dtype=dtype)
        images = images.pin_memory() if device.type == "cuda" else images
        seconds = median_seconds(partial(images.to, device, non_blocking=True), device, seconds=0.5)
        values = {"images/s": batch / seconds, "GB/s": images.nbytes / seconds / 1e9}
        session.add(f"copy to the device, {str(dtype)[6:]}", values)
    pixels = torch.zeros(batch, 3, size, size, dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(each, device=device) for each in (MEAN, STD))
    seconds = median_seconds(lambda: normalize(pixels, mean, std), device, seconds=0.5)
    session.add("normalisation on the device", {"images/s": batch / seconds, "ms": 1e3 * seconds})
    for repeats in (1,) if small else (1, 4):
        label = f"training, repeats {repeats}"
        if session.wants(label, 0.0 if small else 8.0):
            with session.attempt(label):
                config = settings(
                    session, folder, f"waiting-{repeats}", steps=3 if small else 24, batch=batch
                )
                pretrain(replace(config, data=replace(config.data, aug_repeats=repeats, workers=workers)))
                rows = metrics(config.run.out)[1:]
                rows = rows[len(rows) // 2 :]  # by then the files are in the page cache and workers are ahead
                speed, waited = (
                    sum(row[name] for row in rows) / len(rows) for name in ("images_per_s", "data_wait")
                )
                values = {"images/s": speed, "workers": workers, "batch": batch, "waiting": f"{waited:.1%}"}
                session.add(label, values)


def settings(session: Session, folder: Path, name: str, *, steps: int, batch: int) -> PretrainConfig:
    """A CoMA run of base (on a CPU of tiny) that logs every step."""
    preset, size = ("tiny", 32) if session.small else ("base", 224)
    return PretrainConfig(
        data=DataConfig(folder, image_size=ImageSize.of(size), mean=MEAN, std=STD),
        model=dyvit_preset(preset, size),
        objective=method_preset("coma", **({"decoder_dim": 64, "decoder_depth": 1} if session.small else {})),
        optimizer=OptimizerConfig(steps=steps, batch_size=batch, base_lr=8e-3 if session.small else 3e-4),
        run=RunConfig(
            session.folder / name,
            log_steps=1,
            reconstruction_every=0,
            save_minutes=60,
            device=session.device.type,  # type: ignore[arg-type]
        ),
    )


def metrics(run: Path) -> list[dict]:
    """The rows of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Ask a run inside to stop after so long; it saves, and what it has learned counts."""
    timer = threading.Timer(max(seconds, 1.0), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    except Interrupted as stop:
        print(stop, flush=True)
    finally:
        timer.cancel()


def pretrain_for_a_minute(session: Session) -> None:
    """As many steps as fit into the budget; the loss has to fall, and a picture of the end is kept."""
    small = session.small
    batch = 8 if small else 256
    folder = photographs(session.folder / "photos", 16 if small else 512, 64 if small else 256)
    trial = Step(
        "CoMA DyViT-T" if small else "CoMA DyViT-B",
        session.device,
        choose_precision("auto", session.device),
        32 if small else 224,
    )
    seconds = median_seconds(partial(trial, batch), session.device, seconds=0.5)
    del trial
    free(session.device)
    around = 2.0 if small else 18.0  # building, counting FLOPs, saving and drawing
    steps = max(int((session.left() - around) * 0.8 / seconds), 6)
    config = settings(session, folder, "run", steps=min(steps, 15 if small else 5000), batch=batch)
    started = time.perf_counter()
    with ended_after(session.left() - 8.0):
        pretrain(config)
    rows = metrics(config.run.out)
    tenth = max(len(rows) // 10, 1)
    first, last = (sum(row["loss"] for row in part) / tenth for part in (rows[:tenth], rows[-tenth:]))
    waited = [row["data_wait"] for row in rows[tenth:]]
    values = {
        "steps": rows[-1]["step"],
        "planned": config.optimizer.steps,
        "batch": batch,
        "seconds": time.perf_counter() - started,
        "loss of the first tenth": first,
        "loss of the last tenth": last,
        "images/s": sorted(row["images_per_s"] for row in rows)[len(rows) // 2],
        "MFU": f"{rows[-1]['mfu']:.1%}" if "mfu" in rows[-1] else None,
        "waiting": f"{sum(waited) / max(len(waited), 1):.1%}",
        "GiB": max(row.get("memory_gib", 0.0) for row in rows),
        "largest gradient norm": max(row["grad_norm"] for row in rows),
    }
    session.add("pre-training", values, ok=bool(last < first))
    for picture in sorted((config.run.out / "reconstructions").glob("*.png"))[-1:]:
        shutil.copyfile(picture, session.out / "reconstructions.png")
    (session.out / "pretraining.jsonl").write_text((config.run.out / "metrics.jsonl").read_text())
