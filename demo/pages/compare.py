"""The tab that compares models on the same picture and mask."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr
import numpy as np

from demo.compare_models import COMPARABLE, MOST, comparable, compare_models
from demo.masking import LARGEST_SEED
from demo.models import Model
from demo.pages.page_state import PRIVATE, clear_on_change
from demo.pages.results import large
from demo.reconstruction import Reconstruction
from demo.render import cover, to_rgb
from demo.session import MODEL_EVENT, Session, address


def compare_tab(session: Session, picture: gr.Image) -> None:
    """Builds the tab, which computes on a press of the button."""
    names = [each.name for each in comparable(session.models)]
    with gr.Row(elem_classes="settings"):
        models = gr.CheckboxGroup(names, value=names[:MOST], label="Models, two to four", elem_id="compared")
    with gr.Row(elem_classes="settings", equal_height=True):
        method = gr.Dropdown(
            [(each.title, key) for key, each in COMPARABLE.items()], value="mae", label="Masking method",
            elem_id="compare-method", filterable=False,
        )  # fmt: skip
        ratio = gr.Slider(
            0.05, 0.95, 0.75, step=0.05, label="Mask ratio", elem_id="compare-ratio", buttons=[]
        )
        seed = gr.Number(
            0, label="Mask seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="compare-seed"
        )
        go = gr.Button("Compare models", variant="primary", elem_id="compare-models")
    gr.Checkbox(label="Blink between picture and reconstruction", elem_id="blink")
    result = gr.HTML(elem_id="side-by-side", label="Models")
    facts = gr.JSON(visible=False, label="Scores")

    def compare(
        picture: str | None, models: list[str], method: str, mask_ratio: float, seed: float
    ) -> tuple[str, list[dict[str, Any]]]:
        """Reconstructs a picture with two to four models from the same mask."""
        chosen = [session.models[name] for name in models]
        results = compare_models(
            chosen,
            lambda channels: session.pixels(picture, channels),
            method,
            int(seed),
            float(mask_ratio),
        )
        rows = [_facts(*pair) for pair in zip(chosen, results, strict=True)]
        first = results[0]
        masked = cover(to_rgb(first.shown), first.hidden[0])
        shown = [_figure(session, "Masked", "What the first view sees.", large(masked, blocks=True))]
        for row, each in zip(rows, results, strict=True):
            psnr = "exact" if row["psnr_db"] is None else f"PSNR {row['psnr_db']:.2f} dB"
            text = f"{psnr}, SSIM {row['ssim']}, {row['milliseconds']} ms. {row['about']}."
            shown.append(_figure(session, row["model"], text, to_rgb(each.merged), to_rgb(each.original)))
        return f"<div class='compared'>{''.join(shown)}</div>", rows

    inputs = [picture, models, method, ratio, seed]
    event = go.click(compare, inputs, [result, facts], api_name="compare_models", **MODEL_EVENT)
    clear_on_change(inputs, [result, facts], event)
    method.change(
        lambda method: gr.update(visible=COMPARABLE[method].ratio or "hidden"), method, ratio, **PRIVATE
    )


def _facts(model: Model, result: Reconstruction) -> dict[str, Any]:
    score = result.score
    return {
        "model": model.name,
        "about": model.label,
        "psnr_db": round(score.psnr, 2) if np.isfinite(score.psnr) else None,
        "ssim": None if score.ssim is None else round(score.ssim, 3),
        "milliseconds": round(1000 * result.seconds),
        "hidden": round(float(result.predicted.mean()), 4),
    }


def _figure(
    session: Session, name: str, text: str, picture: np.ndarray, under: np.ndarray | None = None
) -> str:
    """Returns a figure as HTML; `under` shows through while it blinks."""
    title, about = html.escape(name), html.escape(text)
    images = f"<img src='{_address(session, picture)}' alt='{html.escape(name, quote=True)}'>"
    if under is not None:
        images = f"<img src='{_address(session, under)}' alt=''>{images}"
    return f"<figure><div>{images}</div><figcaption><b>{title}</b><br>{about}</figcaption></figure>"


def _address(session: Session, picture: np.ndarray) -> str:
    return address(session.save(large(picture)))
