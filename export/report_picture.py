"""`report.png`: the errors of all outputs of exported files, and their latencies beside PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coma.contact_sheet import write_png
from coma.fonts import draw_figure
from coma.messages import without_formulas
from coma.runtimes.manifest import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "report.png"
_ROW = 0.24  # inches
_SMALLEST = 1e-9  # relative error; smaller ones are drawn there


def draw_report(entries: list[Entry], path: Path) -> bool:
    """Draws the relative error of every output, and the median computing time by runtime and shape.

    Args:
        entries: Records of the files.
        path: PNG to write, atomically.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    errors = {entry.file: _errors(entry) for entry in entries}
    latencies = [row for entry in entries for row in _latencies(entry)]
    outputs = list(dict.fromkeys(name for each in errors.values() for name in each))
    if not outputs:
        return False
    rows = max(len(outputs), len(latencies), 5)
    figure = Figure(figsize=(11 if latencies else 6.5, 1.4 + _ROW * rows), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2 if latencies else 1, squeeze=False)[0]
    _draw_errors(axes[0], errors, outputs, {entry.file: entry.tolerances for entry in entries})
    if latencies:
        _draw_latencies(axes[1], latencies)
    write_png(path, draw_figure(figure))
    return True


def _errors(entry: Entry) -> dict[str, float]:
    outputs = entry.verification["outputs"]
    return {name: each["relative"] for name, each in outputs.items() if each["relative"] is not None}


def _latencies(entry: Entry) -> list[tuple[str, float, bool]]:
    """Returns a label, the median time in ms, and whether it is PyTorch's, for every shape."""
    computed = [row for row in entry.latency if row["what"] == "compute"]
    return [
        (f"{'PyTorch' if number % 2 else entry.file}, {row['shape']}", row["p50"], bool(number % 2))
        for number, row in enumerate(computed)
    ]


def _draw_errors(
    axes: Axes, errors: dict[str, dict[str, float]], outputs: list[str], tolerances: dict[str, dict]
) -> None:
    for file, each in errors.items():
        known = [name for name in outputs if name in each]
        (line,) = axes.plot(
            [max(each[name], _SMALLEST) for name in known],
            [outputs.index(name) for name in known],
            linestyle="",
            marker="o",
            label=without_formulas(file),
        )
        limit = tolerances[file].get("relative")
        if limit:
            axes.axvline(limit, color=line.get_color(), linestyle="--", linewidth=1)
    axes.set_yticks(range(len(outputs)), outputs)
    axes.set(
        xscale="log", title="Relative error of outputs; dashed: tolerance", ylim=(len(outputs) - 0.5, -0.5)
    )
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    _tidy(axes)


def _draw_latencies(axes: Axes, rows: list[tuple[str, float, bool]]) -> None:
    colors = ["#c8c8d0" if of_torch else "#1b4f9c" for _, _, of_torch in rows]
    axes.barh(range(len(rows)), [time for _, time, _ in rows], color=colors)
    axes.set_yticks(range(len(rows)), [without_formulas(label) for label, _, _ in rows])
    axes.invert_yaxis()
    axes.set(title="Median computing time, ms")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
