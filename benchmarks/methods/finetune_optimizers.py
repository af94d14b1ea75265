"""AdamW and Muon when a whole encoder is fine-tuned for a few epochs: three learning rates each.

    python benchmarks/methods/finetune_optimizers.py ARTIFACT --data CLASSES --out RESULTS.json

Every run is `coma classify train` with the same seed, epochs and batches, without the augmentation that long
trainings need, and with one learning rate for all layers. The test images are used once, at the end of each
run, so that the best of several rates is a little too good; for both optimizers alike. Runs are kept in
--work: what is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import describe, table

from coma.config.compare import LABEL_SHARES

RATES = {"adamw": (3e-4, 1e-3, 3e-3), "muon": (1e-3, 3e-3, 1e-2)}
"""Learning rates of the batch."""
BATCH = 32
SHORT = (
    "--ema-decay 0 --drop-path 0 --layer-decay 1 --rand-augment 0 --mixup 0 --cutmix 0 --random-erasing 0 "
    "--crop-scale 0.4 1"
)
"""What keeps long trainings from overfitting is off."""
FINETUNE = f"--epochs 2 --batch-size {BATCH} --optimizer muon --base-lr 0.024 {SHORT}"
"""Flags of short fine-tunings in comparisons, with all labels."""
FEW = "--epochs 12 --validate 4"
"""Flags that replace some of these with 10 % of the labels."""
PROTOCOLS = (*LABEL_SHARES, "linear", "knn")
"""Measurements of such comparisons."""


def train(args: argparse.Namespace, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    """One run: its row."""
    out = args.work / f"{optimizer}-{rate:g}-{seed}"
    about = out / "artifact" / "config.json"
    if not (about.exists() and "test_top1" in json.loads(about.read_text())["trained"]):
        begin = [args.artifact, "--data", args.data, "--out", out, "--seed", seed, "--epochs", args.epochs]
        begin += ["--batch-size", BATCH, "--optimizer", optimizer, "--base-lr", rate * 256 / BATCH]
        begin += ["--validate", args.epochs, "--workers", 0, "--device", "cpu", *shlex.split(SHORT)]
        command = ["--resume", out] if (out / "config.json").exists() else begin
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "coma", "classify", "train", *map(str, command)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    trained = json.loads(about.read_text())["trained"]
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [row["loss"] for row in logged if "loss" in row][-5:]
    row = {"optimizer": optimizer, "rate": f"{rate:g}", "seed": seed}
    return {
        **row,
        "loss": f"{sum(last) / len(last):.3f}",
        "test top-1 %": f"{100 * trained['test_top1']:.1f}",
    }


def main() -> None:
    """All runs, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", help="pre-trained encoder")
    parser.add_argument("--data", type=Path, required=True, help="labelled images: train and test")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/runs/finetune_optimizers"))
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(describe(), flush=True)
    rows = []
    for optimizer, rates in RATES.items():
        for rate in rates:
            for seed in args.seeds:
                rows.append(train(args, optimizer, rate, seed))
                print(rows[-1], flush=True)
    print(table(rows))
    if args.out:
        about = {"machine": describe(), "data": args.data.name, "epochs": args.epochs, "flags": SHORT}
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
