"""Results of a search: a table for the terminal, CSV and JSON files, and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from coma.atomic_io import write_json, write_text
from coma.contact_sheet import write_png
from coma.messages import printable

_SHOWN = 40
"""Rows of a table on the terminal; the files hold all."""


@dataclass(frozen=True)
class Result:
    """The result of one question.

    Attributes:
        name: Name of its files, such as `nearest`.
        title: Headline of the table and of the picture.
        rows: A row for every image: column and value.
        draw: Returns its picture; called where there are rows and a folder to write it to.
    """

    name: str
    title: str
    rows: Sequence[dict[str, Any]]
    draw: Callable[[], Image.Image]

    def print_table(self) -> None:
        """Prints the first rows."""
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text

        console = Console()
        console.print(Text(self.title))
        if not self.rows or self.name == "map":  # places mean nothing without the picture
            return
        table = Table(
            *(
                Column(name, overflow="fold", justify="left" if isinstance(value, str) else "right")
                for name, value in self.rows[0].items()
            )
        )
        for row in self.rows[:_SHOWN]:
            table.add_row(*(Text(_cell(value)) for value in row.values()))
        console.print(table)
        if len(self.rows) > _SHOWN:
            console.print(Text(f"and {len(self.rows) - _SHOWN} more rows; --out FOLDER writes all of them"))

    def write(self, folder: Path) -> list[str]:
        """Writes `NAME.csv`, `NAME.json` and, if there are rows, `NAME.png`; returns the names."""
        text = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        write_text(folder / f"{self.name}.csv", text.getvalue())
        write_json(folder / f"{self.name}.json", {"title": self.title, "rows": list(self.rows)}, indent=1)
        if self.rows:
            write_png(folder / f"{self.name}.png", self.draw())
        return [f"{self.name}.{kind}" for kind in ("csv", "json", *(["png"] if self.rows else []))]


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))
