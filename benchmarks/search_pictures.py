"""The pictures of the guide to `coma embed` and `coma search`: blood cells of BCCD (MIT licence).

    python benchmarks/search_pictures.py --data DATA/det-bccd --out docs --steps 80

Pre-trains a tiny model on the training images, embeds them, and reduces the contact sheet and the map.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

COMA = (sys.executable, "-m", "coma")


def reduced(picture: Path, to: Path, width: int, colours: int) -> None:
    """Saves a picture with a palette, `width` pixels wide."""
    with Image.open(picture) as whole:
        height = round(whole.height * width / whole.width)
        small = whole.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    small.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(to, optimize=True)


def main() -> None:
    """Train, embed, search, reduce."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="det-bccd")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two pictures")
    parser.add_argument("--steps", default="80", help="steps of pre-training")
    parser.add_argument("--query", default="BloodImage_00001.jpg", help="name of the query image")
    args = parser.parse_args()
    images = args.data / "train"
    with tempfile.TemporaryDirectory() as name:
        run, features, found = (Path(name, each) for each in ("run", "features.parquet", "found"))
        train = ["pretrain", images, "--model", "tiny", "--image-size", "64", "--batch-size", "16"]
        embed = ["embed", run / "artifact", images, "--out", features]
        search = [
            "search",
            features,
            args.query,
            "--top-k",
            "5",
            "--map",
            "--map-size",
            "1000",
            "--out",
            found,
        ]
        for command in ([*train, "--steps", args.steps, "--out", run], embed, search):
            subprocess.run([*COMA, *map(str, command)], check=True)
        reduced(found / "nearest.png", args.out / "search-nearest.png", 840, 256)
        reduced(found / "map.png", args.out / "search-map.png", 640, 128)


if __name__ == "__main__":
    main()
