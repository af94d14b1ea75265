"""What the browser does itself: it marks results of other settings, and keeps the state in the address.

A result carries the settings that it was computed with. As long as they differ from those on the page, the
page shows it as being updated. The address has the settings of the last result, but no upload.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from demo.masking import LARGEST_SEED, METHODS
from demo.models import Models

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Settings of events that only programs of this page call."""

_WATCHED = {"stale": "#controls, #more", "stalePlace": "#place-controls, #explore-controls",
            "staleFeatures": "#explore-controls"}  # fmt: skip
"""The mark of a result in `document.body.dataset`, and where the controls lie that it follows."""
_CLICKED = {"stalePlace": "#place img"}
"""The mark of a result, and the picture in which a click chooses one of its settings."""

_SETTLE = """
(facts, NAMES) => {
    const page = document.body.dataset, shown = facts?.settings ?? {}, wanted = {NAMES};
    const token = page.FLAG = String(Math.random());
    const plain = value => value?.path ?? value ?? null;
    if (Object.keys(wanted).some(key => plain(wanted[key]) !== shown[key])) return;
    DONE
    requestAnimationFrame(() => requestAnimationFrame(async () => {
        const pictures = [...document.querySelectorAll('RESULT img')].filter(
            each => each.complete || each.loading !== 'lazy');  // others load when they are scrolled to
        await Promise.allSettled(pictures.map(each => each.decode()));
        if (page.FLAG === token) delete page.FLAG;
    }));
}
"""
ADDRESS = """
    const next = new URLSearchParams({model, method, ratio: mask_ratio, seed});
    if (facts.example) next.set('example', facts.example);
    if (facts.views) history.replaceState(history.state, '', '?' + next);
"""
"""Puts the settings of a reconstruction into the address."""

MARK = f"""() => {{
    const mark = what => event => {{
        for (const [flag, where] of Object.entries(what))
            if (event.target.closest(where)) document.body.dataset[flag] = event.type;
    }};
    document.addEventListener('input', mark({json.dumps(_WATCHED)}), true);
    document.addEventListener('click', mark({json.dumps(_CLICKED)}), true);
}}"""
"""Marks the result in the frame in which a control moves: gradio reports the change a few frames later."""


def mark_until_current(
    facts: gr.JSON, controls: dict[str, Any], flag: str, result: str, done: str = ""
) -> dict[str, Any]:
    """Marks a result on the page for as long as it is not that of its controls.

    Args:
        facts: JSON of the result, with the `settings` that it was computed with.
        controls: The controls, by their names in `settings`.
        flag: Mark in `document.body.dataset`.
        result: CSS selector of the place of the result, whose pictures are decoded before the mark goes.
        done: Script that runs when the result is current; it knows `facts` and the controls by their names.

    Returns:
        The event that looks whether the result is current, for more triggers.
    """
    script = _SETTLE.replace("NAMES", ", ".join(controls)).replace("FLAG", flag)
    script = script.replace("RESULT", result).replace("DONE", done)
    changes = [each.change for each in (facts, *controls.values())]
    event = {"fn": None, "inputs": [facts, *controls.values()], "js": script, **PRIVATE}
    gr.on(changes, **event)
    return event


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
