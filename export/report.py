"""`report.md`: a human-readable report of a folder of exports."""

from __future__ import annotations

from pathlib import Path

from coma.atomic_io import write_text
from coma.runtimes.manifest import Entry, Manifest

NAME = "report.md"


def write_report(manifest: Manifest, folder: Path) -> Path:
    """Writes the report atomically and returns its path."""
    write_text(folder / NAME, render(manifest))
    return folder / NAME


def render(manifest: Manifest) -> str:
    """Returns the report as Markdown."""
    parts = [
        f"# Exports of {manifest.artifact}",
        f"A {manifest.kind}, compared with PyTorch (fp32).\n\n{_circumstances(manifest)}",
        "## Files\n\n" + _table(_FILES, [_file_row(entry) for entry in manifest.files]),
        "## Errors against PyTorch\n\n" + _table(_ERRORS, _error_rows(manifest.files)),
    ]
    latencies = [row for entry in manifest.files for row in _latency_rows(entry)]
    if latencies:
        parts.append(
            "## Latency\n\nFile and PyTorch run in turns. Compute: from tensors to outputs. End to end: "
            "from the bytes of image files, with decoding and resizing.\n\n" + _table(_LATENCY, latencies)
        )
    parts += _image_sets([*manifest.files, *manifest.rejected])
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
_ERRORS = ("file", "output", "minimum cosine", "maximum error", "99.9 %", "mean", "agreement")
_LATENCY = ("file", "shape", "runtime", "what", "p50 ms", "p90", "p99", "images/s")


def _file_row(entry: Entry) -> tuple[str, ...]:
    metric = ", ".join(
        f"{name} {value:.2f} ({value - entry.metric['torch'][name]:+.2f})"
        for name, value in entry.metric.get("file", {}).items()
    )
    return (
        f"`{entry.file}`",
        entry.precision,
        entry.runtime,
        f"{entry.bytes / 1e6:.1f}",
        f"{entry.parameters / 1e6:.2f} M",
        " : ".join(entry.shapes),
        metric or "no labels",
    )


def _error_rows(entries: list[Entry]) -> list[tuple[str, ...]]:
    rows = []
    for entry in entries:
        for name, each in entry.verification["outputs"].items():
            numbers = [each[key] for key in ("max", "p99.9", "mean")]
            rows.append(
                (
                    f"`{entry.file}`",
                    name,
                    "" if each["cosine"] is None else f"{each['cosine']:.7f}",
                    *("" if each["cosine"] is None else f"{number:.2g}" for number in numbers),
                    "" if each["agreement"] is None else f"{each['agreement']:.2%}",
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
