"""All undocumented parts of gradio that the demo uses; a test notices when they change."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import gradio as gr
from starlette.requests import cookie_parser
from starlette.types import Scope


def subclass(base: type, **methods: Any) -> Any:
    """Returns a component class that the browser shows like `base` and that leaves files where they are.

    gradio's metaclass would write a stub file beside the module, and its caching would copy what a link
    points to into the storage, so Python's metaclass is called and the caching replaced.
    """
    attributes = {
        "__module__": __name__,
        "is_template": True,  # the browser uses the base's template
        "move_resource_to_block_cache": _keep_path,
        "async_move_resource_to_block_cache": _keep_path_async,
        **methods,
    }
    return ABCMeta.__new__(type(base), f"Checked{base.__name__}", (base,), attributes)


def server_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a method that the browser may call, as gradio's decorator does."""
    function._is_server_fn = True  # type: ignore[attr-defined]
    return function


def component_id(component: Any) -> int:
    """Returns the key of a component in a session's state."""
    return component._id


def is_logged_in(scope: Scope) -> bool:
    """Returns whether gradio would admit this request; without --auth it admits all."""
    app = scope["app"]
    if app.auth is None:
        return True
    cookies = cookie_parser(dict(scope["headers"]).get(b"cookie", b"").decode("latin-1"))
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(cookies.get(name) in app.tokens for name in names)


def clear_file_lists(page: gr.Blocks) -> None:
    """Empties gradio's own lists of files, which grow with every upload and are unused here."""
    for names in page.temp_file_sets:
        names.clear()


def _keep_path(self: Any, path: Any) -> str:
    return str(path)


async def _keep_path_async(self: Any, path: Any) -> str:
    return str(path)
