"""Pictures and numbers of a reconstruction, and where they are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from demo.masking import METHODS
from demo.models import Model
from demo.reconstruction import Reconstruction
from demo.render import cover, enlarge, to_rgb
from demo.resize import Resized, resize_picture
from demo.session import Session, cards, note

CANVAS = 512
Views = list[tuple[np.ndarray, str]]


def panel(label: str, name: str, alt: str) -> gr.Image:
    """Returns a place for a picture; `name` is its id on the page."""
    return gr.Image(
        label=label, format="png", interactive=False, elem_id=name, buttons=["fullscreen"],
        alt_text=alt, min_width=100,
    )  # fmt: skip


def title_of(settings: dict[str, Any]) -> str:
    """Returns the title of a result, which names its files: picture, model, method, ratio and seed."""
    method = METHODS[settings["method"]]
    parts = [Path(settings["picture"]).stem, settings["model"], settings["method"]]
    parts += [f"ratio {settings['mask_ratio']:.0%}"] * method.ratio
    return ", ".join(parts + [f"seed {settings['seed']}"] * method.seed)


def view_pictures(rebuilt: Reconstruction) -> Views:
    """Returns the pictures of all views with captions."""
    pictures: Views = []
    seen = to_rgb(rebuilt.shown)
    names = "ABCDEFGH"
    several = len(rebuilt.hidden) > 1
    for i, (hidden, filled, score) in enumerate(
        zip(rebuilt.hidden, rebuilt.filled, rebuilt.scores, strict=True)
    ):
        view = f"view {names[i]}" if several else "the model"
        pair = (
            f"{names[1 - i]} reconstructed from {names[i]}"
            if len(rebuilt.hidden) == 2
            else f"reconstructed from {view}"
        )
        pictures.append(
            (large(cover(seen, hidden & (not rebuilt.predicts_all)), blocks=True), f"what {view} sees")
        )
        pictures.append((large(to_rgb(filled)), f"{pair if several else 'composite'}: {score.psnr:.1f} dB"))
    if not several and not rebuilt.predicts_all:
        alone = cover(to_rgb(rebuilt.merged), ~rebuilt.predicted)
        pictures.append((large(alone), "masked pixels only"))
    return pictures


def resized_for(session: Session, model: Model, picture: str | None, resize_mode: Any) -> Resized:
    """Returns the picture at the size of a reconstructor.

    Raises:
        BadImage: no picture is chosen, or it cannot be used.
    """
    about = model.description("reconstructor")
    rule, channels = about.preprocessing, len(about.preprocessing.mean)
    size = rule.size or (224, 224)
    return resize_picture(session.pixels(picture, channels), size, resize_mode, rule.mean, about.unit)


def original(resized: Resized) -> np.ndarray:
    """Returns the picture without its letter-box, uint8 `[H, W, 3]`."""
    return to_rgb(resized.crop(resized.pixels.permute(1, 2, 0).numpy()))


def large(picture: np.ndarray, *, blocks: bool = False) -> np.ndarray:
    """Returns the picture enlarged to its size on the page."""
    return enlarge(picture, CANVAS, blocks=blocks)


def result_facts(
    rebuilt: Reconstruction,
    model: Model,
    resized: Resized,
    unit: int,
    method: str,
    seed: int,
    title: str,
    source: str,
) -> dict[str, Any]:
    """Returns the numbers as JSON."""
    psnr = rebuilt.score.psnr
    return {
        "psnr_db": round(psnr, 3) if np.isfinite(psnr) else None,
        "ssim": None if rebuilt.score.ssim is None else round(rebuilt.score.ssim, 4),
        "views": [
            {
                "hidden": round(float(hidden.mean()), 4),
                "psnr_db": round(score.psnr, 3) if np.isfinite(score.psnr) else None,
                "ssim": None if score.ssim is None else round(score.ssim, 4),
            }
            for hidden, score in zip(rebuilt.hidden, rebuilt.scores, strict=True)
        ],
        "unit_px": unit,
        "method": method,
        "seed": seed if METHODS[method].seed else None,
        "runtime": title,
        "milliseconds": round(1000 * rebuilt.seconds, 1),
        "resized": resized.note,
        "model": model.label,
        "statistics": source if model.norm_pix else None,
    }


def about_picture(description: str, trained: bool | None) -> str:
    """Returns the facts of a file as HTML, with a badge where the model was trained on the picture."""
    if trained is None:
        return note(
            f"{description}. The model comes without a list of its training images, so it is not known "
            "whether this is one of them."
        )
    if not trained:
        return note(f"{description}. Not in the model's training data (by file name and size).")
    badge = "<p class='badge'>In the model's training data: the result says nothing about new pictures.</p>"
    return badge + note(f"{description}.")


def facts_html(facts: dict[str, Any]) -> str:
    """Returns the numbers as HTML."""
    views = facts["views"]
    hidden = " / ".join(f"{view['hidden']:.0%}" for view in views[:2]) + (" ..." if len(views) > 2 else "")
    rows = [
        (
            "PSNR, masked pixels",
            f"{facts['psnr_db']:.2f} dB" if facts["psnr_db"] else "exact",
            "higher is better",
        ),
        ("SSIM, masked pixels", "-" if facts["ssim"] is None else f"{facts['ssim']:.3f}", "1 is identical"),
        ("mask ratio", hidden, "share of masked pixels in each view"),
        ("mask unit", f"{facts['unit_px']} px", "smallest part that is masked"),
        ("time", f"{facts['milliseconds']:.0f} ms", facts["runtime"]),
    ]
    if facts["seed"] is not None:
        rows.append(("seed", str(facts["seed"]), "the same seed draws the same mask"))
    if facts["statistics"] == "target":
        leak = (
            "CAUTION: masked patches are shown with their true mean and standard deviation, which the model "
            "never saw: picture and numbers leak information."
        )
        warning = f"<p class='leak' role='alert'>{leak}</p>"
    else:
        warning = ""
    about = METHODS[facts["method"]]
    merged = (
        "Masked shows the first view, Reconstruction takes every patch from the views that did not see it. "
        if about.views > 1 or about.degrades
        else ""
    )
    small = f"{about.about} {merged}Picture: {facts['resized']}. Model: {facts['model']}."
    return cards(rows) + warning + note(small)
