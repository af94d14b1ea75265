"""From click to picture: how long the page of `coma demo` takes, asked by a program as a browser asks it.

Every click hides half of a photograph with another seed, rebuilds it from both views, draws and saves the
pictures, and ends when all of them have come back. Models have random weights, which take as long as others.

    python benchmarks/demo_page.py --out benchmarks/results/demo_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import skimage
from machine import report

from coma.artifact import ArtifactConfig, library_versions, save_artifact
from coma.config import CoMAConfig, dyvit_preset
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.objectives import build_objective
from demo.commands.demo import load_models, serve

SIZES = {"tiny": 64, "base": 224}
"""Pixels of a side, as the quickstart and the presets have them."""


def artifact(folder: Path, preset: str) -> Path:
    """A pre-trained artifact with random weights."""
    model, objective = dyvit_preset(preset, SIZES[preset]), CoMAConfig()
    about = ArtifactConfig(
        kind="pretrained",
        model=model,
        objective=objective,
        image_size=ImageSize.of(SIZES[preset]),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        class_names=None,
        trained={},
        versions=library_versions(),
    )
    module = build_objective(objective, build_encoder(model))
    save_artifact(folder / preset / "artifact", tensors=module.state_dict(), config=about)
    return folder / preset / "artifact"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clicks", type=int, default=9, help="of each model and method")
    parser.add_argument("--out", type=Path, help="also write the table here, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = load_models(tuple(artifact(folder, preset) for preset in SIZES), "cpu")
        page = serve(models, folder / "uploads")
        from gradio_client import Client, handle_file

        client = Client(page.local_url, verbose=False, download_files=str(folder / "results"))
        picture = handle_file(str(Path(skimage.__file__).parent / "data" / "coffee.png"))
        rows = []
        for preset in SIZES:
            for method in ("coma", "coma4", "mae"):
                seconds: list[float] = []
                facts: dict[str, float] = {}
                for seed in range(given.clicks + 1):
                    began = time.perf_counter()
                    facts = client.predict(
                        picture, preset, method, 0.75, seed, "crop", "PyTorch", "visible", None,
                        api_name="/reconstruct",
                    )[-1]  # fmt: skip
                    seconds.append(time.perf_counter() - began)
                first, *others = seconds
                rows.append(
                    {
                        "model": f"{preset}, {SIZES[preset]} px",
                        "method": method,
                        "first click": f"{first:.2f} s",
                        "median": f"{statistics.median(others):.2f} s",
                        "slowest": f"{max(others):.2f} s",
                        "of which the model": f"{facts['milliseconds'] / 1000:.2f} s",
                    }
                )
                print(rows[-1], flush=True)
        page.close(verbose=False)
    from importlib.metadata import version

    how = f"{given.clicks} clicks after the first, gradio {version('gradio')}, upload and download included"
    report(how, rows, given.out)


if __name__ == "__main__":
    main()
