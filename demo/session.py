"""State that all tabs share: models, uploaded pictures, and HTML for numbers, tables and notes."""

from __future__ import annotations

import html
import re
import unicodedata
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from coma.errors import BadImage
from demo.models import Models
from demo.nearest import PictureSearch
from demo.storage import Storage
from demo.upload import Uploads

EMPTY = "Choose a picture first: drop one, or click on an example."
MODEL_EVENT = {"concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "always_last"}
"""Settings of every event that runs a model: one at a time, so that the measured time is the model's own; the
others wait in the queue."""


@dataclass
class Session:
    """State of one running page.

    Attributes:
        models: Models that visitors can use.
        storage: Folder of uploads and results.
        search: Pictures that visitors can search in.
        uploads: Reader of uploaded pictures.
    """

    models: Models
    storage: Storage
    search: PictureSearch | None = None
    uploads: Uploads = field(init=False)

    def __post_init__(self) -> None:
        self.uploads = Uploads(self.storage)

    def new_file(self, name: str) -> Path:
        """Returns a path in a new folder of the storage, so that files of one name do not overwrite another.

        Browsers save a file under the last part of its path.

        Raises:
            BadImage: the storage is full.
        """
        self.storage.accept()
        folder = self.storage.folder / uuid.uuid4().hex
        folder.mkdir()
        return folder / name

    def save(self, picture: np.ndarray, name: str = "picture") -> str:
        """Writes a picture, uint8 `[H, W, 3]`, as a PNG that browsers save under `name`; returns its path."""
        path = self.new_file(f"{slug(name)}.png")
        Image.fromarray(picture).save(path, compress_level=3)
        return str(path)

    def save_all(
        self, pictures: Sequence[tuple[np.ndarray, str]], name: str = "picture"
    ) -> list[tuple[str, str]]:
        """Writes pictures under `name` and their captions; returns their paths with the captions."""
        return [(self.save(picture, f"{name} {caption}"), caption) for picture, caption in pictures]

    def pixels(self, picture: str | None, channels: int = 3) -> np.ndarray:
        """Returns the pixels of the chosen picture, `[H, W, channels]`.

        Raises:
            BadImage: no picture is chosen, or it cannot be used.
        """
        if not picture:
            raise BadImage(EMPTY)
        return self.uploads.read(picture, channels)


def slug(text: str) -> str:
    """Returns a text as part of a file name: letters and digits of any script, joined by hyphens."""
    name = "-".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text.lower())))
    return name.encode()[:100].decode(errors="ignore") or "picture"


def cards(rows: Sequence[tuple[str, str, str]]) -> str:
    """Returns HTML cards, each with a name, a value in large type, and an explanation on hover."""
    items = "".join(
        f"<div class='card' title='{html.escape(note, quote=True)}'><dt>{html.escape(name)}</dt>"
        f"<dd>{html.escape(value)}</dd></div>"
        for name, value, note in rows
    )
    return f"<dl class='cards'>{items}</dl>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], off: Sequence[int] = (), caption: str = ""
) -> str:
    """Returns an HTML table of plain text; the rows numbered in `off` are greyed out."""
    top = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in head)
    body = ""
    for number, row in enumerate(rows):
        cells = [html.escape(cell) for cell in row]
        kind = " class='off' aria-disabled='true'" if number in off else ""
        rest = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        if len(cells) == 2 < len(head):
            rest = f"<td colspan='{len(head) - 1}'>{cells[1]}</td>"
        body += f"<tr{kind}><th scope='row'>{cells[0]}</th>{rest}</tr>"
    text = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{html.escape(caption, quote=True)}'>"
        f"<table>{text}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def address(path: str) -> str:
    """Returns the address of a file in the storage, for an attribute of HTML."""
    return f"gradio_api/file={html.escape(path, quote=True)}"


def note(text: str) -> str:
    """Returns a line of small print as HTML."""
    return f"<p class='note'>{html.escape(text)}</p>"


def heading(text: str) -> str:
    """Returns a heading above pictures as HTML."""
    return f"<p class='heading'>{html.escape(text)}</p>"
