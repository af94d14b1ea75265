"""The tab that masks parts of a picture and reconstructs them."""

from __future__ import annotations

import html
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from demo.inputs import CheckedEditor
from demo.masking import LARGEST_SEED, METHODS, mask_picture
from demo.models import Model
from demo.pages.downloads import downloads
from demo.pages.page_state import ADDRESS, MARK, PRIVATE, mark_until_current, query_of, restore
from demo.pages.results import (
    CANVAS,
    about_picture,
    facts_html,
    large,
    original,
    panel,
    resized_for,
    result_facts,
    title_of,
    view_pictures,
)
from demo.reconstruction import reconstruct
from demo.render import heat_map, to_rgb
from demo.resize import RESIZE_MODES
from demo.session import EMPTY, MODEL_EVENT, Session, heading, note

PAINT = "Paint over the parts to mask."
STATISTICS = {
    "visible": "Estimated from visible patches",
    "target": "Taken from the masked patches (leaks)",
}
METHOD_CHOICES = [(each.title, key) for key, each in METHODS.items()]


def reconstruct_tab(
    session: Session, picture: gr.Image, about: gr.HTML, page: gr.Blocks, examples: list[str]
) -> None:
    """Builds the tab.

    Args:
        session: State that the tabs share.
        picture: Picture input that the tabs share.
        about: Place for the facts of the picture.
        page: The page, whose opening starts the first reconstruction.
        examples: Paths of the example pictures.
    """
    models = session.models.having("reconstructor")
    first = models[0]
    with gr.Row(elem_id="controls", elem_classes="settings"):
        model = gr.Dropdown(
            [each.name for each in models], value=first.name, label="Model", visible=len(models) > 1,
            elem_id="rebuild-model", filterable=False, min_width=120,
        )  # fmt: skip
        method = gr.Dropdown(
            METHOD_CHOICES, value=first.method, label="Masking method", elem_id="method", filterable=False,
            min_width=120,
        )  # fmt: skip
        ratio = gr.Slider(
            0.05, 0.95, 0.75, step=0.05, label="Mask ratio", visible=METHODS[first.method].ratio or "hidden",
            elem_id="ratio", min_width=120, buttons=[],
        )  # fmt: skip
        seed = gr.Number(
            0, label="Mask seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed",
            visible=METHODS[first.method].seed or "hidden", min_width=80,
        )  # fmt: skip
        again = gr.Button(
            "New mask", elem_id="again", min_width=80, visible=METHODS[first.method].seed or "hidden"
        )
    editor = CheckedEditor(
        label=PAINT,
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
    with gr.Row(elem_id="result", elem_classes="panels"):
        seen = panel("Resized", "seen", "The picture, brought to the size of the model")
        masked = panel("Masked", "masked", "What the model sees of the picture")
        rebuilt = panel("Reconstruction", "rebuilt", "The picture as the model reconstructs it")
    numbers = gr.HTML(elem_id="numbers", label="Numbers")
    with gr.Accordion("More", open=False, elem_id="more") as more:
        resize_mode = gr.Radio(
            [(title, key) for key, title in RESIZE_MODES.items()], value="crop", label="Resize mode",
            info="How the picture is brought to the model's size", elem_id="resize_mode",
        )  # fmt: skip
        runtime = gr.Radio(_available(first), value=_available(first)[0], label="Runtime", elem_id="runtime")
        missing = gr.HTML(_unavailable(first), elem_id="missing")
        statistics = gr.Radio(
            [(title, key) for key, title in STATISTICS.items()], value="visible",
            label="Mean and contrast of hidden patches from", visible=first.norm_pix, elem_id="statistics",
        )  # fmt: skip
        gr.HTML(
            padding=False,
            value=heading("All pictures to download; in the error, black is 0, yellow is 128 of 255"),
        )
        gallery = gr.Gallery(
            label="All views", show_label=False, format="png", columns=4, height="auto", object_fit="contain",
            buttons=["download", "download_all", "fullscreen"], interactive=False, elem_id="views",
            elem_classes="pictures",
        )  # fmt: skip
    facts = gr.JSON(visible="hidden", label="Facts")

    settings = {"picture": picture, "model": model, "method": method, "mask_ratio": ratio, "seed": seed,
                "resize_mode": resize_mode, "runtime": runtime, "statistics": statistics}  # fmt: skip
    controls = list(settings.values())
    outputs = [seen, masked, rebuilt, gallery, about, numbers, facts]

    def run(
        picture: str | None, model: str, method: str, mask_ratio: float, seed: float, resize_mode: str,
        runtime: str, statistics: str, painted: Sequence[str | bytes],
    ) -> tuple[Any, ...]:  # fmt: skip
        """Masks parts of a picture and reconstructs them."""
        settings = {"picture": picture, "model": model, "method": method, "mask_ratio": mask_ratio,
                    "seed": seed, "resize_mode": resize_mode, "runtime": runtime,
                    "statistics": statistics}  # fmt: skip
        if not picture:
            return None, None, None, [], "", note(EMPTY), {"note": EMPTY, "settings": settings}
        chosen = session.models[model]
        resized = resized_for(session, chosen, picture, resize_mode)
        file = session.uploads.open(picture)
        description = file.describe(len(resized.pixels))
        trained = None if chosen.trained_on is None else (Path(picture).name, file.size) in chosen.trained_on
        found = {"settings": settings, "file": description, "in_training_data": trained,
                 "example": Path(picture).stem if picture in examples else None}  # fmt: skip
        text = about_picture(description, trained)
        strokes = session.uploads.strokes(painted) if method == "brush" else None
        if method == "brush" and (strokes is None or not strokes.any()):
            shown = session.save(large(original(resized)))
            return shown, None, None, [], text, note(PAINT), {"note": PAINT, **found}
        spec = chosen.description("reconstructor")
        # a runtime of the model that was chosen before: the page is about to replace it
        ran = chosen.runtime("reconstructor", runtime if runtime in _available(chosen) else None)
        source: Any = "target" if statistics == "target" and chosen.norm_pix else "visible"
        what = mask_picture(chosen, resized, method, int(seed), float(mask_ratio), strokes)
        result = reconstruct(ran, resized, what.visible, source, what.degraded, what.predicts_all)
        found |= result_facts(result, chosen, resized, spec.unit, method, int(seed), ran.title, source)
        views = view_pictures(result)
        rebuilt = (large(to_rgb(result.merged)), "reconstruction")
        error = (large(heat_map(result.error, result.predicted), blocks=True), "error of the reconstruction")
        title = title_of(settings)
        files = session.save_all([*views, rebuilt, error], title)
        return (
            session.save(large(to_rgb(result.original)), title),
            files[0][0],
            files[-2][0],
            files,
            text,
            facts_html(found),
            found,
        )

    def changed_method(method: str) -> tuple[Any, ...]:
        chosen = METHODS[method]
        return tuple(gr.update(visible=each or "hidden") for each in (chosen.ratio, chosen.seed, chosen.seed))

    def of_model(name: str) -> tuple[Any, ...]:
        chosen = session.models[name]
        titles = _available(chosen)
        return (
            gr.update(choices=titles, value=titles[0]),
            gr.update(visible=chosen.norm_pix, value="visible"),
            _unavailable(chosen),
        )

    def changed_model(name: str) -> tuple[Any, ...]:
        return *of_model(name), session.models[name].method

    def canvas(picture: str | None, model: str, method: str, resize_mode: str) -> Any:
        if method != "brush":
            return gr.update(visible=False)
        background = session.save(
            large(original(resized_for(session, session.models[model], picture, resize_mode)))
        )
        return gr.update(
            value={"background": background, "layers": [], "composite": background}, visible=True
        )

    def opened(request: gr.Request) -> tuple[Any, ...]:
        found = restore(query_of(request), session.models, examples)
        values = [found.get(name, gr.skip()) for name in ("example", "model", "method", "ratio", "seed")]
        return *values, *(of_model(found["model"]) if "model" in found else [gr.skip()] * 3)

    work: dict[str, Any] = {"inputs": [*controls, editor], "outputs": outputs, **MODEL_EVENT}
    changes = [each.change for each in controls]
    gr.on(
        [*changes, editor.change, editor.input], run, **work, api_name="reconstruct", show_progress="hidden"
    )  # the first one gets the name
    page.load(
        opened, None, [picture, model, method, ratio, seed, runtime, statistics, missing], **PRIVATE
    ).then(run, **work, **PRIVATE)
    page.load(None, js=MARK, **PRIVATE)
    mark_until_current(facts, settings, "stale", "#result", ADDRESS)
    with more:
        downloads(session, settings, editor, run)
    method.change(changed_method, method, [ratio, seed, again], **PRIVATE)
    model.input(changed_model, model, [runtime, statistics, missing, method], **PRIVATE)
    gr.on(
        [picture.change, method.change, resize_mode.change, model.change],
        canvas, [picture, model, method, resize_mode], editor, **PRIVATE,
    )  # fmt: skip
    again.click(lambda: random.randint(1, 9999), None, seed, **PRIVATE)


def _available(model: Model) -> list[str]:
    return [option.title for option in model.options("reconstructor") if not option.reason]


def _unavailable(model: Model) -> str:
    off = [option for option in model.options("reconstructor") if option.reason]
    items = "".join(
        f"<li aria-disabled='true'><b>{html.escape(each.title)}</b> {html.escape(each.reason or '')}</li>"
        for each in off
    )
    return f"<ul class='off' aria-label='Runtimes that are not available'>{items}</ul>" if off else ""
