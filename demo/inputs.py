"""Inputs for strangers: they hand over what was uploaded as it is, and fetch nothing from elsewhere.

gradio's own image inputs decode whatever is sent before any of our code sees it, and download what is named
by an address. These are subclasses that do neither. They are made by calling the metaclass of Python instead
of gradio's, which would write a stub file beside this module.
"""

from __future__ import annotations

import tempfile
from abc import ABCMeta
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from demo.upload import MAX_BYTES, read_picture
from pretrain.errors import BadImage


def _refuse(text: str) -> gr.Error:
    return gr.Error(text, title="That did not work", print_exception=False)


def _path_of(self: Any, payload: Any) -> str | None:
    """The uploaded file."""
    if payload is None or isinstance(payload, str):
        return payload
    if not getattr(payload, "path", None):
        raise _refuse("Please send the picture as a file.")
    return payload.path


def _strokes_of(self: Any, payload: Any) -> np.ndarray | None:
    """What was painted, bool `[H, W]`, over all layers; None where there is no layer."""
    if payload is None:
        return None
    held = self.blob_storage.pop(payload.id, None) if payload.id else payload
    layers = [each for each in (held.layers if held else None) or [] if each is not None]
    painted: np.ndarray | None = None
    for layer in layers[:4]:
        try:
            strokes = read_strokes(layer if isinstance(layer, bytes | bytearray) else Path(layer.path))
        except BadImage as error:
            raise _refuse(str(error)) from None
        if painted is not None and painted.shape != strokes.shape:
            raise _refuse("The painted layers differ in size.")
        painted = strokes if painted is None else painted | strokes
    return painted


def read_strokes(layer: bytes | bytearray | Path) -> np.ndarray:
    """Painted pixels of a layer, bool `[H, W]`: what is not transparent or, without transparency, not black.

    Raises:
        BadImage: as for pictures.
    """
    if isinstance(layer, Path):
        pixels, alpha = read_picture(layer)
    else:
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            file.write(layer)
            file.flush()
            pixels, alpha = read_picture(Path(file.name))
    return pixels[..., -1] > 0 if alpha else pixels.max(axis=-1) > 0


class Blobs(OrderedDict[str, Any]):
    """What browsers sent of drawings that were not used yet: the last few, and none that is too large."""

    most = 64

    def __setitem__(self, key: str, value: Any) -> None:
        """Keep one; forget the oldest."""
        parts = [value.background, value.composite, *value.layers]
        if sum(len(part) for part in parts if part) > MAX_BYTES or len(value.layers) > 8:
            raise _refuse("This drawing is too large.")
        super().__setitem__(key, value)
        while len(self) > self.most:
            self.popitem(last=False)


def _local(place: Any) -> Any:
    if str(place).lower().startswith(("http:", "https:", "//", "data:")):
        raise _refuse("Please send the picture itself, not its address.")
    return place


def _subclass(base: type, **methods: Any) -> Any:
    async def move_async(self: Any, place: Any) -> Any:
        return await base.async_move_resource_to_block_cache(self, _local(place))  # type: ignore[attr-defined]

    def move(self: Any, place: Any) -> Any:
        return base.move_resource_to_block_cache(self, _local(place))  # type: ignore[attr-defined]

    attributes = {
        "__module__": __name__,
        "is_template": True,  # the browser shows it as it shows its base
        "async_move_resource_to_block_cache": move_async,
        "move_resource_to_block_cache": move,
        **methods,
    }
    return ABCMeta.__new__(type(base), f"Checked{base.__name__}", (base,), attributes)


def _kept(self: Any) -> Blobs:
    return self.__dict__.setdefault("_blobs", Blobs())


CheckedImage = _subclass(gr.Image, preprocess=_path_of)
"""gr.Image that gives the path of the uploaded file, whatever is in it."""
CheckedEditor = _subclass(
    gr.ImageEditor, preprocess=_strokes_of, blob_storage=property(_kept, lambda self, _: None)
)
"""gr.ImageEditor that gives what was painted."""
