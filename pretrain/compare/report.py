"""`compare.md`, `compare.csv` and `compare.png`: the same runs as a table, one by one, and as a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.artifact import library_versions
from pretrain.compare.plan import Comparison, Cost
from pretrain.compare.results import FLOOR, Group, Result, groups, mean_and_deviation, reach
from pretrain.training.files import write_whole

_TITLES = {"knn": "kNN", "linear": "linear", "finetune": "fine-tuned"}
_COLORS = ("#1b4f9c", "#b3541e", "#2d7d46", "#7a4fa3", "#b0892a", "#a32d5c", "#3a8f98", "#5c5c66", "#7a5230")
_MARKERS = "osD^vP*X"


def write_report(
    comparison: Comparison, results: Sequence[Result], costs: Mapping[str, Cost], missing: Sequence[str] = ()
) -> Path:
    """Write all three next to the runs.

    Args:
        comparison: What was asked for.
        results: Of all runs that are done.
        costs: Of every entry, by its name.
        missing: What failed, a line each.

    Returns:
        The table's path.
    """
    found = groups(results)
    table = "\n\n".join([_rows(comparison, found), caption(comparison, costs, missing), ""])
    path = comparison.out / "compare.md"
    write_whole(path, lambda file: file.write(table.encode()))
    text = _csv(comparison, results)
    write_whole(comparison.out / "compare.csv", lambda file: file.write(text.encode()))
    draw(comparison, found, comparison.out / "compare.png")
    return path


def _rows(comparison: Comparison, found: Sequence[Group]) -> str:
    frozen = [name for name in comparison.protocols if name != "finetune"]
    probed = frozen if comparison.probes else []
    head = [
        "method",
        "backbone",
        "parameters (M)",
        "images seen",
        "views",
        f"training ({_clock(comparison)} min)",
    ]
    head.append(f"time per epoch / {comparison.reference}")
    head += [f"{_TITLES[name]} top-1 %" for name in comparison.protocols]
    head += [f"images to {comparison.reference}'s last {_TITLES[name]} probe" for name in probed]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for group in found:
        reference = next(
            (g for g in found if (g.method, g.model) == (comparison.reference, group.model)), None
        )
        lines.append(
            [
                group.method,
                group.model,
                f"{group.runs[0].parameters / 1e6:.2f}",
                f"{group.mean('images'):,.0f}",
                f"{group.mean('views'):,.0f}",
                f"{group.mean('seconds') / 60:.1f}",
                _relative_time(group, reference),
                *(mean_and_deviation(group.top1(name)) for name in comparison.protocols),
                *(_reached(group, reference, name) for name in probed),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _relative_time(group: Group, reference: Group | None) -> str:
    if group.method == FLOOR or reference is None:
        return ""
    return f"{group.seconds_per_image() / reference.seconds_per_image():.2f}"


def _reached(group: Group, reference: Group | None, protocol: str) -> str:
    found = reach(group, reference, protocol)
    if found is None:
        return ""
    if not found.learned:
        return f"{found.target:.1f}, no better than untrained"
    if not found.images:
        return f"not reached ({found.target:.1f})"
    seen = f"{statistics.mean(found.images):,.0f} = {found.of_reference:.0%}"
    return f"{seen} ({len(found.images)} of {found.runs} runs)"


def caption(comparison: Comparison, costs: Mapping[str, Cost], missing: Sequence[str]) -> str:
    """What the numbers are of, in sentences."""
    unit = {
        "images": f"{comparison.amount:,.0f} images seen in training",
        "views": f"{comparison.amount:,.0f} encoded views",
        "seconds": f"{comparison.amount:,g} seconds of training steps ({_clock_words(comparison)})",
        "flops": f"{comparison.amount:.3g} FLOPs, forward and backward, counted on the model's shapes",
    }[comparison.unit]
    config = comparison.entries[0].config
    data, optimizer = config.data, config.optimizer
    where = data.images.name if data.images else ""
    crops = f"crops of {data.crop_scale[0]:g} to {data.crop_scale[1]:g} of the area"
    about = [
        f"**Budget of every run: {unit}**, to the nearest step; learning-rate schedules end there.",
        f"Training time is that of the steps alone ({_clock_words(comparison)}), on this machine; start-up, "
        "probes, pictures and saving are left out.",
        f"Images {where}, {data.image_size} px, {crops}, batch {optimizer.batch_size}, learning rate "
        f"{optimizer.lr:.3g}; tested on {comparison.test.name}. Accuracies are means ± sample deviation over "
        "n seeds, of single runs where n = 1.",
    ]
    counts = dict.fromkeys(f"{entry.method}: {costs[entry.name].views}" for entry in comparison.entries)
    about.append(f"Views encoded of an image in a step: {', '.join(counts)}.")
    if "finetune" in comparison.protocols:
        about.append("Fine-tuned accuracy is that of the last step, which nothing was chosen by.")
    if comparison.floor:
        about.append(f"`{FLOOR}` is the same backbone before training.")
    if comparison.probes:
        about.append(
            f"The last columns: images seen at the first of {comparison.probes} probes on the way that was "
            f"as good as {comparison.reference}'s last (mean over its seeds, in brackets where it was not "
            "reached), and their share of all that it saw. A run that is probed on the way has not ended its "
            "learning-rate schedule: one that was planned for so few images might do better."
        )
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    about.append(f"{_machine(comparison)}; {versions}.")
    about += [f"**Missing:** {line}" for line in missing]
    return "\n\n".join(about)


def _clock(comparison: Comparison) -> str:
    return "CPU" if comparison.device == "cpu" else "GPU"


def _clock_words(comparison: Comparison) -> str:
    if comparison.device == "cpu":
        return f"CPU clock: computing time of {comparison.threads} thread(s), added up"
    return "GPU clock: wall-clock time of the steps on one GPU"


def _machine(comparison: Comparison) -> str:
    import platform

    import torch

    if comparison.device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {comparison.jobs} run(s) at a time"


def _csv(comparison: Comparison, results: Sequence[Result]) -> str:
    """One row per run."""
    protocols = list(comparison.protocols)
    numbers = ["parameters", "steps", "images", "views", "seconds", "flops", "loss"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    best = ["finetune_best"] if "finetune" in protocols else []
    writer.writerow(["method", "backbone", "seed", *numbers, *protocols, *best])
    for result in results:
        own = [getattr(result, name) for name in numbers]
        row = [result.method, result.model, result.seed, *own, *(result.top1.get(name) for name in protocols)]
        writer.writerow(
            ["" if value is None else value for value in [*row, *([result.best] if best else [])]]
        )
    return text.getvalue()


def draw(comparison: Comparison, found: Sequence[Group], path: Path) -> None:
    """Accuracy against training time: a point per method and backbone, and probes on the way as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [name for name in comparison.protocols if any(group.top1(name) for group in found)]
    if not panels:
        return
    figure = Figure(figsize=(6.4 * len(panels) + 2.4, 5.6), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    methods = list(dict.fromkeys(g.method for g in found if g.method != FLOOR))
    models = list(dict.fromkeys(g.model for g in found))
    for axes, protocol in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for group in found:
            values = group.top1(protocol)
            if not values:
                continue
            mean = statistics.mean(values)
            marker = _MARKERS[models.index(group.model) % len(_MARKERS)]
            if group.method == FLOOR:
                axes.axhline(
                    mean, color="#b0b0b8", linestyle=("--", ":", "-.")[models.index(group.model) % 3]
                )
                axes.annotate(
                    f"random {group.model}", (0.99, mean), xycoords=("axes fraction", "data"), ha="right"
                )
                continue
            color = _COLORS[methods.index(group.method) % len(_COLORS)]
            for run in group.runs:
                points = [
                    (look.seconds / 60, look.top1[protocol]) for look in run.looks if protocol in look.top1
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, linewidth=0.9, alpha=0.5)
            axes.errorbar(
                group.mean("seconds") / 60,
                mean,
                yerr=statistics.stdev(values) if len(values) > 1 else None,
                color=color,
                marker=marker,
                markersize=7,
                capsize=3,
                linestyle="",
                label=f"{group.method}, {group.model}",
            )
        axes.set(
            xlabel=f"training time ({_clock(comparison)} minutes)", ylabel="top-1 %", title=_TITLES[protocol]
        )
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", frameon=False, fontsize="small")
    canvas.draw()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, lambda file: file.write(picture.getvalue()))
