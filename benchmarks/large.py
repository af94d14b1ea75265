"""What fits, and at what cost: checkpointing, accumulation and FSDP2 with a large model or large images.

    python benchmarks/large.py                                       # `large` at 224 and 448 px
    python benchmarks/large.py --model base --sizes 448 --batch 16 --processes 4

Every row is a run of `coma pretrain` itself, for a few steps on photographs that come with scikit-image; its
own metrics are reported: images per second without the first step, and the most memory that process 0 held
(on its GPU, else resident). Batches are global; at larger sizes they have as many pixels as at the first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import report
from PIL import Image
from skimage import data as pictures

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "cat")


def settings(batch: int, processes: int) -> dict[str, list[str]]:
    """How a run may use its machine."""
    pieces = ["--micro-batch", str(max(m for m in (batch // 4, 1) if m and batch % m == 0))]
    recompute = ["--grad-checkpointing"]
    ways = {
        "one pass": [],
        f"{batch // int(pieces[1])} passes": pieces,
        "checkpointing": recompute,
        f"checkpointing, {batch // int(pieces[1])} passes": recompute + pieces,
    }
    if processes > 1:
        ways[f"FSDP2, {processes} processes"] = ["--parallel", "fsdp"]
        ways[f"FSDP2, {processes} processes, checkpointing"] = ["--parallel", "fsdp", *recompute]
    return ways


def measure(
    flags: list[str], processes: int, photos: Path, out: Path, steps: int, precision: str
) -> dict[str, float] | None:
    """Images per second, GiB and share of time without data of one run; None: it does not fit."""
    fixed = shlex.split(
        "--log-steps 1 --save-steps 1000 --reconstruction-every 0 --mean .5 .5 .5 --std .3 .3 .3"
    )
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command += ["coma", "pretrain", str(photos), "--out", str(out), "--steps", str(steps)]
    done = subprocess.run(
        [*command, *fixed, "--precision", precision, *flags], capture_output=True, text=True
    )
    if "out of GPU memory" in done.stderr or -done.returncode == signal.SIGKILL:
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "speed": statistics.median(row["images_per_s"] for row in rows[1:]),
        "memory": max(row["memory_gib"] for row in rows),
        "data wait": statistics.median(row["data_wait"] for row in rows[1:]),
    }


def row_of(found: dict[str, float] | None, plain: dict[str, float] | None) -> dict[str, str]:
    """The measured columns; `plain` is what times and memory are compared with."""
    names = ("images/s", "GiB per process", "time", "memory", "waiting for data")
    if not found or not plain:
        return dict.fromkeys(names, "does not fit")
    values = (
        f"{found['speed']:.3g}",
        f"{found['memory']:.1f}",
        f"{plain['speed'] / found['speed']:.2f}",
        f"{found['memory'] / plain['memory']:.2f}",
        f"{found['data wait']:.1%}",
    )
    return dict(zip(names, values, strict=True))


def main() -> None:
    """Measure and print the table; `--out` keeps it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="large")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 448], help="pixels")
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 8, help="images at the first size")
    parser.add_argument("--processes", type=int, default=max(torch.cuda.device_count(), 1) if on_gpu else 2)
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 4)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one is not counted")

    rows = []
    with tempfile.TemporaryDirectory() as work:
        photos = Path(work) / "photos"
        photos.mkdir()
        for name in PHOTOS:
            Image.fromarray(getattr(pictures, name)()).save(photos / f"{name}.jpg", quality=95)
        for size in args.sizes:
            batch = args.batch * args.sizes[0] ** 2 // size**2
            batch = max(batch // args.processes, 1) * args.processes
            plain: dict[str, float] | None = None
            for number, (how, flags) in enumerate(settings(batch, args.processes).items()):
                shared = ["--model", args.model, "--image-size", str(size), "--batch-size", str(batch)]
                processes = args.processes if "fsdp" in flags else 1
                out = Path(work) / f"{size}-{number}"
                found = measure(shared + flags, processes, photos, out, args.steps, args.precision)
                plain = plain or found
                rows.append({"px": str(size), "batch": str(batch), "setting": how, **row_of(found, plain)})
                print(" ".join(rows[-1].values()), flush=True)
    report(f"{args.model}, {args.precision}, {args.steps} steps a run, median", rows, args.out)


if __name__ == "__main__":
    main()
