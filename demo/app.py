"""Builds the page: the picture on the left, one tab per task on the right."""

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
from demo.compare_models import FEWEST, comparable
from demo.examples import example_pictures
from demo.gradio_internals import clear_file_lists
from demo.inputs import BLOBS, CheckedBlocks, CheckedImage, one_line
from demo.masking import sample_views
from demo.middleware import RequestGuard
from demo.models import Models
from demo.nearest import PictureSearch
from demo.pages import webcam
from demo.pages.compare import compare_tab
from demo.pages.downstream import TITLES, classify_tab, detect_tab, segment_tab
from demo.pages.explore import explore_tab
from demo.pages.guide import guide
from demo.pages.nearest import nearest_tab
from demo.pages.page_state import PRIVATE
from demo.pages.reconstruct import reconstruct_tab
from demo.pages.runtimes import runtimes_tab
from demo.reconstruction import reconstruct
from demo.render import heat_map
from demo.resize import resize_picture
from demo.session import Session
from demo.storage import Storage
from demo.upload import ACCEPTED, MAX_BYTES, MAX_PIXELS

KEPT_SECONDS, SWEEP_SECONDS = 3300, 60
"""Age at which uploads and results are deleted, and seconds between two sweeps."""
SESSIONS = 256
"""Visitors whose state is kept in memory."""
WAITING = 64
"""Longest queue; requests beyond it are refused with a message."""
HEADER = (
    "<h1>CoMA-DyViT</h1><p>Hide parts of a picture and see what a model that was pre-trained without labels "
    "makes of the rest.</p>"
)
RULES = (
    f"<p class='note'>{ACCEPTED}; at most {MAX_BYTES >> 20} MB and {MAX_PIXELS // 10**6} megapixels. "
    "Uploads stay on this server and are deleted within the hour.</p>"
)


def build_page(
    models: Models, storage: Storage, search: PictureSearch | None = None
) -> tuple[CheckedBlocks, dict[str, Any]]:
    """Returns the page, not yet served, and the arguments of its `launch` that protect the server.

    Args:
        models: Models that visitors can use.
        storage: Folder of all files, which is also gradio's GRADIO_TEMP_DIR.
        search: Pictures that visitors can search in.
    """
    _warm_up(models)
    session = Session(models, storage, search)
    examples = example_pictures(storage)
    names = [Path(path).stem for path in examples]

    def choose(event: gr.SelectData) -> str:
        return examples[event.index]

    with CheckedBlocks(title="CoMA-DyViT", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(HEADER, elem_id="header", padding=False)
        with gr.Row(elem_id="main"):
            with gr.Column(scale=1, min_width=260, elem_id="left"):
                picture = CheckedImage(
                    value=examples[0],
                    label="Picture",
                    type="filepath",
                    image_mode=None,
                    format="png",
                    sources=["upload", "clipboard", "webcam"],
                    webcam_options=webcam.OPTIONS,
                    elem_id="picture",
                    height=240,
                    alt_text="The input picture",
                    buttons=["fullscreen"],
                    placeholder="Drop a picture here, or click to choose one",
                )
                chosen = gr.Gallery(
                    list(zip(examples, names, strict=True)), label="Examples", columns=4, show_label=False,
                    height="auto", object_fit="cover", allow_preview=False, interactive=False, buttons=[],
                    elem_id="examples", elem_classes="pictures",
                )  # fmt: skip
                chosen.select(choose, None, picture, api_visibility="private", show_progress="hidden")
                about = gr.HTML(elem_id="about", padding=False, label="About the picture")
                gr.HTML(RULES, elem_id="rules", padding=False)
            with gr.Column(scale=3, min_width=320, elem_id="right"), gr.Tabs(elem_id="tabs"):
                _tabs(session, picture, about, page, examples)
        guide(models, page)
        page.load(None, js=webcam.SCRIPT, **PRIVATE)
    page.storage = storage
    page.queue(max_size=WAITING, default_concurrency_limit=4, api_open=False)
    protection = {
        "max_file_size": MAX_BYTES,
        "allowed_paths": [str(storage.folder)],  # for gradio's own copies; `RequestGuard` serves files
        "state_session_capacity": SESSIONS,
        "app_kwargs": {
            "middleware": [Middleware(RequestGuard, storage=storage)],
            "lifespan": lambda _: _sweeping(session, page),
        },
    }
    return page, protection


@asynccontextmanager
async def _sweeping(session: Session, page: gr.Blocks) -> AsyncIterator[None]:
    """Deletes old uploads and results for as long as the server runs."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await anyio.to_thread.run_sync(session.storage.delete_older, KEPT_SECONDS)
                session.uploads.forget_older(KEPT_SECONDS)
                BLOBS.forget_older(KEPT_SECONDS)
                clear_file_lists(page)
            except Exception as error:  # the next sweep may succeed
                logging.getLogger("demo").warning("old files were not deleted: %s", one_line(error))

    task = asyncio.create_task(sweep())
    try:
        yield
    finally:
        task.cancel()


def _warm_up(models: Models) -> None:
    """Imports late modules and opens the first model, so that the first visitor does not wait."""
    for model in models.having("reconstructor")[:1]:
        try:
            runtime = model.runtime("reconstructor")
            about, rule = runtime.spec, runtime.spec.preprocessing
            size = rule.size or (224, 224)
            blank = np.zeros((*size, len(rule.mean)), np.uint8)
            resized = resize_picture(blank, size, "crop", rule.mean)
            visible = sample_views("mae", 0, *unit_grid(*size, about.unit))
            rebuilt = reconstruct(runtime, resized, visible)
        except ComaError:  # visitors who choose this model see the error
            return
        heat_map(rebuilt.error, rebuilt.predicted)


def _tabs(session: Session, picture: gr.Image, about: gr.HTML, page: gr.Blocks, examples: list[str]) -> None:
    models = session.models
    if models.having("reconstructor"):
        with gr.Tab("Reconstruct"):
            reconstruct_tab(session, picture, about, page, examples)
    if len(comparable(models)) >= FEWEST:
        with gr.Tab("Compare"):
            compare_tab(session, picture)
    if models.with_encoder():
        with gr.Tab("Explore") as tab:
            explore_tab(session, picture, tab, examples)
    if session.search:
        with gr.Tab("Nearest"):
            nearest_tab(session, picture, session.search)
    makers: dict[GraphKind, Any] = {
        "classifier": classify_tab,
        "detector": detect_tab,
        "segmentor": segment_tab,
    }
    for form, maker in makers.items():
        if models.having(form):
            with gr.Tab(TITLES[form]):
                maker(session, picture)
    with gr.Tab("Runtimes"):
        runtimes_tab(session, picture)
