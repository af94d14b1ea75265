"""Checks every argument of every event before gradio or a model sees it.

gradio's own inputs copy any file that a request names, download URLs, and print a traceback for a malformed
number. `CheckedBlocks` admits only uploaded files, numbers in their range and existing choices; any later
error becomes one sentence for the visitor and one line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gradio as gr

from coma.errors import ComaError
from demo.gradio_internals import component_id, server_function, subclass
from demo.storage import GONE, Storage
from demo.upload import MAX_BYTES

EVENT_SECONDS = 120
"""Seconds after which an event is cancelled and the next one in the queue starts."""
MOST_LAYERS = 8
_log = logging.getLogger("demo")


def refusal(text: str) -> gr.Error:
    """Returns an error that the page and clients show as it is, without a traceback."""
    return gr.Error(text, title="That did not work", print_exception=False)


def one_line(error: BaseException) -> str:
    """Returns an unexpected error and its place in the code, for the log."""
    at = traceback.extract_tb(error.__traceback__)
    place = f" ({at[-1].filename}:{at[-1].lineno})" if at else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]!r}{place}"


class CheckedBlocks(gr.Blocks):
    """gr.Blocks that checks the arguments of events, limits their time and words their errors."""

    storage: Storage

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **named: Any) -> dict[str, Any]:
        """Runs one event; every request that runs anything passes through here."""
        work = asyncio.ensure_future(super().process_api(block_fn, inputs, *args, **named))
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieves its error
        try:
            await asyncio.wait({work}, timeout=EVENT_SECONDS)
            if not work.done():
                raise refusal(f"This took longer than {EVENT_SECONDS} seconds and was cancelled.")
            return work.result()
        except gr.Error as error:
            error.print_exception = False
            raise
        except ComaError as error:
            raise refusal(str(error)) from None
        except Exception as error:
            _log.warning("%s failed: %s", getattr(block_fn, "api_name", block_fn), one_line(error))
            raise refusal("The server failed; its log says why.") from None
        finally:
            work.cancel()

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Checks the arguments of an event before gradio prepares them."""
        if block_fn.fn is None:
            raise refusal("This runs in the browser alone.")
        wanted = block_fn.inputs
        if len(inputs) != len(wanted):
            raise refusal(f"This takes {len(wanted)} values, not {len(inputs)}: see Use via API on the page.")
        current = wanted if state is None else [state.get(component_id(each), each) for each in wanted]
        checked = [check_value(*pair, self.storage) for pair in zip(current, inputs, strict=True)]
        return await super().preprocess_data(block_fn, checked, state, explicit_call=True)  # checked here


def check_value(component: Any, value: Any, storage: Storage) -> Any:
    """Returns the value if the component can send it; files are reduced to their paths.

    Raises:
        gr.Error: the component cannot send this value.
    """
    if isinstance(component, CheckedImage | CheckedVideo):
        return _uploaded(value, storage)
    if isinstance(component, CheckedEditor):
        return _drawing(component, value, storage)
    if isinstance(component, gr.Slider | gr.Number):
        low, high = component.minimum, component.maximum
        assert low is not None and high is not None
        if type(value) in (int, float) and low <= value <= high:  # NaN is in no range
            return value
        raise refusal(f"{component.label}: give a number from {low} to {high}.")
    if isinstance(component, gr.Radio | gr.Dropdown):
        choices = [choice for _, choice in component.choices]
        if type(value) in (str, int, float) and value in choices:
            return value
        raise refusal(f"{component.label}: choose one of {', '.join(map(str, choices))}.")
    if isinstance(component, gr.CheckboxGroup):
        choices = [choice for _, choice in component.choices]
        if isinstance(value, list) and all(isinstance(each, str) and each in choices for each in value):
            return list(dict.fromkeys(value))
        raise refusal(f"{component.label}: give a list of {', '.join(map(str, choices))}.")
    raise TypeError(f"{type(component).__name__} has no check, and so takes no values")


