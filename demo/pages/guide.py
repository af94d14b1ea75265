"""The last part of the page: how to call it from Python."""

from __future__ import annotations

import gradio as gr

from coma.runtimes.model_spec import GraphKind
from demo.models import Models


def guide(models: Models) -> None:
    """Builds the code example for these models."""
    calls = []
    if models.having("reconstructor"):
        name = models.having("reconstructor")[0].name
        calls.append(
            "slider, error, views, _, numbers = page.predict(\n"
            f'    picture, "{name}", "coma", 0.75, 7, "crop", "PyTorch", "visible", None,\n'
            '    api_name="/reconstruct",\n)\nprint(numbers["psnr_db"], numbers["milliseconds"])'
        )
    finetuned: tuple[tuple[GraphKind, str, str], ...] = (
        ("classifier", "classify", ""),
        ("detector", "detect", ", 0.5"),
        ("segmentor", "segment", ""),
    )
    for form, endpoint, more in finetuned:
        for model in models.having(form)[:1]:
            calls.append(
                f'print(page.predict(picture, "{model.name}", "PyTorch"{more}, api_name="/{endpoint}"))'
            )
    code = "\n".join(
        [
            "from gradio_client import Client, handle_file",
            "",
            'page = Client("http://127.0.0.1:7860")  # the address of this page',
            'picture = handle_file("photograph.jpg")',
            *calls,
        ]
    )
    with gr.Accordion("Use this page from Python", open=False, elem_id="guide"):
        gr.Markdown(
            "Everything on this page can be called from Python after `pip install gradio_client`. **Use via "
            "API** at the end of the page lists all endpoints and their arguments. To choose "
            'the mask, pass `"brush"` and, for `None`, `{"background": None, "composite": None, "layers": '
            '[handle_file("strokes.png")]}`, where the PNG is transparent except for the masked parts.'
        )
        gr.Code(code, language="python", label="Python", interactive=False)
