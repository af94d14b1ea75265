"""What the browser does itself: it marks results of other settings, and keeps the state in the address.

A result carries the settings that it was computed with. As long as they differ from those on the page, the
page shows it as being updated. The address has the settings of the last result, but no upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from demo.masking import LARGEST_SEED, METHODS
from demo.models import Models

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Settings of events that only programs of this page call."""

COMPARE = """
(facts, picture, model, method, mask_ratio, seed, resize_mode, runtime, statistics) => {
    const page = document.body.dataset, shown = facts?.settings ?? {};
    const wanted = {
        picture: picture?.path ?? null, model, method, mask_ratio, seed, resize_mode, runtime, statistics,
    };
    const token = page.stale = String(Math.random());
    if (Object.keys(wanted).some(key => wanted[key] !== shown[key])) return;
    const next = new URLSearchParams({model, method, ratio: mask_ratio, seed});
    if (facts.example) next.set('example', facts.example);
    if (facts.views) history.replaceState(history.state, '', '?' + next);
    requestAnimationFrame(() => requestAnimationFrame(async () => {
        const pictures = [...document.querySelectorAll('#result img')];
        await Promise.allSettled(pictures.map(each => each.decode()));
        if (page.stale === token) delete page.stale;
    }));
}
"""
"""Runs when a control or the result changes; `body[data-stale]` marks the result while it is not current."""


MARK = """() => document.addEventListener('input', event => {
    if (event.target.closest('#controls, #more')) document.body.dataset.stale = 'input';
}, true)"""
"""Marks the result in the frame in which a control moves: gradio reports the change a few frames later."""


def restore(query: dict[str, str], models: Models, examples: list[str]) -> dict[str, Any]:
    """Returns the settings of an address by parameter; those that do not exist on this page are left out."""
    found: dict[str, Any] = {}
    if query.get("model") in [each.name for each in models.having("reconstructor")]:
        found["model"] = query["model"]
    if query.get("method") in METHODS:
        found["method"] = query["method"]
    for path in examples:
        if query.get("example") == Path(path).stem:
            found["example"] = path
    for name, kind, low, high in (("ratio", float, 0.05, 0.95), ("seed", int, 0, LARGEST_SEED)):
        try:
            value = kind(query.get(name, "")[:20])
        except ValueError:
            continue
        if low <= value <= high:
            found[name] = value
    return found


def clear_on_change(controls: Sequence[Any], results: Sequence[Any], event: Any) -> None:
    """Removes results, and drops the one that `event` is computing, when a control changes."""
    empty = ["''" if isinstance(each, gr.HTML) else "{}" if isinstance(each, gr.Label) else "null"
             for each in results]  # fmt: skip
    gr.on(
        [each.change for each in controls],
        None,
        None,
        list(results),
        js=f"() => [{', '.join(empty)}]",
        cancels=[event],
        **PRIVATE,
    )


def query_of(request: gr.Request | None) -> dict[str, str]:
    """Returns the query parameters of the page's address."""
    return dict(request.query_params) if request else {}
