"""Pictures of a run: what every view saw and what was reconstructed from it, and the loss over the steps.

A norm-pix model predicts structure, not mean and contrast; a picture has to take those from somewhere. Every
sheet says from where, because the true ones of a hidden unit would show the viewer what the model never saw.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from coma.atomic_io import write_whole
from coma.config import BeyondConfig, Degradation
from coma.data.transforms import normalize
from coma.errors import BadInput
from coma.masking.patchify import spread, unit_grid
from coma.objectives import Objective
from coma.objectives.beyond import draw_views, shown_of
from coma.objectives.targets import Statistics

_ROWS = 8
_CELL = 176  # pixels, the longer side of a picture on the sheet at least
_GAP, _MARGIN = 8, 24
_PAPER, _INK, _FAINT, _HIDDEN = (255, 255, 255), (24, 24, 32), (96, 96, 108), (222, 222, 228)

Column = tuple[str, np.ndarray, np.ndarray | None]  # heading, uint8 [b, H, W, 3], shown bool [b, H, W] or all


def reconstruction_sheet(
    objective: Objective,
    images: Tensor,
    seeds: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    *,
    caption: str = "",
    statistics: Statistics = "visible",
) -> None:
    """Draw a PNG with one row per image: original, then what each view sees and makes of it.

    With complementary views a last column puts the predictions alone together: every pixel in it was
    predicted by a view that did not see it (averaged where several views did not).

    Args:
        objective: A pre-training objective; its mode and its weights are left as they are.
        images: `[b, c, H, W]`, normalised; the first 8 are drawn.
        seeds: int64 `[b]`, which fix the masks.
        mean: Per channel, of pixels scaled to 0..1; undoes the normalisation.
        std: Per channel, likewise.
        path: The PNG to write; it appears at once and whole.
        caption: First line of the sheet, for example the step.
        statistics: Where predictions of a norm-pix model get mean and contrast; see `reconstruct`.
    """
    images, seeds = images[:_ROWS], seeds[:_ROWS]
    height, width = images.shape[-2:]
    unit = objective.encoder.unit
    was_training = objective.training
    objective.eval()
    try:
        visible = objective.draw_visible(seeds, *unit_grid(height, width, unit))  # v b h w
        inputs = objective.degraded(images, seeds)
        filled = torch.stack([objective.reconstruct(inputs, view, statistics) for view in visible])
    finally:
        objective.train(was_training)

    shown = spread(visible.flatten(0, 1), unit)[:, :height, :width].unflatten(0, visible.shape[:2])
    views = len(visible)
    original, given = _pixels(images, mean, std), _pixels(inputs, mean, std)
    columns: list[Column] = [("original", original, None)]
    for number, (seen, reconstruction) in enumerate(zip(shown, filled, strict=True), start=1):
        view, rebuilt = (
            (f"view {number}", f"rebuilt from view {number}") if views > 1 else ("view", "rebuilt")
        )
        columns.append((view, given, seen.cpu().numpy()))
        columns.append((rebuilt, _pixels(reconstruction, mean, std), None))
    if views > 1:
        hidden = (~shown).unsqueeze(2).float()  # v b 1 H W
        merged = (filled.float() * hidden).sum(0) / hidden.sum(0).clamp(min=1)
        predicted = (hidden.sum(0) > 0).squeeze(1).cpu().numpy()
        columns.append(("predictions only", _pixels(merged, mean, std), predicted))
    notes = _explain(objective, visible, images.shape[1], statistics)
    _write(path, _draw(columns, caption or f"Reconstructions by {_method(objective)}", notes))


def degradation_sheet(
    view: Tensor,
    kinds: Sequence[Degradation],
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    *,
    unit: int,
    draws: int = 4,
    seed: int = 0,
) -> None:
    """Draw a PNG of an image and what `Beyond` shows its encoder of it, a random draw in every row.

    Args:
        view: `[3, H, W]`, uint8, or floats in 0..1.
        kinds: Which degradations.
        mean: Per channel, of pixels scaled to 0..1: what is degraded are normalised pixels, as in training.
        std: Per channel, likewise.
        path: The PNG to write; it appears at once and whole.
        unit: Side of a mask unit in pixels.
        draws: Of each.
        seed: Of the first draw; the next ones count on.

    Raises:
        BadInput: too few mask units to zoom in.
    """
    height, width = view.shape[-2:]
    images = normalize(view.expand(draws, -1, -1, -1), mean, std)
    seeds = torch.arange(draws) + seed
    columns: list[Column] = [("to be rebuilt", _pixels(images, mean, std), None)]
    for kind in kinds:
        config = BeyondConfig(degrade=kind)
        views = draw_views(config, seeds, *unit_grid(height, width, unit))
        pixels = _pixels(shown_of(config, images, seeds), mean, std)
        for number, visible in enumerate(views, start=1):
            heading = f"{kind}, view {number}" if len(views) > 1 else kind
            columns.append((heading, pixels, spread(visible, unit)[:, :height, :width].numpy()))
    about = ("/".join(f"{value:.3g}" for value in values) for values in (mean, std))
    notes = (
        "Every row is another draw. Zooming in, what is blank is not seen and is predicted: the border, and "
        "what masks hide of the centre ({0} x {0} px a unit). Otherwise all is predicted. As in training, "
        "pixels were normalised before (mean {1}, deviation {2}): it is this that tints decolor."
    ).format(unit, *about)
    ours = "; zoom-in+coma is ours" if "zoom-in+coma" in kinds else ""
    _write(path, _draw(columns, f"Degradations (Tian et al. 2022{ours})", notes, across=5))


def loss_curve(metrics: Path, path: Path, *, title: str = "") -> None:
    """Draw a PNG of loss, learning rate and the share of time spent waiting for data, against the step.

    Where a classifier was validated or features were probed on the way, that is drawn as well.

    Args:
        metrics: `metrics.jsonl` of a run: one JSON object per line with `step`, `loss`, `lr`, `data_wait`, or
            with `step` and `val_top1` or `test_top1`, or with `step` and what a probe found.
        path: The PNG to write; it appears at once and whole.
        title: First line of the picture; default: the name of the run directory.

    Raises:
        BadInput: the file is missing, not JSON lines, or holds no finite loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, looks = _read_metrics(metrics)
    panels = [(label, known) for label, curves in _PANELS for known in [_known(looks, curves)] if known]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure = Figure(figsize=(9, 6 + 2 * len(panels)), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    heights = [5, 1.2, 1.2, *[2.4 for _ in panels]]
    top, rate, wait, *below = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    top.plot(steps, losses, color="#9db4d6", linewidth=1, marker="o" if len(rows) < 30 else "", markersize=3)
    smooth = _smooth(losses)
    top.plot(steps, smooth, color="#1b4f9c", linewidth=2)
    top.set(ylabel="loss", title=title or metrics.parent.name)
    top.annotate(
        f"{smooth[-1]:.3g}", (steps[-1], smooth[-1]), (6, 0), textcoords="offset points", va="center"
    )
    if min(losses) > 0 and max(losses) > 5 * min(losses):
        top.set_yscale("log")
        top.yaxis.set_major_formatter("{x:g}")
        top.yaxis.set_minor_formatter("{x:g}" if max(losses) < 20 * min(losses) else "")
    for axes, key, label in ((rate, "lr", "learning rate"), (wait, "data_wait", "waiting\nfor data")):
        known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot(*zip(*known, strict=True) if known else ((), ()), color="#b3541e", linewidth=1.5)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    wait.set_ylim(0, 1)
    for axes, (label, known) in zip(below, panels, strict=True):
        for (name, points), color in zip(known.items(), ("#2d7d46", "#7a4fa3"), strict=False):
            values = [value for _, value in points]
            shown = f"{name}: {values[-1]:.3g}" + (f", at best {max(values):.3g}" if len(values) > 1 else "")
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=shown)
        axes.set_ylabel(label)
        axes.legend(loc="lower right", fontsize="small", frameon=False)
    (below or [wait])[-1].set_xlabel("optimizer step")
    for axes in (top, rate, wait, *below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    _write(path, Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))


