"""From click to picture: how long the page of `coma demo` takes, asked by programs as browsers ask it.

Every click hides half of a photograph with another seed, rebuilds it from both views, draws and saves the
pictures, and ends when all of them have come back. The models are tiny-64 and a `base` with random weights,
which takes as long as others. Then `--clients` programs click once on tiny-64 at the same moment.

    python benchmarks/demo_page.py --out benchmarks/results/demo_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import skimage
from machine import report

from coma.artifact import ArtifactConfig, library_versions, save_artifact
from coma.config import CoMAConfig, dyvit_preset
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.objectives import build_objective
from coma.paths import SHIPPED, artifact_directory
from demo.commands.demo import load_models, serve

SIZES = {SHIPPED: 64, "base": 224}
"""Pixels of a side, by the name of the model."""
METHODS = ("coma", "coma4", "mae")


def random_artifact(folder: Path, preset: str) -> Path:
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


def click(client: Any, model: str, method: str, seed: int) -> tuple[float, dict[str, Any]]:
    """Seconds of a click, and the numbers of its result."""
    from gradio_client import handle_file

    picture = handle_file(str(Path(skimage.__file__).parent / "data" / "coffee.png"))
    settings = (model, method, 0.75, seed, "crop", "PyTorch", "visible", None)
    began = time.perf_counter()
    facts = client.predict(picture, *settings, api_name="/reconstruct")[-1]
    return time.perf_counter() - began, facts


def connect(page: Any, folder: Path) -> Any:
    """A program that asks the page."""
    from gradio_client import Client

    return Client(page.local_url, verbose=False, download_files=str(folder / "results"))


def clicks(page: Any, folder: Path, model: str, method: str, count: int) -> dict[str, str]:
    """A row of one visitor who clicks again and again."""
    client = connect(page, folder)
    found = [click(client, model, method, seed) for seed in range(count + 1)]
    first, *others = (seconds for seconds, _ in found)
    row = {"model": f"{model}, {SIZES[model]} px", "method": method, "first click": f"{first:.2f} s"}
    row |= {"median": f"{statistics.median(others):.2f} s", "slowest": f"{max(others):.2f} s"}
    row |= {"of which the model": f"{found[-1][1]['milliseconds'] / 1000:.2f} s"}
    print(row, flush=True)
    return row


def crowd(page: Any, folder: Path, count: int) -> dict[str, str]:
    """A row of visitors who click at the same moment; each must get the picture of its own seed."""
    clients = [connect(page, folder) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda pair: click(pair[1], SHIPPED, "coma", pair[0]), enumerate(clients)))
    right = sum(facts["seed"] == seed for seed, (_, facts) in enumerate(found))
    seconds = [each for each, _ in found]
    row = {"model": f"{SHIPPED}: {count} visitors at once, {right} served", "method": "coma"}
    return row | {"median": f"{statistics.median(seconds):.2f} s", "slowest": f"{max(seconds):.2f} s"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clicks", type=int, default=9, help="of each model and method")
    parser.add_argument("--clients", type=int, default=20, help="that click at the same moment")
    parser.add_argument("--out", type=Path, help="also write the table here, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifacts = [artifact_directory(SHIPPED), random_artifact(folder, "base")]
        page = serve(load_models(tuple(artifacts), "cpu"), folder / "uploads")
        rows = [clicks(page, folder, model, method, given.clicks) for model in SIZES for method in METHODS]
        rows.append(crowd(page, folder, given.clients))
        page.close(verbose=False)
    from importlib.metadata import version

    how = f"{given.clicks} clicks after the first, gradio {version('gradio')}, upload and download included"
    report(how, rows, given.out)


if __name__ == "__main__":
    main()
