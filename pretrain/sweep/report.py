"""`compare.md`, `compare.csv` and `compare.png`: results as a table, one row per run, and a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from coma.atomic_io import write_text
from coma.config.compare import RANDOM_BASELINE, CompareConfig
from pretrain.sweep.caption import caption, clock_name, probed_on
from pretrain.sweep.plan import Cost
from pretrain.sweep.plot import draw
from pretrain.sweep.results import TITLES, Group, Result, groups, mean_and_std, time_to_target


def write_report(
    comparison: CompareConfig,
    results: Sequence[Result],
    costs: Mapping[str, Cost],
    missing: Sequence[str] = (),
) -> Path:
    """Writes all three next to the runs.

    Args:
        comparison: The comparison.
        results: Results of all finished runs.
        costs: Costs by the name of their entry.
        missing: A line for every failure.

    Returns:
        The table's path.
    """
    found = groups(results)
    table = "\n\n".join([_rows(comparison, found), caption(comparison, costs, missing), ""])
    path = comparison.out / "compare.md"
    write_text(path, table)
    write_text(comparison.out / "compare.csv", _csv(comparison, results))
    draw(comparison, found, comparison.out / "compare.png")
    return path


def _rows(comparison: CompareConfig, found: Sequence[Group]) -> str:
    """Returns the table."""
    probed = comparison.frozen_protocols if comparison.probes else ()
    named, whose = comparison.reference, clock_name(comparison)
    head = ["method", "backbone", "encoder parameters (M)", "images seen", "views", f"training ({whose} min)"]
    head += ["GFLOPs per image", f"time per epoch / {named}"]
    head += [f"{TITLES[name]} top-1 %" for name in comparison.protocols]
    head += [
        f"images, {whose} min (and share of {named}'s) to {named}'s last {TITLES[name]} probe"
        for name in probed
    ]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for group in found:
        reference = next((g for g in found if (g.method, g.model) == (named, group.model)), None)
        lines.append(
            [
                group.method,
                group.model,
                f"{group.runs[0].parameters / 1e6:.2f}",
                f"{group.mean('images'):,.0f}",
                f"{group.mean('views'):,.0f}",
                f"{group.mean('seconds') / 60:.1f}",
                f"{flops / 1e9:.3g}" if (flops := group.flops_per_image()) else "",
                _relative_time(group, reference),
                *(mean_and_std(group.top1(name)) for name in comparison.protocols),
                *(_reach(group, reference, name, comparison) for name in probed),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _relative_time(group: Group, reference: Group | None) -> str:
    if group.method == RANDOM_BASELINE or reference is None:
        return ""
    return f"{group.seconds_per_image() / reference.seconds_per_image():.2f}"


def _reach(group: Group, reference: Group | None, protocol: str, comparison: CompareConfig) -> str:
    found = time_to_target(group, reference, protocol, probed_on(comparison)[1])
    if reference is None or found is None:
        return ""
    if not found.learned:
        return f"{found.target:.1f} is no better than untrained"
    if len(found.images) < found.runs:
        return f"{len(found.images)} of {found.runs} runs reached {found.target:.1f}"
    images, seconds = statistics.mean(found.images), statistics.mean(found.seconds)
    whole = reference.mean("images"), reference.mean("seconds")
    return f"≤ {images:,.0f} ({images / whole[0]:.0%}), {seconds / 60:.1f} ({seconds / whole[1]:.0%})"


def _csv(comparison: CompareConfig, results: Sequence[Result]) -> str:
    """Returns the results, one row per run."""
    protocols = list(comparison.protocols)
    numbers = ["parameters", "steps", "images", "views", "seconds", "flops", "loss"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    tuned = comparison.finetune_protocols
    best = [f"{name}_validation" for name in tuned]
    writer.writerow(["method", "backbone", "seed", *numbers, *protocols, *best])
    for result in results:
        own = [getattr(result, name) for name in numbers]
        row = [result.method, result.model, result.seed, *own, *(result.top1.get(name) for name in protocols)]
        row += [result.validated.get(name) for name in tuned]
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()
