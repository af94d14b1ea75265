"""Every method on DyViT and on a ViT of about equal size, with equal images and with equal CPU time.

    python benchmarks/methods/run.py --data DATA/class-cifar10 --out benchmarks/results/methods_cifar10.json
    python benchmarks/methods/run.py --data DATA/class-tinyimagenet40 --image-size 64 --images 8000

DATA is a folder with labelled train.npz and test.npz; training ignores the labels. DyViT has 0.77 M
parameters, the ViT 0.80 M (of the encoder, at 32 px). mae, coma and its control with independent masks run
with three seeds, all others with one. All is done by `coma compare`'s functions, once for each budget,
in --work: what is done is not done again, whenever the script was stopped or killed. `--minutes` stops it
after a while, the runs saved. Tables hold what `--only` and `--backbones` name; a budget that is not asked
for stays in --out as it is.

cmt and coma-balanced need a teacher, and CLIP (the published one) is none for a machine without a network:
theirs is a ViT that MAE pre-trains first, on as many images as the budget of images says, in --work. What
it saw is on top of what these rows were given.

Budgets are for one core of the machine in `benchmarks/LOG.md`: 12,800 images or 60 seconds of computing
time; CoMA on DyViT takes about 145 seconds for that many images. Accuracy is measured on 5,000 training and
2,000 test images; probes on the way on 1,000 and 1,000.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import describe

from coma.errors import Interrupted
from coma.signals import StopRequest
from pretrain.commands.compare import entry
from pretrain.sweep import CompareConfig, Entry, SweepResult, compare
from pretrain.sweep.plan import cost
from pretrain.sweep.trials import timed

TEACHER = "--teacher {teacher}"
METHODS: Mapping[str, str] = {
    "mae": "mae",
    "coma": "coma",
    "coma-independent": "coma-independent",
    "coma-single": "coma-single",
    "coma-balanced": f"coma-balanced {TEACHER}",
    "cmt": f"cmt {TEACHER}",
    "zoom-in": "beyond --degrade zoom-in",
    "zoom-out": "beyond --degrade zoom-out",
    "distort": "beyond --degrade distort",
    "blur": "beyond --degrade blur",
    "decolor": "beyond --degrade decolor",
    "zoom-in+mask": "beyond --degrade zoom-in+mask",
    "zoom-in+coma": "beyond --degrade zoom-in+coma",
}
"""By their names in the table."""
BACKBONES: Mapping[str, str] = {
    "DyViT": "tiny --model.dim 16 --model.heads 2 2 4 8",
    "ViT": "vit-tiny --model.dim 128 --model.heads 4 --model.depth 4",
}
MAIN = ("mae", "coma", "coma-independent")
"""With all seeds."""
TIMING_ROUNDS = 3
TAUGHT_BY = "a ViT that MAE pre-trained on the budget of images, which its pupils' budgets do not count"


def flags(args: argparse.Namespace) -> list[str]:
    """What all runs share, of `coma pretrain`."""
    text = f"--image-size {args.image_size} --batch-size {args.batch} --base-lr {args.base_lr}"
    text += " --crop-scale 0.4 1.0 --objective.decoder.dim 128 --objective.decoder.depth 2"
    return [*text.split(), "--objective.decoder.heads", "4", "--save-minutes", "2", "--log-steps", "10"]


def labelled(args: argparse.Namespace) -> Path:
    """The first images of both splits: measuring on all of them would take longer than training."""
    folder = args.work / "labelled"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", args.train), ("test", args.test)):
        path = folder / f"{split}.npz"
        if path.exists():
            continue
        with np.load(args.data / f"{split}.npz", allow_pickle=False) as pack:
            count = min(count, len(pack["labels"]))
            part = {"data": pack["data"][: pack["offsets"][count]], "offsets": pack["offsets"][: count + 1]}
            part |= {key: pack[key][:count] for key in ("labels", "file_names")}
            partial = folder / f".{split}.{os.getpid()}.npz"
            np.savez(partial, class_names=pack["class_names"], **part)
            partial.rename(path)
    return folder


def teacher(args: argparse.Namespace) -> Path:
    """A ViT pre-trained by MAE, for the methods that are taught."""
    out = args.work / "teacher"
    name = ["--method", "mae", "--model", *BACKBONES["ViT"].split()]
    steps = ["--steps", str(round(args.images / args.batch)), "--seed", "100", "--reconstruction-every", "0"]
    begin = [str(args.data / "train.npz"), "--out", str(out), *name, *steps, *flags(args), "--workers", "0"]
    done = out / "loss_curve.png"
    if not done.exists():
        arguments = ["--resume", str(out)] if (out / "config.json").exists() else begin
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-m", "coma", "pretrain", *arguments], env=environment, check=True)
    return out / "artifact"


def entries(args: argparse.Namespace) -> tuple[Entry, ...]:
    """All that was asked for."""
    taught = any(TEACHER in METHODS[name] for name in args.only)
    place = str(teacher(args)) if taught else ""
    return tuple(
        entry(
            args.data / "train.npz",
            f"{name}: {METHODS[name].format(teacher=place)}",
            f"{backbone}: {BACKBONES[backbone]}",
            flags(args),
            tuple(args.seeds if name in MAIN else args.seeds[:1]),
        )
        for backbone in args.backbones
        for name in args.only
    )


def comparison(args: argparse.Namespace, unit: str, test: Path, found: tuple[Entry, ...]) -> CompareConfig:
    """One budget."""
    return CompareConfig(
        images=args.data / "train.npz",
        test=test,
        budget=("images", args.images) if unit == "images" else ("seconds", args.seconds),
        entries=found,
        protocols=("knn", "linear"),
        out=args.work / f"equal-{unit}",
        reference="mae",
        device="cpu",
        jobs=args.jobs,
        threads=1,
        workers=0,
        probes=args.probes,
        probe_train=1000,
        probe_test=1000,
    )


@contextmanager
def stoppable() -> Iterator[None]:
    """Ends the script with one line where Ctrl-C or `--minutes` stops the comparison inside."""
    try:
        yield
    except Interrupted as stopped:
        raise SystemExit(str(stopped)) from None


def seconds_per_image(args: argparse.Namespace, test: Path, entries: tuple[Entry, ...]) -> dict[str, float]:
    """Returns the computing time of training on one image, by the names of the entries.

    It is the median of several rounds of short trials of all entries, one after the other. Beside other work
    the computing time of a step can double, so the times of runs are not comparable. Delete the folders
    `timing-N` in --work and call the script again when nothing else runs.
    """
    config = replace(comparison(args, "images", test, entries), jobs=1)
    known = {entry.name: cost(entry.config) for entry in entries}
    with stoppable(), StopRequest() as stop:
        rounds = [
            timed(replace(config, out=args.work / f"timing-{number}"), known, stop)
            for number in range(TIMING_ROUNDS)
        ]
    return {name: statistics.median(each[name].seconds or 0.0 for each in rounds) for name in known}


def record(args: argparse.Namespace, found: Mapping[str, SweepResult]) -> None:
    """Everything of all runs as JSON."""
    about = {"machine": describe(), "data": args.data.name, "flags": flags(args)}
    about |= {"backbones": dict(BACKBONES), "methods": dict(METHODS), "teacher": TAUGHT_BY}
    budgets = {
        unit: {
            "amount": compared.comparison.amount,
            "costs": {name: asdict(cost) for name, cost in compared.costs.items()},
            "failures": compared.failures,
            "runs": [asdict(result) for result in compared.results],
        }
        for unit, compared in found.items()
    }
    kept = json.loads(args.out.read_text())["budgets"] if args.out.exists() else {}
    args.out.write_text(json.dumps(about | {"budgets": kept | budgets}, indent=1) + "\n")


def shared_flags(description: str | None, backbones: list[str]) -> argparse.ArgumentParser:
    """Flags of every script that compares here."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and test.npz")
    parser.add_argument("--work", type=Path, help="default: benchmarks/runs/NAME-OF-SCRIPT-NAME-OF-DATA")
    parser.add_argument("--images", type=int, default=12_800, help="budget of images")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=backbones)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--image-size", type=int, default=32, help="at 64, patches are twice as large and tokens as many"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--train", type=int, default=5_000, help="labelled images to measure with")
    parser.add_argument("--test", type=int, default=2_000, help="test images to count on")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same call goes on")
    parser.add_argument("--out", type=Path)
    return parser


