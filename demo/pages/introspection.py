"""The introspection tab: feature pyramid, window gates, attention of a position."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from coma.data.transforms import normalize
from coma.errors import BadInput
from demo.introspection import attention_maps_of, feature_pyramid, gate_weights, pyramid_colours
from demo.models import Model
from demo.pages.page_state import clear_on_change
from demo.render import colour_indices, enlarge, overlay, to_rgb
from demo.resize import resize_picture
from demo.session import MODEL_EVENT, Session, note, table

SHOWN = 448
WINDOWS = np.array([(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)], np.uint8)
"""Okabe and Ito's palette, which is safe for colour-blind people."""
Pictures = list[tuple[np.ndarray, str]]
Files = list[tuple[str, str]]


def introspection_tab(session: Session, picture: gr.Image) -> None:
    """Builds the tab, which computes on a press of the button or a click on the picture."""
    models = session.models.with_encoder()
    with gr.Row(elem_classes="settings", equal_height=True):
        model = gr.Dropdown(
            [each.name for each in models], value=models[0].name, label="Model", visible=len(models) > 1,
            elem_id="inside-model", filterable=False,
        )  # fmt: skip
        look = gr.Button("Show features", variant="primary", elem_id="look")
    gr.Markdown(
        "### Feature pyramid\nPrincipal components as colours: similar colours mean similar features."
    )
    pyramid = gr.Gallery(label="Feature pyramid", **_gallery(5), elem_id="pyramid")
    gr.Markdown(
        "### Gates of DM-MSA\nThe window that contributes most at each position, and the gates' weights."
    )
    strongest = gr.Gallery(
        label="Strongest window of the last block of each stage", **_gallery(4), elem_id="gates"
    )
    weights = gr.HTML(elem_id="gate-weights", label="Gates")
    gr.Markdown("### Attention of a position\nClick on the picture, or move the two sliders.")
    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            target = gr.Image(
                label="Choose a position", show_label=False, interactive=False, format="png", elem_id="place",
                buttons=[], alt_text="The picture; click to see what this position attends to",
            )  # fmt: skip
            row = gr.Slider(0, 1, 0.5, step=0.01, label="Vertical position", elem_id="row")
            col = gr.Slider(0, 1, 0.5, step=0.01, label="Horizontal position", elem_id="col")
            stage = gr.Radio([1, 2, 3, 4], value=3, label="Stage", elem_id="stage")
        with gr.Column(scale=3, min_width=300):
            attention = gr.Gallery(label="Attention (mean over heads)", **_gallery(2), elem_id="attention")

    def inside(picture: str | None, model: str) -> tuple[Files, Files, str, str]:
        """Returns the feature pyramid and the gates of a picture."""
        chosen = _of(session, model)
        image, pixels = _input(session, chosen, picture)
        encoder = chosen.encoder()
        colours = pyramid_colours(feature_pyramid(encoder, image))
        gates = gate_weights(encoder, image) if encoder.window_gates() else []
        shown: Pictures = [(enlarge(pixels, SHOWN), "picture")]
        for stride, each in zip(encoder.strides, colours, strict=True):
            size = f"{each.shape[1]} x {each.shape[0]}"
            shown.append((enlarge(each, SHOWN, blocks=True), f"stride {stride}: {size}"))
        if not gates:
            text = "This model has no gates: every layer has one window, the whole picture."
            return session.save_all(shown), [], note(text), session.save(enlarge(pixels, SHOWN))
        last = {each.stage: each for each in gates}
        maps: Pictures = [
            (
                enlarge(colour_indices(each.strongest, WINDOWS), SHOWN, blocks=True),
                f"stage {each.stage}: {_legend(each.windows)}",
            )
            for each in last.values()
        ]  # fmt: skip
        rows = [
            [
                f"stage {each.stage}, block {each.block}",
                "  ".join(f"{_window(w)}: x{v:.2f}" for w, v in zip(each.windows, each.weights, strict=True)),
                "  ".join(f"{_window(w)}: {v:.0%}" for w, v in zip(each.windows, each.wins, strict=True)),
            ]
            for each in gates
        ]
        head = ("block", "mean weight of each window", "channels where it has the largest weight")
        text = table(head, rows, caption="Gates of DM-MSA")
        return session.save_all(shown), session.save_all(maps), text, session.save(enlarge(pixels, SHOWN))

    def attend(picture: str | None, model: str, stage: float, row: float, col: float) -> tuple[Files, str]:
        """Returns the attention of one position in the last block of a stage."""
        chosen = _of(session, model)
        image, pixels = _input(session, chosen, picture)
        maps = attention_maps_of(chosen.encoder(), image, int(stage), row, col)
        pictures = [
            (_mark(enlarge(overlay(pixels, each), SHOWN), row, col), f"window: {name}")
            for name, each in maps.items()
        ]
        return session.save_all(pictures), session.save(_mark(enlarge(pixels, SHOWN), row, col))

    def clicked(event: gr.SelectData, picture: str | None, model: str) -> tuple[float, float]:
        x, y = event.index
        _, pixels = _input(session, _of(session, model), picture)
        height, width = enlarge(pixels, SHOWN).shape[:2]
        return round(min(max(y / height, 0), 1), 3), round(min(max(x / width, 0), 1), 3)

    place = [picture, model, stage, row, col]
    event = look.click(
        inside, [picture, model], [pyramid, strongest, weights, target], api_name="inside", **MODEL_EVENT
    )
    clear_on_change([picture, model], [pyramid, strongest, weights, target, attention], event)
    event.then(attend, place, [attention, target], api_visibility="private", **MODEL_EVENT)
    target.select(clicked, [picture, model], [row, col], api_visibility="private", show_progress="hidden")
    gr.on(
        [row.change, col.change, stage.change], attend, place, [attention, target],
        api_name="attention", show_progress_on=[attention], **MODEL_EVENT,
    )  # fmt: skip


def _gallery(columns: int) -> dict[str, Any]:
    return {
        "format": "png", "columns": columns, "height": "auto", "object_fit": "contain", "interactive": False,
        "buttons": ["download", "download_all", "fullscreen"], "show_label": False,
        "elem_classes": "pictures",
    }  # fmt: skip


def _of(session: Session, name: str) -> Model:
    chosen = session.models[name]
    if chosen not in session.models.with_encoder():
        raise BadInput("The encoder of this model is not available; choose a model from the list.")
    return chosen


def _input(session: Session, model: Model, picture: str | None) -> tuple[Tensor, np.ndarray]:
    """Returns the centre crop, normalised `[1, c, H, W]` and as uint8 `[H, W, 3]`."""
    config = model.config
    assert config is not None
    pixels = session.pixels(picture, config.model.channels)
    resized = resize_picture(pixels, config.image_size, "crop", config.mean)
    image = normalize(resized.pixels[None], config.mean, config.std)
    return image.to(torch.float32), to_rgb(resized.pixels.permute(1, 2, 0).numpy())


def _legend(windows: tuple[int, ...]) -> str:
    names = ("blue", "orange", "green", "pink")
    return ", ".join(f"{name} = {_window(side)}" for name, side in zip(names, windows, strict=False))


def _window(side: int) -> str:
    return "all" if side == 0 else f"{side}x{side}"


def _mark(picture: np.ndarray, row: float, col: float) -> np.ndarray:
    """Returns the picture with a ring around a position."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(picture)
    y, x = row * picture.shape[0], col * picture.shape[1]
    draw = ImageDraw.Draw(image)
    for radius, colour in ((11, (0, 0, 0)), (9, (255, 255, 255)), (7, (0, 0, 0))):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=2)
    return np.asarray(image)
