"""What every tab shares: the models, the pictures that were sent, words for errors, tables."""

from __future__ import annotations

import html
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from coma.errors import BadImage
from demo.models import Models
from demo.storage import Storage
from demo.upload import Uploads

MODEL_EVENT = {"concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "always_last"}
"""Settings of every event that runs a model: one at a time, so that a time that is shown is the model's own;
the others wait in the queue, which gives the turn to the next whatever becomes of the one before."""


@dataclass
class Session:
    """One running page.

    Attributes:
        models: Those that were named at the start.
        storage: Where uploads and results lie for a while.
        uploads: Reads what was sent.
    """

    models: Models
    storage: Storage
    uploads: Uploads = field(init=False)

    def __post_init__(self) -> None:
        self.uploads = Uploads(self.storage)

    def save(self, picture: np.ndarray) -> str:
        """Write uint8 `[H, W, 3]` as a PNG of its own name.

        gradio would name it by its content, and write it again while another visitor reads it.
        """
        path = self.storage.folder / f"{uuid.uuid4().hex}.png"
        Image.fromarray(picture).save(path, compress_level=3)
        return str(path)

    def save_all(self, pictures: Sequence[tuple[np.ndarray, str]]) -> list[tuple[str, str]]:
        """Likewise, with captions."""
        return [(self.save(picture), caption) for picture, caption in pictures]

    def pixels(self, picture: str | None, channels: int = 3) -> np.ndarray:
        """The picture that the page shows, `[H, W, channels]`.

        Raises:
            BadImage: there is none, or it cannot be used.
        """
        if not picture:
            raise BadImage("Choose a picture first: drop one, or click on an example.")
        return self.uploads.read(picture, channels)


def cards(rows: Sequence[tuple[str, str, str]]) -> str:
    """Numbers in large type: name, value, and what it means."""
    items = "".join(
        f"<div class='card' title='{html.escape(note, quote=True)}'><dt>{html.escape(name)}</dt>"
        f"<dd>{html.escape(value)}</dd></div>"
        for name, value, note in rows
    )
    return f"<dl class='cards'>{items}</dl>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], off: Sequence[int] = (), caption: str = ""
) -> str:
    """An HTML table; the rows numbered in `off` are greyed out. Cells are plain text."""
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


def note(text: str) -> str:
    """A line of small print."""
    return f"<p class='note'>{html.escape(text)}</p>"


def heading(text: str) -> str:
    """A line above pictures."""
    return f"<p class='heading'>{html.escape(text)}</p>"
