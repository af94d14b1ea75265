"""What every method saw and what it made of it: the same images, one row per method, in one picture.

    python benchmarks/methods/sheet.py --data DATA/class-tinyimagenet40 --out docs/methods.png

Draws the runs that `run.py` left in --work (those of seed 0, with equal images), on images of DATA's test
split, which no run has trained on. Methods that zoom in get them in as many pixels as their views have.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from run import METHODS

from coma.artifact import ArtifactConfig
from coma.config.serialization import read_config
from coma.data import open_source
from coma.data.transforms import centre_crop, normalize, resize
from coma.masking.patchify import spread, unit_grid
from coma.objectives.base import MaskedPixels
from coma.objectives.load import load_pretrained


def rows(objective: MaskedPixels, images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs with what is hidden in grey (NaN) and what was predicted of all else, `[b, c, H, W]` each.

    Of several views the first is shown as input, and of the output what views predict of what they did not
    see.
    """
    unit, (height, width) = objective.encoder.unit, images.shape[-2:]
    with torch.inference_mode():
        visible = objective.draw_visible(seeds, *unit_grid(height, width, unit))
        inputs = objective.degraded(images, seeds)
        filled = torch.stack([objective.reconstruct(inputs, view, "visible") for view in visible])
    shown = spread(visible.flatten(0, 1), unit).unflatten(0, visible.shape[:2]).unsqueeze(2)
    hidden = (~shown).float()
    predicted = (filled * hidden).sum(0) / hidden.sum(0).clamp(min=1)
    rebuilt = torch.where(hidden.sum(0) > 0, predicted, filled[0])
    return inputs.masked_fill(~shown[0], torch.nan), rebuilt


def pictures(images: Tensor, config: ArtifactConfig) -> list[object]:
    """For matplotlib."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    pixels = (images * std + mean).clamp(0, 1)
    return list(pixels.nan_to_num(0.87).permute(0, 2, 3, 1).numpy())


def main() -> None:
    """One figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="of run.py; default as there")
    parser.add_argument("--data", type=Path, required=True, help="folder with test.npz")
    parser.add_argument("--backbone", default="DyViT")
    parser.add_argument("--images", type=int, nargs="+", default=[0, 1, 2], help="which of the test split")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    work = args.work or Path("benchmarks/runs") / f"methods-{args.data.name}"
    runs = work / "equal-images" / "runs"
    found = {name: runs / f"{name}-{args.backbone}-0" / "artifact" for name in METHODS}
    found = {name: place for name, place in found.items() if place.exists()}
    if not found:
        raise SystemExit(f"{runs}: no finished run; run.py makes them")

    source, count = open_source(args.data / "test.npz"), len(args.images)
    figure = Figure(figsize=(2.2 * count + 1.4, 1.12 * (len(found) + 1)), dpi=110, layout="constrained")
    grid = figure.subplots(len(found) + 1, 2 * count, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for row, (name, place) in enumerate(found.items(), start=1):
        objective = load_pretrained(place)
        config = objective.artifact
        squares = [source.read(index, config.model.channels) for index in args.images]
        size = read_config(place.parent / "config.json").view_size
        squares = [resize(each, centre_crop(*each.shape[:2], size), *size) for each in squares]
        pixels = normalize(torch.stack(squares), config.mean, config.std)
        given, made = rows(objective, pixels, torch.arange(count))
        if row == 1:
            for column, picture in enumerate(pictures(pixels, config)):
                grid[0][2 * column].imshow(picture)
        for column, (left, right) in enumerate(
            zip(pictures(given, config), pictures(made, config), strict=True)
        ):
            grid[row][2 * column].imshow(left)
            grid[row][2 * column + 1].imshow(right)
        grid[row][0].set_ylabel(name, rotation=0, ha="right", va="center")
    for column in range(count):
        grid[0][2 * column].set_title("image", fontsize="small")
        grid[1][2 * column].set_title("input", fontsize="small")
        grid[1][2 * column + 1].set_title("rebuilt", fontsize="small")
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