_PANELS: tuple[tuple[str, dict[str, tuple[str, float]]], ...] = (
    ("top-1 %", {"validation": ("val_top1", 100), "test, once, with the chosen weights": ("test_top1", 100)}),
    ("top-1 %\ntest images", {"validation": ("top1", 100)}),  # of versions that chose by the test images
    ("top-1 %\nprobe", {"kNN": ("probe_knn", 100), "linear": ("probe_linear", 100)}),
    ("features'\ndeviation", {"deviation of l2-normalised features x sqrt(d)": ("probe_feature_std", 1)}),
    ("features'\nrank", {"effective rank": ("probe_effective_rank", 1)}),
)
"""What a loss curve shows below the loss, where it was measured: curves by their key and factor."""
_LOOKS = {key for _, curves in _PANELS for key, _ in curves.values()} | {"probe_seconds"}
"""Keys of rows that tell what was learned."""


def _known(
    looks: list[dict[str, Any]], curves: dict[str, tuple[str, float]]
) -> dict[str, list[tuple[int, float]]]:
    """Those curves that have a point: steps and values."""
    found = {
        name: [
            (row.get("chosen_step", row["step"]), factor * row[key])
            for row in looks
            if math.isfinite(row.get(key, math.nan))
        ]
        for name, (key, factor) in curves.items()
    }
    return {name: points for name, points in found.items() if points}


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Log points with a finite loss, and looks at what was learned: validations and probes."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill cuts the last one short
        rows = [row for row in whole if "step" in row and math.isfinite(row.get("loss", math.nan))]
        looks = [row for row in whole if "step" in row and _LOOKS & row.keys()]
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give the metrics.jsonl of a run") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise BadInput(f"{path}: not a readable metrics.jsonl ({error})") from None
    if not rows:
        raise BadInput(f"{path}: holds no step with a finite loss yet")
    return rows, looks


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Average over a centred window of about a twentieth of the values, cut off at both ends."""
    reach = max(len(values) // 40, 1)
    box = np.ones(2 * reach + 1)
    return np.convolve(values, box)[reach:-reach] / np.convolve(np.ones(len(values)), box)[reach:-reach]


def _method(objective: Objective) -> str:
    return type(objective.config).__name__.removesuffix("Config")


def _explain(objective: Objective, visible: Tensor, channels: int, statistics: Statistics) -> str:
    views, unit = len(visible), objective.encoder.unit
    hidden = 1 - visible.float().mean().item()
    plural = f"{views} views, each with {hidden:.0%}" if views > 1 else f"one view, with {hidden:.0%}"
    notes = [f"{_method(objective)}: {plural} of the {unit} x {unit} px mask units hidden (grey)."]
    notes += [objective.picture_note] if objective.picture_note else []
    if not objective.config.norm_pix:
        notes.append("Pixels are predicted as they are.")
    elif statistics == "visible":
        notes.append(
            "Hidden units get mean and contrast from the visible units nearby: nothing here was taken from "
            "hidden pixels."
        )
    else:
        notes.append(
            "CAUTION: hidden units are shown with their own true mean and contrast, which the model did not "
            "predict: this leaks the target into the picture."
        )
    if channels == 2 or channels > 3:
        notes.append(f"Shown: {'the first' if channels == 2 else 'the first three'} of {channels} channels.")
    return " ".join(notes)


def _pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised `[b, c, H, W]` to uint8 `[b, H, W, 3]` for the eye."""
    centre, scale = (images.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels = (images.float() * scale + centre).clamp(0, 1)
    pixels = pixels[:, :3] if images.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _draw(columns: list[Column], title: str, notes: str, across: int | None = None) -> Image.Image:
    """Lay out the columns under title and notes, at most so many of them `across`, the next ones below."""
    across = min(across or len(columns), len(columns))
    rows, height, width = columns[0][1].shape[:3]
    zoom = max(1.0, _CELL / max(height, width))
    cell = (round(width * zoom), round(height * zoom))
    fonts = [ImageFont.load_default(size) for size in (22, 15, 14)]
    sheet_width = 2 * _MARGIN + across * (cell[0] + _GAP) - _GAP
    room = sheet_width - 2 * _MARGIN
    title, notes = _wrap(title, fonts[0], room), _wrap(notes, fonts[2], room)
    headings = [_wrap(heading, fonts[1], cell[0]) for heading, _, _ in columns]

    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def depth(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
        return round(ruler.multiline_textbbox((0, 0), text, font=font)[3])

    notes_top = _MARGIN + depth(title, fonts[0]) + 8
    first_band = notes_top + depth(notes, fonts[2]) + 16
    to_pictures = max(depth(text, fonts[1]) for text in headings) + 8
    band = to_pictures + rows * (cell[1] + _GAP) - _GAP + _MARGIN
    sheet = Image.new("RGB", (sheet_width, first_band + -(-len(columns) // across) * band), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((_MARGIN, _MARGIN), title, _INK, fonts[0])
    draw.multiline_text((_MARGIN, notes_top), notes, _FAINT, fonts[2])
    for column, (heading, (_, pictures, shown)) in enumerate(zip(headings, columns, strict=True)):
        down, place = divmod(column, across)
        left = _MARGIN + place * (cell[0] + _GAP)
        first_row = first_band + down * band + to_pictures
        draw.multiline_text(
            (left + cell[0] / 2, first_row - 8), heading, _INK, fonts[1], anchor="md", align="center"
        )
        for row in range(rows):
            picture = Image.fromarray(pictures[row]).resize(cell, Image.Resampling.BICUBIC)
            if shown is not None:
                stencil = Image.fromarray(shown[row]).resize(cell, Image.Resampling.NEAREST)
                picture = Image.composite(picture, Image.new("RGB", cell, _HIDDEN), stencil)
            sheet.paste(picture, (left, first_row + row * (cell[1] + _GAP)))
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Break `text` between words into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _write(path: Path, picture: Image.Image) -> None:
    """Save as PNG: readers see the old picture or the new one."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    write_whole(path, lambda file: file.write(content.getvalue()))
