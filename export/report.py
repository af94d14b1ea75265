"""`report.md`: a human-readable report of a folder of exports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coma.atomic_io import write_text
from coma.runtimes.manifest import Entry, Manifest
from export import report_picture

NAME = "report.md"


def write_report(manifest: Manifest, folder: Path) -> Path:
    """Writes the report and its picture atomically and returns the path of the report."""
    picture = folder / report_picture.NAME
    drawn = report_picture.draw_report([*manifest.files, *manifest.rejected], picture)
    if not drawn:
        picture.unlink(missing_ok=True)
    write_text(folder / NAME, render(manifest, picture.name if drawn else None))
    return folder / NAME


def render(manifest: Manifest, picture: str | None = None) -> str:
    """Returns the report as Markdown.

    Args:
        manifest: Records of the files.
        picture: Name of the picture to show.
    """
    measured = [*manifest.files, *manifest.rejected]
    parts = [
        f"# Exports of {manifest.artifact}",
        f"A {manifest.kind}, compared with PyTorch (fp32).\n\n{_circumstances(manifest)}",
        "## Files\n\n" + _table(_FILES, [_file_row(entry) for entry in manifest.files]),
        "## Errors against PyTorch\n\n" + _table(_ERRORS, _error_rows(measured)),
        f"## Errors by shape\n\n{_BY_SHAPE_NOTE}\n\n" + _table(_BY_SHAPE, _shape_rows(measured)),
    ]
    if picture:
        parts.insert(2, f"![Errors of all outputs, and latencies]({picture})")
    latencies = [row for entry in manifest.files for row in _latency_rows(entry)]
    if latencies:
        parts.append(
            "## Latency\n\nFile and PyTorch run in turns. Compute: from tensors to outputs. End to end: "
            "from the bytes of image files, with decoding and resizing.\n\n" + _table(_LATENCY, latencies)
        )
    parts += _image_sets(measured)
    if manifest.rejected:
        lines = [
            f"- `{entry.file}`: {'; '.join(entry.verification['failures'])}"
            + (f"; {entry.error}" if entry.error else "")
            for entry in manifest.rejected
        ]
        parts.append("## Refused\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _circumstances(manifest: Manifest) -> str:
    """Returns the images, machine and versions of the verification; by file if they differ."""
    names: dict[str, list[str]] = {}
    for entry in [*manifest.files, *manifest.rejected]:
        known = ", ".join(f"{name} {v}" for name, v in entry.versions.items() if v != "not installed")
        names.setdefault(f"{entry.images}; {entry.machine}; {known}", []).append(f"`{entry.file}`")
    if len(names) < 2:
        return "".join(names)
    return "\n".join(f"- {', '.join(files)}: {circumstances}" for circumstances, files in names.items())


def _image_sets(entries: list[Entry]) -> list[str]:
    """Returns the image sets by purpose, and the images that are left out."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        for purpose, selection in entry.image_sets.items():
            line = f"{purpose} over {selection}" + (f": {selection.names}" if selection.left_out else "")
            found.setdefault(line, []).append(f"`{entry.file}`")
    lines = [f"- {', '.join(files)}: {line}" for line, files in found.items()]
    return ["## Images\n\n" + "\n".join(lines)] if lines else []


_FILES = (
    "file",
    "precision",
    "runtime",
    "MB",
    "parameters",
    "shapes (min : opt : max, batch x height x width)",
    "metric",
)
_ERRORS = (
    *("file", "output", "minimum cosine", "relative error"),
    *("maximum error", "99.9 %", "mean", "agreement"),
)
_BY_SHAPE = ("file", "shape", "largest relative error", "output", "least agreement", "output")
_BY_SHAPE_NOTE = (
    "Relative error: norm of the error over norm of PyTorch's output. Agreement: share of equal classes of "
    "pixels, or of detections found again, both ways."
)
_LATENCY = ("file", "shape", "runtime", "what", "p50 ms", "p90", "p99", "images/s")


def _file_row(entry: Entry) -> tuple[str, ...]:
    metric = "; ".join(
        ("" if runtime == "file" else f"{runtime}: ")
        + ", ".join(
            f"{name} {value:.2f} ({value - entry.metric['torch'][name]:+.2f})"
            for name, value in scores.items()
        )
        for runtime, scores in entry.metric.items()
        if runtime != "torch"
    )
    return (
        f"`{entry.file}`",
        entry.precision,
        "; ".join(entry.runtimes),
        f"{entry.bytes / 1e6:.1f}",
        f"{entry.parameters / 1e6:.2f} M",
        " : ".join(entry.shapes if len(set(entry.shapes)) > 1 else entry.shapes[:1]),
        metric or "no labels",
    )


def _verifications(entries: list[Entry]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every verification of every file, with its name and, from the second one on, the runtime."""
    for entry in entries:
        yield f"`{entry.file}`", entry.verification
        for runtime, verification in entry.also_verified.items():
            yield f"`{entry.file}` with {runtime}", verification


def _error_rows(entries: list[Entry]) -> list[tuple[str, ...]]:
    rows = []
    for file, verification in _verifications(entries):
        for name, each in verification["outputs"].items():
            numbers = [each[key] for key in ("relative", "max", "p99.9", "mean")]
            rows.append(
                (
                    file,
                    name,
                    "" if each["cosine"] is None else f"{each['cosine']:.7f}",
                    *("" if number is None else f"{number:.2g}" for number in numbers),
                    "" if each["agreement"] is None else f"{each['agreement']:.2%}",
                )
            )
    return rows


def _shape_rows(entries: list[Entry]) -> list[tuple[str, ...]]:
    """Returns a row for every file and shape; files of earlier versions have none."""
    rows = []
    for file, verification in _verifications(entries):
        for shape, outputs in verification.get("by_shape", {}).items():
            errors = {k: v["relative"] for k, v in outputs.items() if v["relative"] is not None}
            shares = {k: v["agreement"] for k, v in outputs.items() if v["agreement"] is not None}
            worst, least = (
                max(errors, key=errors.__getitem__, default=""),
                min(shares, key=shares.__getitem__, default=""),
            )
            rows.append(
                (
                    file,
                    shape,
                    f"{errors[worst]:.2g}" if worst else "",
                    worst,
                    f"{shares[least]:.2%}" if least else "",
                    least,
                )
            )
    return rows


def _latency_rows(entry: Entry) -> list[tuple[str, ...]]:
    return [
        (
            f"`{entry.file}`",
            each["shape"],
            each["runtime"],
            each["what"],
            *(f"{each[key]:.1f}" for key in ("p50", "p90", "p99", "images_per_second")),
        )
        for each in entry.latency
    ]


def _table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return "None."
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
