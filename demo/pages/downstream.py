"""The tabs of fine-tuned models: classify, detect, segment."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr
import numpy as np

from coma.errors import BadInput
from coma.runtimes.model_spec import GraphKind
from demo.models import Model
from demo.pages.page_state import clear_on_change
from demo.predict import classify, detect, draw_classes, draw_objects, segment, shares
from demo.session import MODEL_EVENT, Session, note, table

TITLES: dict[GraphKind, str] = {"classifier": "Classify", "detector": "Detect", "segmentor": "Segment"}


def classify_tab(session: Session, picture: gr.Image) -> None:
    """Builds the tab that shows the five most probable classes."""
    model, runtime, go = _pickers(session, "classifier", "Classify")
    bars = gr.Label(label="Top 5", num_top_classes=5, elem_id="top5")

    def run(picture: str | None, model: str, runtime: str) -> dict[str, float]:
        """Returns the most probable classes of a picture."""
        chosen, opened = _open(session, model, runtime, "classifier")
        return classify(opened, _pixels(session, chosen, picture), chosen.class_names())

    inputs = [picture, model, runtime]
    event = go.click(run, inputs, bars, api_name="classify", **MODEL_EVENT)
    clear_on_change(inputs, [bars], event)


def detect_tab(session: Session, picture: gr.Image) -> None:
    """Builds the tab that shows detected objects."""
    model, runtime, go = _pickers(session, "detector", "Detect")
    score = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Score threshold", elem_id="score")
    drawn = gr.Image(
        label="Detected objects", format="png", interactive=False, elem_id="detections",
        buttons=["download", "fullscreen"], alt_text="The picture with boxes around the detected objects",
    )  # fmt: skip
    rows = gr.HTML(elem_id="objects")
    plain = gr.JSON(visible=False, label="Objects")

    def run(picture: str | None, model: str, runtime: str, score: float) -> tuple[str, str, list[Any]]:
        """Returns the objects in a picture with at least this score."""
        chosen, opened = _open(session, model, runtime, "detector")
        pixels = _pixels(session, chosen, picture)
        found = detect(opened, pixels, chosen.class_names(), float(score))
        listed = [
            {"class": each.name, "score": round(each.score, 4), "box": [round(v, 1) for v in each.box]}
            for each in found
        ]
        cells = [
            [each.name, f"{each.score:.2f}", " ".join(f"{v:.0f}" for v in each.box)] for each in found[:50]
        ]
        text = table(("class", "score", "x1 y1 x2 y2, pixels"), cells, caption=f"{len(found)} objects")
        empty = note("No object reaches this score; lower the threshold.")
        drawing = session.save(draw_objects(pixels, found, chosen.palette()))
        return drawing, text if found else empty, listed

    inputs, outputs = [picture, model, runtime, score], [drawn, rows, plain]
    event = gr.on([go.click, score.release], run, inputs, outputs, api_name="detect", **MODEL_EVENT)
    clear_on_change(inputs, outputs, event)


def segment_tab(session: Session, picture: gr.Image) -> None:
    """Builds the tab that shows the class of every pixel."""
    model, runtime, go = _pickers(session, "segmentor", "Segment")
    drawn = gr.ImageSlider(
        label="Picture | classes (drag the line)", format="png", interactive=False, elem_id="classes",
        buttons=["download", "fullscreen"], max_height=620, slider_position=35,
    )  # fmt: skip
    legend = gr.HTML(elem_id="legend")
    plain = gr.JSON(visible=False, label="Class shares")

    def run(picture: str | None, model: str, runtime: str) -> tuple[Any, str, dict[str, float]]:
        """Returns the class of every pixel."""
        chosen, opened = _open(session, model, runtime, "segmentor")
        pixels = _pixels(session, chosen, picture)
        classes = segment(opened, pixels)
        colours = chosen.palette()
        found = shares(classes, chosen.class_names())
        items = "".join(
            f"<li><span class='swatch' style='background:rgb{colours[i]}'></span>{html.escape(name)} "
            f"<b>{share:.0%}</b></li>"
            for i, name, share in found
        )
        pictures = tuple(
            session.save(draw_classes(pixels, classes, colours, strength)) for strength in (0.0, 0.65)
        )
        text = f"<ul class='legend' aria-label='Classes in the picture'>{items}</ul>"
        return pictures, text, {name: round(share, 4) for _, name, share in found}

    inputs, outputs = [picture, model, runtime], [drawn, legend, plain]
    event = go.click(run, inputs, outputs, api_name="segment", **MODEL_EVENT)
    clear_on_change(inputs, outputs, event)


def _pickers(session: Session, form: GraphKind, verb: str) -> tuple[gr.Dropdown, gr.Dropdown, gr.Button]:
    """Returns the choice of model, the choice of runtime, and the start button."""
    models = session.models.having(form)
    with gr.Row(elem_classes="settings", equal_height=True):
        model = gr.Dropdown(
            [each.name for each in models], value=models[0].name, label="Model", visible=len(models) > 1,
            elem_id=f"{form}-model", filterable=False,
        )  # fmt: skip
        titles = _titles(models[0], form)
        runtime = gr.Dropdown(
            titles, value=titles[0], label="Runtime", elem_id=f"{form}-runtime", filterable=False
        )
        go = gr.Button(verb, variant="primary", elem_id=f"{form}-go")

    def changed(name: str) -> Any:
        there = _titles(session.models[name], form)
        return gr.update(choices=there, value=there[0])

    model.change(changed, model, runtime, api_visibility="private", show_progress="hidden")
    return model, runtime, go


def _titles(model: Model, form: GraphKind) -> list[str]:
    return [option.title for option in model.options(form) if not option.reason]


def _open(session: Session, model: str, runtime: str, form: GraphKind) -> tuple[Model, Any]:
    chosen = session.models[model]
    if form not in chosen.forms:
        raise BadInput(f"This model is not a {form}; choose one from the list.")
    return chosen, chosen.runtime(form, runtime or None)


def _pixels(session: Session, model: Model, picture: str | None) -> np.ndarray:
    return session.pixels(picture, len(model.description(model.kind).preprocessing.mean))  # pyright: ignore
