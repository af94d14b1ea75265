"""Downloads of a reconstruction: a figure, a ZIP, and an animation over mask ratios."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from coma.errors import BadInput
from demo.downloads import draw_figure, reconstruct_ratios, write_animation, write_zip
from demo.pages.page_state import PRIVATE, clear_on_change
from demo.pages.results import resized_for, title_of
from demo.session import MODEL_EVENT, Session, slug, table

SAVE = """file => {
    const link = document.createElement('a');
    [link.href, link.download] = [file.url, file.orig_name];
    link.click();
}"""
"""Saves a file under its name."""
RATIO_SETTINGS = ("picture", "model", "seed", "resize_mode", "runtime", "statistics")


def downloads(
    session: Session, settings: dict[str, Any], editor: gr.ImageEditor, run: Callable[..., Any]
) -> None:
    """Builds the buttons; every file is computed from the settings at the press of its button.

    Args:
        session: State that the tabs share.
        settings: Controls of the reconstruction by name.
        editor: Canvas of the brush.
        run: Reconstructs with these settings: the picture first, then the masked picture, the reconstruction,
            all pictures with captions, two texts, and the numbers.
    """
    with gr.Row(elem_classes="settings", elem_id="downloads"):
        as_figure = gr.Button("Figure (PNG)", elem_id="figure")
        as_zip = gr.Button("All pictures (ZIP)", elem_id="zip")
        as_animation = gr.Button("Animate mask ratios (GIF)", elem_id="animate")
    animation = gr.Image(
        label="Reconstruction against mask ratio", format="gif", interactive=False, elem_id="animation",
        buttons=["download", "fullscreen"], height=320,
        alt_text="Masked picture and reconstruction while the mask ratio rises",
    )  # fmt: skip
    scores = gr.HTML(elem_id="ratio-scores", label="Scores by mask ratio")
    file = gr.File(visible="hidden", label="File")
    plain = gr.JSON(visible=False, label="Scores")

    def pictures_of(values: tuple[Any, ...]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        seen, _, _, files, _, _, facts = run(*values)
        if not files:
            raise BadInput(facts["note"])
        return [(seen, "picture, at the model's size"), *files], facts

    @wraps(run, assigned=())
    def figure(*values: Any) -> str:
        """Returns all pictures of a reconstruction as one figure with its numbers."""
        files, facts = pictures_of(values)
        title = title_of(facts["settings"])
        psnr = "exact" if facts["psnr_db"] is None else f"PSNR {facts['psnr_db']:.2f} dB"
        ssim = "" if facts["ssim"] is None else f", SSIM {facts['ssim']:.3f}"
        leak = " Statistics of the masked patches were given." if facts["statistics"] == "target" else ""
        notes = f"{psnr}{ssim} on masked pixels.{leak} Model: {facts['model']}. Picture: {facts['resized']}."
        opened = [(Image.open(path), caption) for path, caption in files]
        return session.save(np.asarray(draw_figure(opened, title, notes)), f"{title} figure")

    @wraps(run, assigned=())
    def archive(*values: Any) -> str:
        """Returns a ZIP of all pictures of a reconstruction and their numbers."""
        files, facts = pictures_of(values)
        path = session.new_file(f"{slug(title_of(facts['settings']))}.zip")
        shown = facts | {"settings": facts["settings"] | {"picture": Path(facts["settings"]["picture"]).name}}
        write_zip(path, [Path(picture) for picture, _ in files], shown)
        return str(path)

    def ratios(
        picture: str | None, model: str, seed: float, resize_mode: str, runtime: str, statistics: str
    ) -> tuple[str, str, list[dict[str, Any]]]:
        """Reconstructs a picture at rising mask ratios, as an animation and as numbers."""
        chosen = session.models[model]
        resized = resized_for(session, chosen, picture, resize_mode)
        source = "target" if statistics == "target" and chosen.norm_pix else "visible"
        results = reconstruct_ratios(chosen, runtime, resized, int(seed), statistics=source)
        path = session.new_file(f"{slug(f'{Path(str(picture)).stem} {model} mask ratios seed {seed}')}.gif")
        write_animation(path, results)
        rows = [
            {"mask_ratio": round(float(each.hidden.mean()), 4),
             "psnr_db": round(each.score.psnr, 2) if np.isfinite(each.score.psnr) else None,
             "ssim": None if each.score.ssim is None else round(each.score.ssim, 3)}
            for each in results
        ]  # fmt: skip
        cells = [
            [f"{row['mask_ratio']:.0%}",
             *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("psnr_db", "ssim"))]
            for row in rows
        ]  # fmt: skip
        head = ("mask ratio", "PSNR in dB", "SSIM")
        return str(path), table(head, cells, caption="Scores on hidden pixels"), rows

    for button, function in ((as_figure, figure), (as_zip, archive)):
        button.click(
            function, [*settings.values(), editor], file, api_name=function.__name__, **MODEL_EVENT
        ).success(None, file, None, js=SAVE, **PRIVATE)
    inputs = [settings[name] for name in RATIO_SETTINGS]
    event = as_animation.click(
        ratios, inputs, [animation, scores, plain], api_name="mask_ratios", **MODEL_EVENT
    )
    clear_on_change(inputs, [animation, scores, plain], event)
