"""The tab that masks parts of a picture and reconstructs them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from demo.inputs import CheckedEditor
from demo.masking import LARGEST_SEED, METHODS, mask_picture
from demo.models import Model
from demo.pages.results import CANVAS, facts_html, large, result_facts, view_pictures
from demo.reconstruction import reconstruct
from demo.render import enlarge, heat_map, to_rgb
from demo.resize import RESIZE_MODES, Resized, resize_picture
from demo.session import MODEL_EVENT, Session, heading, note
from demo.storage import EXAMPLES, Storage

EMPTY = "Choose a picture first: drop one on the left, or click on an example."
STATISTICS = {
    "visible": "Estimated from visible patches",
    "target": "Taken from the masked patches (leaks)",
}


def reconstruct_tab(session: Session, picture: gr.Image, page: gr.Blocks) -> None:
    """Builds the tab.

    Args:
        session: State that the tabs share.
        picture: Picture input that the tabs share.
        page: The page, whose opening starts the first reconstruction.
    """
    models = session.models.having("reconstructor")
    first = models[0]
    with gr.Row(elem_classes="settings"):
        model = gr.Dropdown(
            [each.name for each in models], value=first.name, label="Model", visible=len(models) > 1,
            elem_id="rebuild-model", filterable=False,
        )  # fmt: skip
        method = gr.Dropdown(
            [(each.title, key) for key, each in METHODS.items()], value=first.method, label="Masking method",
            info=METHODS[first.method].about, elem_id="method", filterable=False, scale=2,
        )  # fmt: skip
        resize_mode = gr.Dropdown(
            [(title, key) for key, title in RESIZE_MODES.items()], value="crop", label="Resize mode",
            info="How the picture is brought to the model's size", elem_id="resize_mode", filterable=False,
        )  # fmt: skip
    began = METHODS[first.method]
    with gr.Row(elem_classes="settings", equal_height=True):
        ratio = gr.Slider(
            0.05,
            0.95,
            0.75,
            step=0.05,
            label="Mask ratio",
            visible=began.ratio,
            elem_id="ratio",
        )
        seed = gr.Number(0, label="Mask seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed")
        again = gr.Button("New mask", elem_id="again", min_width=130)
        go = gr.Button("Reconstruct", variant="primary", elem_id="go", min_width=130)
    with gr.Row(elem_classes="settings"):
        runtime = gr.Radio(_available(first), value=_available(first)[0], label="Runtime", elem_id="runtime")
        statistics = gr.Radio(
            [(title, key) for key, title in STATISTICS.items()], value="visible",
            label="Mean and contrast of hidden patches from", visible=first.norm_pix, elem_id="statistics",
        )  # fmt: skip
    missing = gr.HTML(_unavailable(first), elem_id="missing")
    editor = CheckedEditor(
        label="Paint over the parts to mask, then press Reconstruct",
        sources=(),
        transforms=(),
        layers=False,
        format="png",
        canvas_size=(CANVAS, CANVAS),
        height=CANVAS + 60,
        visible=False,
        brush=gr.Brush(default_size=40, colors=["#d0334d"], default_color="#d0334d", color_mode="fixed"),
        eraser=gr.Eraser(default_size=40),
        buttons=["fullscreen"],
        elem_id="brush",
    )
    numbers = gr.HTML(elem_id="numbers", label="Numbers")
    with gr.Row():
        with gr.Column(min_width=300):
            gr.HTML(padding=False, value=heading("Original | reconstruction (drag the line)"))
            slider = gr.ImageSlider(
                label="Original and reconstruction", show_label=False, format="png", interactive=False,
                elem_id="before-after", buttons=["download", "fullscreen"], max_height=CANVAS,
            )  # fmt: skip
        with gr.Column(min_width=300):
            gr.HTML(
                padding=False,
                value=heading("Error: black is 0, yellow is 128 of 255 levels or more"),
            )
            error = gr.Image(
                label="Error heat map", show_label=False, format="png", interactive=False, elem_id="error",
                buttons=["download", "fullscreen"],
                alt_text="Absolute error of every masked pixel as a colour",
            )  # fmt: skip
    gr.HTML(padding=False, value=heading("All views (click one to enlarge or download it)"))
    gallery = gr.Gallery(
        label="All views", show_label=False, format="png", columns=4, height="auto", object_fit="contain",
        buttons=["download", "download_all", "fullscreen"], interactive=False, elem_id="views",
        elem_classes="pictures",
    )  # fmt: skip
    plain = gr.JSON(visible=False, label="Facts")

    inputs = [picture, model, method, ratio, seed, resize_mode, runtime, statistics, editor]
    outputs = [slider, error, gallery, numbers, plain]

    def run(
        picture: str | None, model: str, method: str, mask_ratio: float, seed: float, resize_mode: str,
        runtime: str, statistics: str, painted: Sequence[str | bytes],
    ) -> tuple[Any, str | None, list[tuple[str, str]], str, dict[str, Any]]:  # fmt: skip
        """Masks parts of a picture and reconstructs them."""
        if not picture:
            return None, None, [], note(EMPTY), {"note": EMPTY}
        chosen = session.models[model]
        resized = _resized(session, chosen, picture, resize_mode)
        strokes = session.uploads.strokes(painted) if method == "brush" else None
        if method == "brush" and (strokes is None or not strokes.any()):
            hint = "Paint over the picture above, then press Reconstruct."
            before = enlarge(_original(resized), CANVAS)
            shown = session.save(before)
            return (shown, shown), None, [], note(hint), {"note": hint}
        about = chosen.description("reconstructor")
        opened = chosen.runtime("reconstructor", runtime or None)
        source: Any = "target" if statistics == "target" and chosen.norm_pix else "visible"
        what = mask_picture(chosen, resized, method, int(seed), float(mask_ratio), strokes)
        rebuilt = reconstruct(opened, resized, what.visible, source, what.degraded, what.predicts_all)
        after = enlarge(to_rgb(rebuilt.merged), CANVAS)
        facts = result_facts(rebuilt, chosen, resized, about.unit, method, int(seed), opened.title, source)
        before = enlarge(to_rgb(rebuilt.original), CANVAS)
        heat = large(heat_map(rebuilt.error, rebuilt.predicted), blocks=True)
        return (
            (session.save(before), session.save(after)),
            session.save(heat),
            session.save_all(view_pictures(rebuilt)),
            facts_html(facts),
            facts,
        )

    def changed_method(method: str) -> tuple[Any, ...]:
        about = METHODS[method]
        return (
            gr.update(info=about.about),
            gr.update(visible=about.ratio),
            gr.update(visible=about.seed),
            gr.update(visible=about.seed),
        )

    def changed_model(name: str) -> tuple[Any, ...]:
        chosen = session.models[name]
        titles = _available(chosen)
        return (
            gr.update(choices=titles, value=titles[0]),
            gr.update(visible=chosen.norm_pix, value="visible"),
            _unavailable(chosen),
            gr.update(value=chosen.method),
        )

    def canvas(picture: str | None, model: str, method: str, resize_mode: str) -> Any:
        if method != "brush":
            return gr.update(visible=False)
        background = session.save(
            enlarge(_original(_resized(session, session.models[model], picture, resize_mode)), CANVAS)
        )
        return gr.update(
            value={"background": background, "layers": [], "composite": background}, visible=True
        )

    work: dict[str, Any] = {
        "inputs": inputs,
        "outputs": outputs,
        "show_progress_on": [slider, numbers],
        **MODEL_EVENT,
    }
    go.click(run, **work, api_name="reconstruct")  # the first one gets the name
    method.change(changed_method, method, [method, ratio, seed, again], api_visibility="private")
    model.change(changed_model, model, [runtime, statistics, missing, method], api_visibility="private").then(
        run, **work, api_visibility="private"
    )
    gr.on(
        [picture.change, method.change, resize_mode.change, model.change],
        canvas, [picture, model, method, resize_mode], editor,
        api_visibility="private", show_progress="hidden",
    )  # fmt: skip
    gr.on(
        [page.load, picture.change, method.change, resize_mode.change, ratio.release, seed.change,
         runtime.change, statistics.change, editor.change],
        run, **work, api_visibility="private",
    )  # fmt: skip
    again.click(lambda: random.randint(1, 9999), None, seed, api_visibility="private")


def _available(model: Model) -> list[str]:
    return [option.title for option in model.options("reconstructor") if not option.reason]


def _unavailable(model: Model) -> str:
    import html

    off = [option for option in model.options("reconstructor") if option.reason]
    items = "".join(
        f"<li aria-disabled='true'><b>{html.escape(each.title)}</b> {html.escape(each.reason or '')}</li>"
        for each in off
    )
    return f"<ul class='off' aria-label='Runtimes that are not available'>{items}</ul>" if off else ""


def _resized(session: Session, model: Model, picture: str | None, resize_mode: Any) -> Resized:
    about = model.description("reconstructor")
    rule, channels = about.preprocessing, len(about.preprocessing.mean)
    size = rule.size or (224, 224)
    return resize_picture(session.pixels(picture, channels), size, resize_mode, rule.mean, about.unit)


def _original(resized: Resized) -> np.ndarray:
    return to_rgb(resized.crop(resized.pixels.permute(1, 2, 0).numpy()))


def example_pictures(storage: Storage) -> list[str]:
    """Copies photographs of scikit-image into the storage and returns their paths."""
    import skimage

    from pretrain.commands.quickstart import PHOTOGRAPHS

    folder = storage.folder / EXAMPLES
    folder.mkdir(exist_ok=True)
    originals = [Path(skimage.__file__).parent / "data" / name for name in PHOTOGRAPHS]
    return [shutil.copyfile(path, str(folder / path.name)) for path in originals if path.exists()]
