"""AdamW and Muon for CoMA and MAE, four learning rates each, then three seeds of the best one.

    python benchmarks/methods/optimizers.py --data DATA/class-cifar10 --out RESULTS.json
    python benchmarks/methods/optimizers.py --data DATA/class-tinyimagenet40 --image-size 64 --images 8000

Everything else is as in `run.py`, with its equal budget of images. A rate is tried with the first seed; the
one with the best linear probe of its method and optimizer is then trained with the other seeds. What is done
is not done again; `--minutes` stops after a while.

The minutes of a row follow from the time of a step in trials of all methods and optimizers: see
`run.seconds_per_image`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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

from pretrain.sweep import Entry, SweepResult, compare

METHODS = ("mae", "coma")
RATES: Mapping[str, tuple[float, ...]] = {
    "adamw": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "muon": (1e-3, 3e-3, 6e-3, 1.2e-2),
}
"""Peak learning rates, of the batch."""
Recipe = tuple[str, str, str, float]
"""Backbone, method, optimizer, learning rate."""


def name_of(method: str, optimizer: str, rate: float) -> str:
    """Name of a row."""
    return f"{method}, {optimizer} {rate:g}"


def recipes(args: argparse.Namespace) -> Iterator[Recipe]:
    """Everything that is tried."""
    for backbone in args.backbones:
        for method in METHODS:
            for optimizer, rates in RATES.items():
                wanted = [rate for rate in rates if name_of(method, optimizer, rate) not in args.skip]
                yield from ((backbone, method, optimizer, rate) for rate in wanted)


def entry_of(recipe: Recipe, seeds: tuple[int, ...], args: argparse.Namespace) -> Entry:
    """A row of the comparison."""
    backbone, method, optimizer, rate = recipe
    own = f"{method} --optimizer {optimizer} --base-lr {rate * 256 / args.batch:g}"
    title = f"{name_of(method, optimizer, rate)}: {own}"
    model = f"{backbone}: {BACKBONES[backbone]}"
    return entry(args.data / "train.npz", title, model, flags(args), seeds)


def run(args: argparse.Namespace, test: Path, entries: tuple[Entry, ...]) -> SweepResult:
    """Trains and measures what is missing."""
    config = replace(comparison(args, "images", test, entries), reference=entries[0].method)
    with stoppable():
        return compare(config)


def best(found: SweepResult, args: argparse.Namespace) -> set[Recipe]:
    """The rate with the best linear probe of the first seed, of every backbone, method and optimizer."""
    linear = {
        (each.model, each.method): each.top1["linear"] for each in found.results if each.seed == args.seeds[0]
    }
    chosen: dict[tuple[str, str, str], Recipe] = {}
    measured = [each for each in recipes(args) if (each[0], name_of(*each[1:])) in linear]
    for recipe in sorted(measured, key=lambda each: linear[each[0], name_of(*each[1:])]):
        chosen[recipe[:3]] = recipe  # the last one is the best
    return set(chosen.values())


def main() -> None:
    """Trials, then all seeds of the best."""
    parser = shared_flags(__doc__, ["DyViT"])
    parser.add_argument("--skip", nargs="+", default=[], help="rows that are not tried, by their names")
    args = parse(parser, "optimizers")
    args.probes, args.base_lr = 0, 1.6e-2  # each row has a rate of its own

    test, first = labelled(args), tuple(args.seeds[:1])
    print(describe(), flush=True)
    found = run(args, test, tuple(entry_of(each, first, args) for each in recipes(args)))
    chosen = best(found, args)
    seeds = {each: tuple(args.seeds) if each in chosen else first for each in recipes(args)}
    found = run(args, test, tuple(entry_of(each, some, args) for each, some in seeds.items()))
    some = {recipe[:3]: entry_of(recipe, first, args) for recipe in recipes(args)}
    seconds = seconds_per_image(args, test, tuple(some.values()))
    times = {key: seconds[each.name] for key, each in some.items()}
    rows: list[dict[str, Any]] = []
    for backbone, method, optimizer, rate in recipes(args):
        name = name_of(method, optimizer, rate)
        runs = [each for each in found.results if (each.model, each.method) == (backbone, name)]
        row = {"backbone": backbone, "method": method, "optimizer": optimizer, "rate": f"{rate:g}"}
        row |= {each: spread([run.top1[each] for run in runs]) for each in ("linear", "knn") if runs}
        rows.append({**row, "minutes": f"{times[backbone, method, optimizer] * args.images / 60:.1f}"})
    print(markdown(rows))
    if args.out:
        about = {"machine": describe(), "data": args.data.name, "flags": flags(args), "images": args.images}
        about |= {"seconds_per_image": {", ".join(key): value for key, value in times.items()}}
        about |= {"failures": found.failures, "runs": [asdict(each) for each in found.results]}
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
