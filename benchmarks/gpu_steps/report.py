"""Results as a file and as tables, and a stand-in for the installation that a source tree lacks."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coma.atomic_io import write_json
from gpu_steps.steps import Step


def save(out: Path, record: dict[str, Any]) -> None:
    """Write OUT/results.json whole or not at all."""
    write_json(out / "results.json", record, indent=1)


def installed(root: Path, work: Path) -> list[str]:
    """A folder for the search path that announces this tree's commands, if it is not installed."""
    try:
        version("coma-dyvit")
        return []
    except PackageNotFoundError:
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    name, number = project["name"], project["version"]
    folder = work / "site" / f"{name.replace('-', '_')}-{number}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()), ""]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    return [str(folder.parent)]


def tables(record: dict[str, Any], steps: Sequence[Step]) -> str:
    """One table of all steps, and one of results for every step that has some."""
    overview, details = [], []
    for step in steps:
        entry = record["steps"].get(step.key)
        if entry is None:
            overview.append({"step": step.key, "what": step.title, "status": "not run"})
            continue
        results = entry["results"]
        wrong = sum(each["ok"] is False for each in results)
        status = entry["status"] + (f", cpu variant: {entry['variant']}" if "variant" in entry else "")
        overview.append(
            {
                "step": step.key,
                "what": step.title,
                "status": status + (f": {entry['error']}" if entry.get("error") else ""),
                "seconds": f"{entry.get('seconds', 0):.0f} of {entry['limit']:.0f}",
                "results": f"{len(results)}" + (f", {wrong} wrong" if wrong else ""),
            }
        )
        if results:
            details.append(f"\n{step.key}: {step.title}\n\n{_table([_row(each) for each in results])}")
    return "\n".join([*details, "", _table(overview)])


def _row(result: dict[str, Any]) -> dict[str, str]:
    ok = {True: "yes", False: "NO", None: ""}[result["ok"]]
    values = {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in result["values"].items()
    }
    return {"result": result["name"], **values, "ok": ok, "note": result["note"]}


def _table(rows: list[dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if any(row.get(name) for row in rows)]
    for last in ("ok", "note"):
        if last in names:
            names.append(names.pop(names.index(last)))
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
