"""What every tab shares: the models, the pictures that were sent, guarded inputs, and words for errors."""

from __future__ import annotations

import functools
import html
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import gradio as gr
import numpy as np

from demo.models import Models
from demo.upload import MAX_BYTES, Uploads, read_picture
from pretrain.errors import BadImage, ComaError

F = TypeVar("F", bound=Callable[..., Any])
MODEL_WORK = {"concurrency_id": "model", "concurrency_limit": 2, "trigger_mode": "always_last"}
"""Settings of every event that runs a model: two at a time, the others wait in the queue."""


@dataclass
class Site:
    """One running page.

    Attributes:
        models: Those that were named at the start.
        uploads: Reads what was sent.
        turn: One model runs at a time, so that a time that is shown is the model's own.
    """

    models: Models
    uploads: Uploads = field(default_factory=Uploads)
    turn: Any = field(default_factory=threading.Lock)

    def pixels(self, picture: str | None, channels: int = 3) -> np.ndarray:
        """The picture that the page shows, `[H, W, channels]`.

        Raises:
            BadImage: there is none, or it cannot be used.
        """
        if not picture:
            raise BadImage("Choose a picture first: drop one, or click on an example.")
        return self.uploads.read(Path(picture), channels)


def friendly(function: F) -> F:
    """Show errors that are the user's as one sentence on the page, without a traceback anywhere."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except ComaError as error:
            raise gr.Error(str(error), title="That did not work", print_exception=False) from None

    return cast(F, wrapped)


def guard(component: Any) -> Any:
    """Let an image input hand over the uploaded file as it is, and fetch nothing from elsewhere.

    gradio's own inputs decode whatever is sent before any of our code sees it, and download what is named
    by an address. The instance's two methods are replaced, for a subclass of a component is written into a
    stub beside its module.
    """

    def preprocess(payload: Any) -> Any:
        if payload is None or isinstance(payload, str):
            return payload
        path = getattr(payload, "path", None)
        if not path:
            raise gr.Error("Please send the picture as a file.", print_exception=False)
        return path

    component.preprocess = preprocess
    _stay_here(component)
    return component


def guard_editor(editor: Any) -> Any:
    """Likewise for the brush: its layers become what was painted, bool `[H, W]`, or None."""

    def preprocess(payload: Any) -> np.ndarray | None:
        if payload is None:
            return None
        held = editor.blob_storage.pop(payload.id, None) if payload.id else payload
        layers = [each for each in (held.layers if held else None) or [] if each is not None]
        painted: np.ndarray | None = None
        for layer in layers[:4]:
            strokes = friendly(_strokes)(layer)
            if painted is not None and painted.shape != strokes.shape:
                raise gr.Error("The painted layers differ in size.", print_exception=False)
            painted = strokes if painted is None else painted | strokes
        return painted

    editor.preprocess = preprocess
    editor.blob_storage = Blobs()
    _stay_here(editor)
    return editor


def _strokes(layer: Any) -> np.ndarray:
    """Painted pixels of a layer, from a file or from what the browser sent."""
    import tempfile

    if isinstance(layer, bytes | bytearray | memoryview):
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            file.write(layer)
            file.flush()
            pixels, alpha = read_picture(Path(file.name))
    else:
        pixels, alpha = read_picture(Path(layer.path))
    return pixels[..., -1] > 0 if alpha else pixels.max(axis=-1) > 0


class Blobs(OrderedDict[str, Any]):
    """What browsers sent of unfinished drawings: the last few, and none that is too large."""

    most = 64

    def __setitem__(self, key: str, value: Any) -> None:
        """Keep one; forget the oldest."""
        parts = [value.background, value.composite, *value.layers]
        if sum(len(part) for part in parts if part) > 3 * MAX_BYTES or len(value.layers) > 8:
            raise gr.Error("This drawing is too large.", print_exception=False)
        super().__setitem__(key, value)
        while len(self) > self.most:
            self.popitem(last=False)


def _stay_here(component: Any) -> None:
    async_before = component.async_move_resource_to_block_cache
    before = component.move_resource_to_block_cache

    def check(place: Any) -> None:
        if str(place).lower().startswith(("http:", "https:", "//", "data:")):
            raise gr.Error("Please send the picture itself, not its address.", print_exception=False)

    async def move_async(place: Any) -> Any:
        check(place)
        return await async_before(place)

    def move(place: Any) -> Any:
        check(place)
        return before(place)

    component.async_move_resource_to_block_cache = move_async
    component.move_resource_to_block_cache = move


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