def parse(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """What was asked of the script of this name, which stops itself after `--minutes`."""
    args = parser.parse_args()
    args.work = args.work or Path("benchmarks/runs") / f"{name}-{args.data.name}"
    if args.minutes:
        timer = threading.Timer(60 * args.minutes, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    return args


def main() -> None:
    """Both budgets, one after the other."""
    parser = shared_flags(__doc__, list(BACKBONES))
    parser.add_argument("--seconds", type=float, default=60, help="budget of computing time")
    parser.add_argument("--budgets", nargs="+", choices=("images", "seconds"), default=["images", "seconds"])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--base-lr", type=float, default=1.6e-2, help="per 256 images")
    parser.add_argument("--probes", type=int, default=4)
    args = parse(parser, "methods")
    args.only = [name for name in METHODS if name in {"mae", *args.only}]  # the reference is always there

    test, found = labelled(args), entries(args)
    print(describe(), flush=True)
    done: dict[str, SweepResult] = {}
    for unit in args.budgets:
        with stoppable():
            done[unit] = compare(comparison(args, unit, test, found))
        print(f"\n## Equal {unit}\n\n{done[unit].table.read_text()}\nTeacher: {TAUGHT_BY}.", flush=True)
        if args.out:
            record(args, done)
    failures = [line for compared in done.values() for line in compared.failures]
    if failures:
        raise SystemExit("failed: " + "; ".join(failures))


if __name__ == "__main__":
    main()
