"""What a request may bring: every argument of every event is checked here, before gradio or a model sees it.

gradio's own inputs copy whatever file a request names, download what is named by an address, and print a
traceback for a number that is none. `CheckedBlocks` lets nothing through but files that were uploaded,
numbers in their range and choices that exist; whatever fails after that ends as one sentence and one line in
the log. Components are subclassed by calling the metaclass of Python instead of gradio's, which would write
a stub file beside this module.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from abc import ABCMeta
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gradio as gr

from coma.errors import ComaError
from demo.storage import GONE, Storage
from demo.upload import MAX_BYTES

EVENT_SECONDS = 120
"""An event that takes longer is given up, and its place in the queue given to the next."""
MOST_LAYERS = 8
_log = logging.getLogger("demo")


def refusal(text: str) -> gr.Error:
    """An error that the page and programs show as it is, without a traceback anywhere."""
    return gr.Error(text, title="That did not work", print_exception=False)


def one_line(error: BaseException) -> str:
    """An unexpected error and where it arose, for the log."""
    at = traceback.extract_tb(error.__traceback__)
    place = f" ({at[-1].filename}:{at[-1].lineno})" if at else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]!r}{place}"


class CheckedBlocks(gr.Blocks):
    """gr.Blocks whose events check their arguments, end in time, and answer every error with a sentence."""

    storage: Storage

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **named: Any) -> dict[str, Any]:
        """Run one event: every request that runs anything comes through here."""
        work = asyncio.ensure_future(super().process_api(block_fn, inputs, *args, **named))
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else may ask
        try:
            await asyncio.wait({work}, timeout=EVENT_SECONDS)
            if not work.done():
                raise refusal(f"This took longer than {EVENT_SECONDS} seconds and was given up.")
            return work.result()
        except gr.Error as error:
            error.print_exception = False
            raise
        except ComaError as error:
            raise refusal(str(error)) from None
        except Exception as error:
            _log.warning("%s failed: %s", getattr(block_fn, "api_name", block_fn), one_line(error))
            raise refusal("The server could not do this; its log says why.") from None
        finally:
            work.cancel()

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Check the arguments of an event, and let gradio prepare them."""
        wanted = block_fn.inputs
        if len(inputs) != len(wanted):
            raise refusal(f"This takes {len(wanted)} values, not {len(inputs)}: see Use via API on the page.")
        current = wanted if state is None else [state.get(each._id, each) for each in wanted]
        checked = [check_value(*pair, self.storage) for pair in zip(current, inputs, strict=True)]
        return await super().preprocess_data(block_fn, checked, state, explicit_call=True)  # checked here


def check_value(component: Any, value: Any, storage: Storage) -> Any:
    """The value, if the component could have sent it; of files, only where they lie.

    Raises:
        gr.Error: it could not.
    """
    if isinstance(component, CheckedImage):
        return _uploaded(value, storage)
    if isinstance(component, CheckedEditor):
        return _drawing(component, value, storage)
    if isinstance(component, gr.Slider | gr.Number):
        low, high = component.minimum, component.maximum
        assert low is not None and high is not None
        if type(value) in (int, float) and low <= value <= high:  # NaN lies nowhere
            return value
        raise refusal(f"{component.label}: give a number from {low} to {high}.")
    if isinstance(component, gr.Radio | gr.Dropdown):
        choices = [choice for _, choice in component.choices]
        if type(value) in (str, int, float) and value in choices:
            return value
        raise refusal(f"{component.label}: choose one of {', '.join(map(str, choices))}.")
    raise TypeError(f"{type(component).__name__} has no check, and so takes no values")


def _uploaded(value: Any, storage: Storage) -> dict[str, Any] | None:
    """A file as gradio takes it, reduced to its path below the storage; nothing else of it is believed."""
    if value is None:
        return None
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise refusal("Please send the picture as a file.")
    if path.lower().startswith(("http:", "https:", "//", "data:")):
        raise refusal("Please send the picture itself, not its address.")
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


class Blobs:
    """Layers of drawings that browsers sent and did not use yet: the last ones, for a while."""

    most = 5 * MAX_BYTES

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[float, dict[int, bytes]]] = OrderedDict()

    def add(self, name: str, layer: int, content: bytes) -> None:
        """Keep one layer; forget the oldest drawings where they become too many."""
        _, layers = self._kept.pop(name, (0, {}))
        layers[layer] = content
        self._kept[name] = time.time(), layers
        while sum(len(each) for _, kept in self._kept.values() for each in kept.values()) > self.most:
            self._kept.popitem(last=False)

    def take(self, name: str) -> list[bytes]:
        """The layers of a drawing, which are forgotten."""
        _, layers = self._kept.pop(name, (0, {}))
        return [layers[number] for number in sorted(layers)]

    def forget_older(self, seconds: float) -> None:
        """Forget what was sent longer ago."""
        for name in [name for name, (at, _) in self._kept.items() if at < time.time() - seconds]:
            del self._kept[name]


BLOBS = Blobs()
"""Layers of all visitors: gradio makes a new editor for each, and browsers choose the names of drawings."""


def _path_of(self: Any, payload: Any) -> str | None:
    """The uploaded file."""
    return payload and payload.path


def _layers_of(self: Any, payload: Any) -> Sequence[str | bytes]:
    """The layers that were painted, as paths of uploaded files or as their contents."""
    if payload is None:
        return []
    return BLOBS.take(payload.id) if payload.id else [layer.path for layer in payload.layers]


def accept_blobs(self: Any, data: Any) -> None:
    """Keep a layer that a browser sends before it asks for anything; background and composite go unused."""
    (_, content), *_ = data.files
    about = data.data
    if about["type"] != "layer":
        return
    number, name = int(about["index"]), about["id"]
    if not 0 <= number < MOST_LAYERS or not isinstance(name, str) or len(content) > MAX_BYTES:
        raise ValueError("no layer of a drawing")
    BLOBS.add(name, number, content)


accept_blobs._is_server_fn = True  # type: ignore[attr-defined]  # what gradio's decorator does


def _same(self: Any, place: Any) -> str:
    """The file where it lies: gradio would copy what a link points to into the storage."""
    return str(place)


async def _same_async(self: Any, place: Any) -> str:
    return str(place)


def _subclass(base: type, **methods: Any) -> Any:
    attributes = {
        "__module__": __name__,
        "is_template": True,  # the browser shows it as it shows its base
        "move_resource_to_block_cache": _same,
        "async_move_resource_to_block_cache": _same_async,
        **methods,
    }
    return ABCMeta.__new__(type(base), f"Checked{base.__name__}", (base,), attributes)


CheckedImage = _subclass(gr.Image, preprocess=_path_of)
"""gr.Image that gives the path of the uploaded file, whatever is in it."""
CheckedEditor = _subclass(gr.ImageEditor, preprocess=_layers_of, accept_blobs=accept_blobs)
"""gr.ImageEditor that gives the layers that were painted."""
