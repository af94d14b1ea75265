"""The leaderboard: CPU minutes of pre-training that an encoder needs to reach MAE's fine-tuned accuracy.

    python benchmarks/leaderboard/leaderboard.py --data DATA/class-tinyimagenet40 --jobs 2
    python benchmarks/leaderboard/leaderboard.py --data DATA/class-tinyimagenet40 --only "CoMA, Muon"

All rows pre-train at 64 px on the unlabelled training images, with three seeds and one thread each, on as
many images as the row says: a DyViT of 0.77 M parameters, or the ViT of `run.py`.
The encoder is then fine-tuned, briefly, with all labels and with 10 % of them, and its features are
classified by a linear probe and kNN. A row reaches a target when the means of both fine-tuned accuracies are
at least the target's; its minutes follow from the time of a training step in trials of all rows: see
`run.seconds_per_image`. TFLOP are those of a run of pre-training, in 10^12.

To try an idea: add a row to ROWS, with the fewest images that you think will do, and run the first command.
What is done is not done again, not even in another --work if all seeds of a row are in --out (a new --out
measures all rows anew); `--minutes` stops after a while. Times are those of the last call, of the rows that
it was asked for; `trained_on` in --out names the machine of each row's runs. Keep a row that beats the ones
above it, and write down in `benchmarks/LOG.md` what was tried and did not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "methods"))

from finetune_optimizers import FEW, FINETUNE, PROTOCOLS
from machine import describe
from machine import table as markdown
from run import (
    BACKBONES,
    comparison,
    entry,
    flags,
    labelled,
    parse,
    seconds_per_image,
    shared_flags,
    stoppable,
)
from table import spread

from coma.config.compare import LABEL_SHARES
from pretrain.sweep import Entry, Result, compare

TARGETS = ("MAE, Muon", "MAE on ViT, Muon")
MUON = "--optimizer muon --base-lr 0.096"


@dataclass(frozen=True)
class Row:
    """Describes a row.

    Attributes:
        flags: Flags of `coma pretrain`, from `--method` on.
        images: Number of images of pre-training.
        backbone: Encoder, by its name in `run.py`.
    """

    flags: str
    images: int
    backbone: str = "DyViT"


ROWS: Mapping[str, Row] = {
    TARGETS[0]: Row(f"mae {MUON}", 16_000),
    TARGETS[1]: Row(f"mae {MUON}", 16_000, "ViT"),
    "MAE, Muon, 8,000 images": Row(f"mae {MUON}", 8_000),
    "MAE, AdamW": Row("mae --base-lr 0.016", 16_000),
    "CoMA, Muon": Row(f"coma {MUON}", 8_000),
    "CoMA, Muon, 5,000 images": Row(f"coma {MUON}", 5_000),
    "CoMA, Muon, 5,000 images, batches of 32": Row(f"coma {MUON} --batch-size 32", 5_000),
    "CoMA, Muon, 4,480 images, batches of 32": Row(f"coma {MUON} --batch-size 32", 4_480),
    "CoMA of four views, Muon": Row(f"coma4 {MUON}", 5_000),
}
"""The rates are those that `benchmarks/methods/optimizers.py` found for MAE and CoMA on DyViT."""


def entry_of(name: str, args: argparse.Namespace) -> Entry:
    """Returns the entry of `coma compare` that trains a row."""
    described = ROWS[name]
    model = f"{described.backbone}: {BACKBONES[described.backbone]}"
    return entry(args.data / "train.npz", f"{name}: {described.flags}", model, flags(args), tuple(args.seeds))


def row(name: str, args: argparse.Namespace, test: Path) -> dict[str, tuple[Result, ...]]:
    """Trains and measures what a row lacks; returns its runs, with the first target also random weights."""
    found = entry_of(name, args)
    args.images = ROWS[name].images
    config = replace(
        comparison(args, "images", test, (found,)),
        out=args.work / f"{found.name}-{args.images}",
        protocols=PROTOCOLS,
        finetune=FINETUNE,
        finetune_10=FEW,
        reference=name,
        random_baseline=name == TARGETS[0],
    )
    with stoppable():
        compared = compare(config)
    if compared.failures:
        raise SystemExit("failed: " + "; ".join(compared.failures))
    names = dict.fromkeys(run.method for run in compared.results)
    return {each: tuple(run for run in compared.results if run.method == each) for each in names}


def measured(kept: dict[str, Any]) -> dict[str, tuple[Result, ...]]:
    """Returns the runs that an earlier call wrote, but for rows that were described otherwise then."""
    return {
        name: tuple(Result(**run) for run in some)
        for name, some in kept["runs"].items()
        if name not in ROWS or kept["rows"].get(name) == asdict(ROWS[name])
    }


def summary(
    name: str, found: Mapping[str, tuple[Result, ...]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Returns a row of the table."""
    images = ROWS[name].images if name in ROWS else 0
    cells = {"row": name, "images": f"{images:,}", "minutes": f"{images * seconds.get(name, 0) / 60:.1f}"}
    cells["TFLOP"] = f"{(found[name][0].flops or 0) / 1e12:.1f}"
    cells |= {protocol: spread(accuracies(found[name], protocol)) for protocol in PROTOCOLS}
    for target in TARGETS:
        if target in found:
            cells[f"reaches {target}"] = "is it" if name == target else reaches(found[name], found[target])
    return cells


def accuracies(runs: tuple[Result, ...], protocol: str) -> list[float]:
    """Returns the top-1 accuracies of a row's runs, in percent."""
    return [run.top1[protocol] for run in runs]


def reaches(runs: tuple[Result, ...], target: tuple[Result, ...]) -> str:
    """Returns whether both fine-tuned accuracies are, on average, at least the target's."""
    ahead = (
        statistics.mean(accuracies(runs, share)) >= statistics.mean(accuracies(target, share))
        for share in LABEL_SHARES
    )
    return "yes" if all(ahead) else "no"


def main() -> None:
    """Runs the targets, then the other rows."""
    parser = shared_flags(__doc__, ["DyViT"])
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, default=list(ROWS), help=f"{TARGETS[0]!r} always runs"
    )
    parser.set_defaults(image_size=64, train=16_000, out=Path("benchmarks/results/leaderboard_cpu.json"))
    args = parse(parser, "leaderboard")
    args.base_lr, args.probes = 1.6e-2, 0  # each row has a rate of its own
    test = labelled(args)
    print(describe(), flush=True)
    wanted = {name: entry_of(name, args) for name in ROWS if name in {TARGETS[0], *args.only}}
    steps = {name: replace(ROWS[name], images=0) for name in wanted}
    first = {step: name for name, step in reversed(steps.items())}  # rows may differ in their images alone
    times = seconds_per_image(args, test, tuple(wanted[name] for name in first.values()))
    seconds = {name: times[wanted[first[step]].name] for name, step in steps.items()}
    kept = json.loads(args.out.read_text()) if args.out.exists() else {"runs": {}, "trained_on": {}}
    found, trained_on = measured(kept), kept["trained_on"]
    for name in wanted:
        if not set(args.seeds) <= {run.seed for run in found.get(name, ())}:
            new = row(name, args, test)
            found |= new
            trained_on |= dict.fromkeys(new, describe())
        print(markdown([summary(each, found, seconds) for each in found]), flush=True)
        runs = {each: [asdict(run) for run in some] for each, some in found.items()}
        about = {
            "machine": describe(),
            "data": args.data.name,
            "trained_on": trained_on,
            "rows": {name: asdict(row) for name, row in ROWS.items()},
            "finetune": [FINETUNE, FEW],
        }
        about["seconds_per_image"] = seconds
        args.out.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
