"""Compares MAE with CoMA of two and four views by fine-tuning, each with a learning rate of its own.

    python benchmarks/methods/finetuned.py --data DATA/class-cifar10 --backbones DyViT --out RESULTS.json

Encoders, batches and labelled images are those of `run.py`; `coma compare --lr-search` chooses the rates by
the training loss, and its trials count in the budget of computing time that each run has. The encoders are
then fine-tuned with all labels and with 10 % of them, as those of the leaderboard, beside kNN and a linear
probe. What is done is not done again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune_optimizers import FEW, FINETUNE, PROTOCOLS
from machine import describe
from run import BACKBONES, comparison, entry, flags, labelled, parse, shared_flags, stoppable

from pretrain.sweep import compare

METHODS = ("mae", "coma", "coma4")
RATES = (8e-3, 1.6e-2, 3.2e-2)
"""Values of `--base-lr`; 5e-4 to 2e-3 at batches of 16."""


def main() -> None:
    """Runs the comparison."""
    parser = shared_flags(__doc__, list(BACKBONES))
    parser.add_argument("--seconds", type=float, default=60, help="budget of computing time")
    args = parse(parser, "finetuned")
    args.base_lr, args.probes = RATES[0], 0  # the search replaces this rate
    train = args.data / "train.npz"
    entries = tuple(
        entry(train, method, f"{name}: {BACKBONES[name]}", flags(args), tuple(args.seeds))
        for name in args.backbones
        for method in METHODS
    )
    config = replace(
        comparison(args, "seconds", labelled(args), entries),
        lr_search=RATES,
        protocols=PROTOCOLS,
        finetune=FINETUNE,
        finetune_10=FEW,
    )
    print(describe(), flush=True)
    with stoppable():
        found = compare(config)
    print(found.table.read_text())
    if args.out:
        about = {"machine": describe(), "data": args.data.name, "rates": RATES, "finetune": [FINETUNE, FEW]}
        about |= {"budget": config.budget, "runs": [asdict(run) for run in found.results]}
        args.out.write_text(json.dumps(about, indent=1) + "\n")
    if found.failures:
        raise SystemExit("failed: " + "; ".join(found.failures))


if __name__ == "__main__":
    main()
