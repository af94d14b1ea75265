"""The page: one picture on the left, a tab for everything that can be done with it on the right."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import gradio as gr
import numpy as np
from starlette.middleware import Middleware

from coma.errors import ComaError
from coma.masking.patchify import unit_grid
from coma.runtimes.model_spec import GraphKind
from demo.inputs import BLOBS, CheckedBlocks, CheckedImage, one_line
from demo.masking import draw_views
from demo.middleware import Gate
from demo.models import Models
from demo.pages.downstream import TITLES, classify_tab, detect_tab, segment_tab
from demo.pages.guide import guide
from demo.pages.introspection import inside_tab
from demo.pages.reconstruct import example_pictures, reconstruct_tab
from demo.pages.runtimes import runtimes_tab
from demo.reconstruction import rebuild
from demo.render import heat_map
from demo.resize import fit_picture
from demo.session import Site
from demo.storage import Storage
from demo.upload import MAX_BYTES, MAX_PIXELS, TAKES

KEPT_SECONDS, SWEEP_SECONDS = 3300, 60
"""Uploads and results are deleted within the hour, and all of them when the server stops."""
SESSIONS = 256
"""Visitors whose choices are remembered; each costs memory."""
WAITING = 64
"""Requests in the queue; more are turned away with a message."""


def build(models: Models, storage: Storage) -> tuple[CheckedBlocks, dict[str, Any]]:
    """The page for these models, not yet served, and the arguments of its `launch` that protect it.

    Args:
        models: What it may use.
        storage: Where gradio keeps files: its GRADIO_TEMP_DIR.
    """
    _warm(models)
    site = Site(models, storage)
    examples = example_pictures(storage)

    def choose(event: gr.SelectData) -> str:
        return examples[event.index]

    with CheckedBlocks(title="CoMA-DyViT", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_header(models), elem_id="header")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=1, min_width=280, elem_id="left"):
                picture = CheckedImage(
                    value=examples[0],
                    label="Picture",
                    type="filepath",
                    image_mode=None,
                    format="png",
                    sources=["upload", "clipboard", "webcam"],
                    elem_id="picture",
                    height=300,
                    alt_text="The picture that is worked on",
                    buttons=["fullscreen"],
                    placeholder="Drop a picture here, or click to choose one",
                )
                chosen = gr.Gallery(
                    [(path, Path(path).stem.split("_")[0]) for path in examples], label="Examples", columns=4,
                    height="auto", object_fit="cover", allow_preview=False, interactive=False, buttons=[],
                    elem_id="examples", elem_classes="pictures",
                )  # fmt: skip
                chosen.select(choose, None, picture, api_visibility="private")
                gr.HTML(
                    f"<p class='note'>{TAKES}; at most {MAX_BYTES >> 20} MB and {MAX_PIXELS // 10**6} "
                    "megapixels. Pictures stay on this server and are deleted within the hour.</p>"
                )
            with gr.Column(scale=3, min_width=320, elem_id="right"), gr.Tabs(elem_id="tabs"):
                _tabs(site, picture, page)
        guide(models)
    page.storage = storage
    page.queue(max_size=WAITING, default_concurrency_limit=4, api_open=False)  # nobody passes the queue by
    protection = {
        "max_file_size": MAX_BYTES,
        "allowed_paths": [str(storage.folder)],  # read by gradio's copying alone: `Gate` sends files
        "state_session_capacity": SESSIONS,
        "app_kwargs": {
            "middleware": [Middleware(Gate, storage=storage)],
            "lifespan": lambda _: _sweeping(site, page),
        },
    }
    return page, protection


@asynccontextmanager
async def _sweeping(site: Site, page: gr.Blocks) -> AsyncIterator[None]:
    """Deletes what visitors sent and got once it is old enough, as long as the server runs."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await anyio.to_thread.run_sync(site.storage.delete_older, KEPT_SECONDS)
                site.uploads.forget_older(KEPT_SECONDS)
                BLOBS.forget_older(KEPT_SECONDS)
                for names in page.temp_file_sets:  # gradio's own lists of them, which nobody needs
                    names.clear()
            except Exception as error:  # the next round may succeed
                logging.getLogger("demo").warning("old pictures were not deleted: %s", one_line(error))

    task = asyncio.create_task(sweep())
    try:
        yield
    finally:
        task.cancel()


def _warm(models: Models) -> None:
    """Do what the first visitor would have to wait for: late imports, and opening the first model."""
    for model in models.having("reconstructor")[:1]:
        try:
            runtime = model.runtime("reconstructor")
            about, rule = runtime.spec, runtime.spec.preprocessing
            side = rule.size[0] if rule.size else 224
            blank = np.zeros((side, side, len(rule.mean)), np.uint8)
            fitted = fit_picture(blank, side, "crop", rule.mean)
            visible = draw_views("mae", 0, *unit_grid(side, side, about.unit))
            rebuilt = rebuild(runtime, fitted, visible)
        except ComaError:  # it does not open, which is told to whoever asks for it, or takes other sizes
            return
        heat_map(rebuilt.error, rebuilt.predicted)


def _tabs(site: Site, picture: gr.Image, page: gr.Blocks) -> None:
    models = site.models
    if models.having("reconstructor"):
        with gr.Tab("Reconstruct"):
            reconstruct_tab(site, picture, page)
    makers: dict[GraphKind, Any] = {
        "classifier": classify_tab,
        "detector": detect_tab,
        "segmentor": segment_tab,
    }
    for form, maker in makers.items():
        if models.having(form):
            with gr.Tab(TITLES[form]):
                maker(site, picture)
    if models.looked_into():
        with gr.Tab("Look inside"):
            inside_tab(site, picture)
    with gr.Tab("Runtimes"):
        runtimes_tab(site, picture)


def _header(models: Models) -> str:
    import html

    names = ", ".join(f"{html.escape(name)} ({models[name].kind})" for name in models.names)
    return (
        "<h1>CoMA-DyViT</h1><p>Hide parts of a picture, and see what a model that was pre-trained without "
        f"labels makes of the rest. <span class='models'>Here: {names}</span></p>"
    )
