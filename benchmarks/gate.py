"""What the gate of `coma export` lets through and what it stops, and whether it finds where an error starts.

    python benchmarks/gate.py --work /tmp/gate --out benchmarks/results/gate_cpu.json
    python benchmarks/gate.py --work /tmp/gate --only classifier

Correct files of very small models of every kind, in every precision: all must pass, and their largest errors
show how far the tolerances are from them. Then single faults in these files: all must be refused. Then ten
modules of every kind, one after another 1 % off: each must be named, or the module before or after it. The
models have random weights as wide as trained ones; images are scikit-image's photographs. `--work` keeps
artifacts and exports.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from machine import table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from coma.runtimes.manifest import machine, versions
from export.image_sets import read_image_set
from export.preprocessing import Photographs
from export.verify.tolerances import SELECTION, TOLERANCES
from export.verify.verdict import ParityResult


def largest(result: ParityResult, role: str) -> float | None:
    """Returns the largest relative error of the outputs of a role."""
    return max(
        (each.relative for each in result.outputs.values() if each.role == role and each.compared),
        default=None,
    )


def agreement(result: ParityResult, *names: str) -> float | None:
    """Returns the least agreement of the outputs with these names."""
    found = [result.outputs[name].agreement for name in names if name in result.outputs]
    return min((each for each in found if each is not None), default=None)


def judge_correct(made: Any) -> dict[str, Any]:
    """Returns the row of a correct file."""
    started = time.perf_counter()
    result = made.judge(made.file)
    selected = [name for name, each in result.outputs.items() if each.role == "selection"]
    return {
        "file": made.case.name,
        "precision": made.case.precision,
        "passed": result.passed,
        "failures": list(result.failures),
        "least_cosine": min(each.cosine for each in result.outputs.values()),
        "raw": largest(result, "output"),
        "matched": largest(result, "detections"),
        "selected": largest(result, "selection"),
        "found": agreement(result, "labels"),
        "faint": agreement(result, "labels below 0.3"),
        "pixels": agreement(result, "classes"),
        "selection_agrees": agreement(result, *selected),
        "shapes": len(result.shapes),
        "seconds": time.perf_counter() - started,
    }


def judge_fault(made: Any, fault: Any) -> dict[str, Any]:
    """Returns the row of a planted fault."""
    with tempfile.TemporaryDirectory() as folder:
        result = made.judge(made.planted(fault.change, Path(folder)), fault.wrap)
    return {
        "file": made.case.name,
        "fault": fault.about,
        "refused": not result.passed,
        "failures": list(result.failures),
    }


def main() -> None:
    """Judges all files, prints tables and writes the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for artifacts and exports")
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--modules", type=int, default=10, help="modules of each kind to plant an error in")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from gate_cases import CORRECT, LOCATED, Made, locations
    from planted_faults import FAULTS

    args.work.mkdir(parents=True, exist_ok=True)
    pictures = list(read_image_set(Photographs(), 3, 6).pictures)
    correct, faults, modules = [], [], []
    for case in CORRECT:
        if args.only in case.model:
            correct.append(judge_correct(Made(case, args.work, pictures)))
            print(correct[-1], flush=True)
    write(args.out, correct, faults, modules)
    for fault in FAULTS:
        if args.only in fault.case.model:
            faults.append(judge_fault(Made(fault.case, args.work, pictures), fault))
            print(faults[-1], flush=True)
    write(args.out, correct, faults, modules)
    for case in LOCATED:
        if args.only in case.model:
            made = Made(case, args.work, pictures)
            modules += [{"file": case.name, **asdict(each)} for each in locations(made, args.modules)]
            print(modules[-1], flush=True)
    write(args.out, correct, faults, modules)
    print("\n" + table([_as_text(row) for row in correct]))
    print("\n" + table([_as_text({**row, "why": "; ".join(row["failures"])[:100]}) for row in faults]))
    print("\n" + table([_as_text(row) for row in modules]))
    print(
        f"\n{sum(row['passed'] for row in correct)} of {len(correct)} correct files pass, "
        f"{sum(row['refused'] for row in faults)} of {len(faults)} faults are refused, "
        f"{sum(row['distance'] is not None and row['distance'] <= 1 for row in modules)} of {len(modules)} "
        "modules are located"
    )


def write(path: Path | None, correct: list[Any], faults: list[Any], modules: list[Any]) -> None:
    """Writes what there is so far."""
    tolerances = {**TOLERANCES, "selection": SELECTION}
    facts = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "tolerances": {name: asdict(each) for name, each in tolerances.items()},
        "correct": correct,
        "faults": faults,
        "modules": modules,
    }
    if path:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _as_text(row: dict[str, Any]) -> dict[str, str]:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}" if value > 0.01 else f"{value:.1e}"
        return "" if value is None else str(value)

    return {name: text(value) for name, value in row.items() if name not in ("precision", "failures")}


if __name__ == "__main__":
    main()
