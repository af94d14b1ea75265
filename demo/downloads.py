"""Files to take home: a figure of all pictures, a ZIP of them, and reconstructions against the mask ratio."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from coma.contact_sheet import Cell, Section, draw_sections
from demo.masking import mask_picture
from demo.models import Model
from demo.reconstruction import Reconstruction, reconstruct
from demo.render import cover, enlarge, to_rgb
from demo.resize import Resized

RATIOS = tuple(round(step / 20, 2) for step in range(2, 19))
"""Mask ratios of an animation."""
_SIDE, _GAP, _LINE = 320, 8, 36
_STEP_MS, _REST_MS = 350, 1400


def draw_figure(pictures: Sequence[tuple[Image.Image, str]], title: str, notes: str) -> Image.Image:
    """Returns the captioned pictures as one figure under a title and notes."""
    cells = [Cell(picture, caption) for picture, caption in pictures]
    return draw_sections([Section("", cells)], title, notes, across=4, side=_SIDE)


def write_zip(path: Path, pictures: Sequence[Path], facts: dict[str, Any]) -> None:
    """Writes pictures under their own names, and their numbers as `result.json`."""
    with zipfile.ZipFile(path, "x") as archive:  # PNGs are compressed already
        for picture in pictures:
            archive.write(picture, picture.name)
        archive.writestr("result.json", json.dumps(facts, indent=1))


def reconstruct_ratios(
    model: Model, runtime_title: str | None, resized: Resized, seed: int, **options: Any
) -> list[Reconstruction]:
    """Reconstructs a picture at `RATIOS`, or as many of them as differ; each mask covers the one before.

    Args:
        model: Model that reconstructs it.
        runtime_title: Runtime; None for the first.
        resized: The picture.
        seed: Seed of the masks, which are MAE's.
        options: As `reconstruct` takes them.
    """
    runtime = model.runtime("reconstructor", runtime_title)
    masks = [mask_picture(model, resized, "mae", seed, ratio).visible for ratio in RATIOS]
    different = {int(visible.sum()): visible for visible in masks}
    return [reconstruct(runtime, resized, visible, **options) for visible in different.values()]


def write_animation(path: Path, results: Sequence[Reconstruction]) -> None:
    """Writes a GIF of masked picture and reconstruction, a frame for each result, which plays for ever."""
    frames = [_frame(each) for each in results]
    durations = [_STEP_MS] * (len(frames) - 1) + [_REST_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _frame(result: Reconstruction) -> Image.Image:
    masked = cover(to_rgb(result.shown), result.hidden[0])
    pictures = [enlarge(masked, _SIDE, blocks=True), enlarge(to_rgb(result.merged), _SIDE)]
    height, width = pictures[0].shape[:2]
    frame = Image.new("RGB", (2 * width + _GAP, height + _LINE), (255, 255, 255))
    for number, picture in enumerate(pictures):
        frame.paste(Image.fromarray(picture), (number * (width + _GAP), 0))
    text = f"mask ratio {result.hidden.mean():.0%}   PSNR {result.score.psnr:.1f} dB"
    ImageDraw.Draw(frame).text((4, height + 8), text, (24, 24, 32), ImageFont.load_default(18))
    return frame.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
