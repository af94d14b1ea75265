"""Sheets of predictions on validation images: cells found by a detector, streets seen by a segmentor.

    python benchmarks/predictions.py --data DATA --detector ARTIFACT --segmentor ARTIFACT --out docs

DATA holds det-bccd and camvid-mini. Streets: image, truth, prediction.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def predict(task: str, artifact: Path, images: Sequence[Path], folder: Path, *options: str) -> list[Path]:
    """Folders that `coma detect predict` or `coma segment predict` left, one for each image."""
    outs = [folder / f"{task}-{image.stem}" for image in images]
    for image, out in zip(images, outs, strict=True):
        command = [sys.executable, "-m", "coma", task, "predict", str(artifact), str(image)]
        subprocess.run([*command, "--out", str(out), *options], check=True)
    return outs


def sheet(rows: Sequence[Sequence[Image.Image]], path: Path, width: int = 320) -> None:
    """Pictures of one shape, side by side and below each other."""
    height = max(round(width * image.height / image.width) for row in rows for image in row)
    whole = Image.new("RGB", (len(rows[0]) * (width + 4) - 4, len(rows) * (height + 4) - 4), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            whole.paste(small, (x * (width + 4), y * (height + 4)))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path)


def main() -> None:
    """Predict and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="det-bccd and camvid-mini lie here")
    parser.add_argument("--detector", type=Path, required=True)
    parser.add_argument("--segmentor", type=Path, required=True)
    parser.add_argument("--score", default="0.5", help="least score of a box that is drawn")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two pictures")
    args = parser.parse_args()
    cells = sorted((args.data / "det-bccd" / "val").iterdir())[:40:13][:3]
    streets = sorted((args.data / "camvid-mini" / "img_dir" / "val").iterdir())[::11][:3]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = predict("detect", args.detector, cells, folder, "--threshold", args.score)
        sheet(
            [[Image.open(next((out / "pictures").iterdir())) for out in found]], args.out / "detections.png"
        )
        rows = []
        for image, out in zip(streets, predict("segment", args.segmentor, streets, folder), strict=True):
            predicted = Image.open(next((out / "labels").iterdir()))
            labels = args.data / "camvid-mini" / "ann_dir" / "val" / f"{image.stem}.png"
            truth = Image.open(labels).convert("L")
            truth.putpalette(predicted.getpalette() or [])
            rows.append([Image.open(image), truth, predicted])
        sheet(rows, args.out / "segmentations.png")


if __name__ == "__main__":
    main()
