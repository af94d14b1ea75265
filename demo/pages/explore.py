"""The Explore tab: similarity and attention of a patch, features in colour, regions, windows of DM-MSA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from coma.data.transforms import normalize
from coma.errors import BadInput
from demo.inputs import CheckedImage
from demo.introspection import (
    BlockGates,
    attention_maps_of,
    attention_received,
    feature_pyramid,
    gate_weights,
    pyramid_colours,
)
from demo.models import Model
from demo.pages.page_state import PRIVATE, mark_until_current
from demo.pages.results import panel
from demo.render import PALETTE, colour_indices, enlarge, overlay, ring, to_rgb
from demo.resize import resize_picture
from demo.session import EMPTY, MODEL_EVENT, Session, note, table
from demo.similarity import (
    REGIONS,
    feature_at,
    feature_regions,
    most_similar,
    similarity_to,
    stage_features,
)

SHOWN = 448
Pictures = list[tuple[np.ndarray, str]]
Files = list[tuple[str, str]]
OPEN = (
    "() => { if (document.querySelector('#explored')?.offsetParent) document.querySelector('#look').click() }"
)
"""Follows the picture while the tab is open; otherwise it is computed when the tab is opened."""


def explore_tab(session: Session, picture: gr.Image, tab: gr.Tab, examples: list[str]) -> None:
    """Builds the tab, which follows its controls while it is open.

    Args:
        session: State that the tabs share.
        picture: Picture input that the tabs share.
        tab: The tab, whose opening starts the first computation.
        examples: Paths of the example pictures; the second is the second picture.
    """
    models = session.models.with_encoder()
    first = models[0]
    with gr.Row(elem_id="explore-controls", elem_classes="settings", equal_height=True):
        model = gr.Dropdown(
            [each.name for each in models], value=first.name, label="Model", visible=len(models) > 1,
            elem_id="inside-model", filterable=False,
        )  # fmt: skip
        stage = gr.Radio(_stages(first), value=_stages(first)[-2:][0], label="Stage", elem_id="stage")
        regions = gr.Slider(*REGIONS, 4, step=1, label="Regions", elem_id="regions", buttons=[])
        look = gr.Button("Show", elem_id="look", visible="hidden")
    gr.Markdown("### Similarity of patches\nClick on a patch of the picture, or move the two sliders.")
    with gr.Row(elem_id="place-controls", elem_classes="settings"):
        row = gr.Slider(0, 1, 0.5, step=0.01, label="Vertical position", elem_id="row", buttons=[])
        col = gr.Slider(0, 1, 0.5, step=0.01, label="Horizontal position", elem_id="col", buttons=[])
    with gr.Column(elem_id="explored"):
        with gr.Row(elem_classes="panels"):
            target = panel("Choose a patch", "place", "The picture; click to choose a patch")
            here = panel("Similarity", "here", "Similarity of every patch to the chosen one")
            there = panel("Second picture", "there", "Similarity of every patch of the second picture")
        scale = gr.HTML(elem_id="scale", label="Scale")
        attention = gr.Gallery(label="Attention (mean over heads)", **_gallery(4), elem_id="attention")
    with gr.Accordion("Second picture", open=False, elem_id="second"):
        other = CheckedImage(
            value=examples[1], label="Second picture", type="filepath", image_mode=None, format="png",
            sources=["upload", "clipboard"], elem_id="other", height=200, buttons=[],
            alt_text="The second picture",
        )  # fmt: skip
    with gr.Column(elem_id="features"):
        gr.Markdown("### Features\nPrincipal components as colours, k-means regions, attention received.")
        pyramid = gr.Gallery(label="Features", **_gallery(4), elem_id="pyramid")
        gr.Markdown(
            "### Windows of DM-MSA\nThe window that contributes most at each position, and its weight."
        )
        strongest = gr.Gallery(label="Strongest window of each stage", **_gallery(4), elem_id="gates")
        weights = gr.HTML(elem_id="gate-weights", label="Gates")
    place_facts = gr.JSON(visible="hidden", label="Similarity")
    feature_facts = gr.JSON(visible="hidden", label="Feature settings")

    def similarity(
        picture: str | None, other: str | None, model: str, stage: float, row: float, col: float
    ) -> tuple[Any, ...]:
        """Compares a patch with all others, of a second picture too, and returns what it attends to."""
        facts: dict[str, Any] = {"settings": {"picture": picture, "other": other, "model": model,
                                              "stage": stage, "row": row, "col": col}}  # fmt: skip
        if not picture:
            return None, None, None, note(EMPTY), [], {"note": EMPTY, **facts}
        chosen = _of(session, model)
        encoder = chosen.encoder()
        inputs = [_input(session, chosen, each) for each in (picture, other) if each]
        found = [stage_features(encoder, image, int(stage)) for image, _ in inputs]
        query = feature_at(found[0], row, col)
        maps = [similarity_to(each, query) for each in found]
        least = min(float(each.min()) for each in maps)
        name = f"{Path(picture).stem} {model} stage {int(stage)}"
        drawn = [
            enlarge(overlay(pixels, (each - least) / max(1 - least, 1e-6)), SHOWN)
            for (_, pixels), each in zip(inputs, maps, strict=True)
        ]
        marked = ring(enlarge(inputs[0][1], SHOWN), row, col)
        text = f"Cosine similarity of the features of stage {int(stage)}: {least:.2f} is dark, 1 is bright."
        facts |= {"lowest": round(least, 4), "patches": list(maps[0].shape)}
        second = None
        if len(maps) > 1:
            match, best = most_similar(maps[1]), float(maps[1].max())
            second = session.save(ring(drawn[1], *match), f"{name} similarity in {Path(str(other)).stem}")
            facts |= {"match": [round(each, 4) for each in match], "match_similarity": round(best, 4)}
            text += f" The ring in the second picture is the most similar patch, {best:.2f}."
        attended = attention_maps_of(encoder, inputs[0][0], int(stage), row, col)
        pictures = [
            (ring(enlarge(overlay(inputs[0][1], each), SHOWN), row, col), f"attention, window: {window}")
            for window, each in attended.items()
        ]
        return (
            session.save(marked, f"{name} patch"),
            session.save(ring(drawn[0], row, col), f"{name} similarity"),
            second,
            note(text),
            session.save_all(pictures, name),
            facts,
        )

    def features(
        picture: str | None, model: str, stage: float, regions: float
    ) -> tuple[Files, Files, str, dict[str, Any]]:
        """Returns principal components, regions, and the gates of DM-MSA of a picture."""
        facts = {"settings": {"picture": picture, "model": model, "stage": stage, "regions": regions}}
        if not picture:
            return [], [], note(EMPTY), facts
        chosen = _of(session, model)
        image, pixels = _input(session, chosen, picture)
        encoder = chosen.encoder()
        colours = pyramid_colours(feature_pyramid(encoder, image))
        shown: Pictures = [
            (enlarge(each, SHOWN, blocks=True), f"PCA, stride {stride}: {each.shape[1]} x {each.shape[0]}")
            for stride, each in zip(encoder.strides, colours, strict=True)
        ]
        found = feature_regions(stage_features(encoder, image, int(stage)), int(regions))
        tints = enlarge(colour_indices(found, PALETTE), max(pixels.shape), blocks=True)
        mixed = (0.4 * enlarge(pixels, SHOWN) + 0.6 * enlarge(tints, SHOWN, blocks=True)).astype(np.uint8)
        shown.append((mixed, f"{found.max() + 1} regions of stage {int(stage)}"))
        try:
            received = attention_received(encoder, image).numpy()
            shown.append((enlarge(overlay(pixels, received), SHOWN), "attention received, last block"))
        except BadInput:  # its last block does not see the whole picture
            pass
        name = f"{Path(picture).stem} {model}"
        gates = gate_weights(encoder, image) if encoder.window_gates() else []
        if not gates:
            text = "This model has no gates: every layer has one window, the whole picture."
            return session.save_all(shown, name), [], note(text), facts
        maps = _window_maps(gates)
        return session.save_all(shown, name), session.save_all(maps, name), _gate_table(gates), facts

    def clicked(event: gr.SelectData, picture: str | None, model: str) -> tuple[float, float]:
        x, y = event.index
        _, pixels = _input(session, _of(session, model), picture)
        height, width = enlarge(pixels, SHOWN).shape[:2]
        return round(min(max(y / height, 0), 1), 3), round(min(max(x / width, 0), 1), 3)

    def changed_model(name: str) -> Any:
        stages = _stages(session.models[name])
        return gr.update(choices=stages, value=stages[-2:][0])

    place = {"picture": picture, "other": other, "model": model, "stage": stage, "row": row, "col": col}
    whole = {"picture": picture, "model": model, "stage": stage, "regions": regions}
    gr.on(
        [tab.select, look.click, *(each.change for each in (other, model, stage, row, col))],
        similarity, list(place.values()), [target, here, there, scale, attention, place_facts],
        api_name="similarity", show_progress="hidden", **MODEL_EVENT,
    )  # fmt: skip
    gr.on(
        [tab.select, look.click, *(each.change for each in (model, stage, regions))],
        features, list(whole.values()), [pyramid, strongest, weights, feature_facts],
        api_name="features", show_progress="hidden", **MODEL_EVENT,
    )  # fmt: skip
    settle = mark_until_current(place_facts, place, "stalePlace", "#explored")
    mark_until_current(feature_facts, whole, "staleFeatures", "#features")
    picture.change(None, js=OPEN, **PRIVATE)
    model.change(changed_model, model, stage, **PRIVATE)
    target.select(clicked, [picture, model], [row, col], **PRIVATE).then(**settle)


def _window_maps(gates: list[BlockGates]) -> Pictures:
    """Returns the strongest window of the last block of each stage, in colour, with its legend."""
    return [
        (
            enlarge(colour_indices(each.strongest, PALETTE), SHOWN, blocks=True),
            f"stage {each.stage}: {_legend(each.windows)}",
        )
        for each in {each.stage: each for each in gates}.values()
    ]


def _gate_table(gates: list[BlockGates]) -> str:
    rows = [
        [
            f"stage {each.stage}, block {each.block}",
            "  ".join(f"{_window(w)}: x{v:.2f}" for w, v in zip(each.windows, each.weights, strict=True)),
            "  ".join(f"{_window(w)}: {v:.0%}" for w, v in zip(each.windows, each.wins, strict=True)),
        ]
        for each in gates
    ]
    head = ("block", "mean weight of each window", "channels where it has the largest weight")
    return table(head, rows, caption="Gates of DM-MSA")


def _gallery(columns: int) -> dict[str, Any]:
    return {
        "format": "png", "columns": columns, "fit_columns": False, "height": "auto", "object_fit": "contain",
        "interactive": False, "buttons": ["download", "download_all", "fullscreen"], "show_label": False,
        "elem_classes": "pictures",
    }  # fmt: skip


def _of(session: Session, name: str) -> Model:
    chosen = session.models[name]
    if chosen not in session.models.with_encoder():
        raise BadInput("The encoder of this model is not available; choose a model from the list.")
    return chosen


def _stages(model: Model) -> list[int]:
    return list(range(1, len(model.encoder().strides) + 1))


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