def _uploaded(value: Any, storage: Storage) -> dict[str, Any] | None:
    """Returns a file for gradio with only its path, which must lie below the storage."""
    if value is None:
        return None
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise refusal("Please upload a file.")
    if path.lower().startswith(("http:", "https:", "//", "data:")):
        raise refusal("Please upload the file itself, not its address.")
    if not storage.contains(path):
        raise refusal(GONE)
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def _drawing(component: Any, value: Any, storage: Storage) -> dict[str, Any] | None:
    if value is None:
        return None
    known = isinstance(value, dict) and bool(value.keys() & {"layers", "id"})
    layers, name = (value.get("layers") or [], value.get("id")) if known else (None, None)
    if not isinstance(layers, list) or len(layers) > MOST_LAYERS or not isinstance(name, str | None):
        raise refusal(
            f"{component.label}: send background, composite and at most {MOST_LAYERS} layers, each a file."
        )
    return {
        "background": _uploaded(value.get("background"), storage),
        "composite": _uploaded(value.get("composite"), storage),
        "layers": [_uploaded(each, storage) for each in layers if each is not None],
        "id": name,
    }


_LONGEST_NAME = 100
"""Characters of a drawing's name, which the browser chooses."""


class Blobs:
    """Painted layers that browsers uploaded and no event has used yet."""

    most = 5 * MAX_BYTES
    drawings = 256

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[float, dict[int, bytes]]] = OrderedDict()

    def add(self, name: str, layer: int, content: bytes) -> None:
        """Keeps one layer; drops the oldest beyond `drawings` or `most` bytes."""
        _, layers = self._kept.pop(name, (0, {}))
        layers[layer] = content
        self._kept[name] = time.time(), layers
        while len(self._kept) > self.drawings or self._bytes() > self.most:
            self._kept.popitem(last=False)

    def take(self, name: str) -> list[bytes]:
        """Removes and returns the layers of a drawing."""
        _, layers = self._kept.pop(name, (0, {}))
        return [layers[number] for number in sorted(layers)]

    def _bytes(self) -> int:
        return sum(len(each) for _, kept in self._kept.values() for each in kept.values())

    def forget_older(self, seconds: float) -> None:
        """Drops layers that were uploaded longer ago."""
        for name in [name for name, (at, _) in self._kept.items() if at < time.time() - seconds]:
            del self._kept[name]


BLOBS = Blobs()
"""Layers of all visitors: gradio makes an editor per visitor, and browsers choose the names of drawings."""


def _path_of(self: Any, payload: Any) -> str | None:
    """Returns the path of the uploaded file."""
    return payload and payload.path


def _layers_of(self: Any, payload: Any) -> Sequence[str | bytes]:
    """Returns the painted layers, as paths of uploaded files or as their contents."""
    if payload is None:
        return []
    return BLOBS.take(payload.id) if payload.id else [layer.path for layer in payload.layers]


@server_function
def accept_blobs(self: Any, data: Any) -> None:
    """Keeps a layer that a browser uploads before its event; background and composite are unused."""
    (_, content), *_ = data.files
    about = data.data
    if about["type"] != "layer":
        return
    number, name = int(about["index"]), about["id"]
    named = isinstance(name, str) and len(name) <= _LONGEST_NAME
    if not 0 <= number < MOST_LAYERS or not named or len(content) > MAX_BYTES:
        raise ValueError("no layer of a drawing")
    BLOBS.add(name, number, content)


CheckedImage = subclass(gr.Image, preprocess=_path_of)
"""gr.Image that returns the path of the uploaded file without decoding it."""
CheckedVideo = subclass(gr.Video, preprocess=_path_of)
"""gr.Video that does so; gradio's own runs FFmpeg on the file."""
CheckedEditor = subclass(gr.ImageEditor, preprocess=_layers_of, accept_blobs=accept_blobs)
"""gr.ImageEditor that returns the painted layers."""
