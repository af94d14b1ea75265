"""The last part of the page: how to call it from Python."""

from __future__ import annotations

import gradio as gr

from coma.runtimes.model_spec import GraphKind
from demo.models import Models
from demo.pages.page_state import PRIVATE
from demo.videos import AVAILABLE

ADDRESS = "http://127.0.0.1:7860/"
"""Stands for the address of the page, which only the browser knows."""

FINETUNED: tuple[tuple[GraphKind, str, str], ...] = (
    ("classifier", "classify", ""),
    ("detector", "detect", ", score=0.5"),
    ("segmentor", "segment", ""),
)
"""Kind of the graph, endpoint and more arguments of the fine-tuned models."""


def guide(models: Models, page: gr.Blocks) -> None:
    """Builds the code example for these models, with the address at which the page is open."""
    calls = []
    if models.having("reconstructor"):
        name = models.having("reconstructor")[0].name
        calls.append(
            "*pictures, numbers = page.predict(\n"
            f'    picture=picture, model="{name}", method="mae", mask_ratio=0.75, seed=7, painted=None,\n'
            '    api_name="/reconstruct",\n)\nprint(numbers["psnr_db"], numbers["milliseconds"])'
        )
    for form, endpoint, more in FINETUNED:
        for model in models.having(form)[:1]:
            names = f'picture=picture, model="{model.name}"{more}, api_name="/{endpoint}"'
            calls.append(f"print(page.predict({names}))")
    code = "\n".join(
        [
            "from gradio_client import Client, handle_file",
            "",
            f'page = Client("{ADDRESS}")',
            'picture = handle_file("photograph.jpg")',
            *calls,
        ]
    )
    with gr.Accordion("Use this page from Python", open=False, elem_id="guide"):
        gr.Markdown(
            "Programs can call everything on this page after `pip install gradio_client`. **Use via API** at "
            "the end of the page lists the endpoints and their arguments; most have a default. To choose the "
            'mask, pass `method="brush"` and, as `painted`, `{"background": None, "composite": None, '
            '"layers": [handle_file("strokes.png")]}`: a PNG that is transparent except for the masked parts.'
            + _videos(models)
        )
        shown = gr.Code(code, language="python", label="Python", interactive=False)
    replace = f"code => [code.replace('{ADDRESS}', location.origin + location.pathname)]"
    page.load(None, shown, shown, js=replace, **PRIVATE)


def _videos(models: Models) -> str:
    """Returns the sentence on endpoints for videos; empty if there are none."""
    names = [f"`/{endpoint}_video`" for form, endpoint, _ in FINETUNED if models.having(form)]
    if not names or not AVAILABLE:
        return ""
    return (
        f' With `video=handle_file("clip.mp4")` in place of `picture`, {" and ".join(names)} returns an '
        "animated WebP, a text, and the predictions of every frame."
    )
