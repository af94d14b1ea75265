"""Fine-tuning runs of a few steps on pictures of three colours."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from short_runs import MODEL

from coma.artifact import LINEAR_HEAD, MULTI_LABEL, ArtifactConfig, library_versions, save_artifact
from coma.config import FinetuneConfig, FinetuneDataConfig, FinetuneRecipe, FinetuneRunConfig
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.models.classifiers import build_classifier

COLOURS = ("blue", "green", "red")
TAGS = ("dark", "green", "red")


def paint(folder: Path, count: int, seed: int) -> None:
    """Noisy pictures in class folders, each a little brighter in the colour of its class."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        colour = number % 3
        pixels = rng.integers(0, 200, (20, 20, 3))
        pixels[:, :, 2 - colour] += 55
        path = folder / COLOURS[colour] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def paint_one(folder: Path, colour: str, count: int) -> None:
    """Noisy pictures of one colour."""
    rng = np.random.default_rng(count)
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 200, (18, 18, 3))
        pixels[:, :, ("red", "green", "blue").index(colour)] += 55
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


def publish(path: Path, model: Any = MODEL, kind: Any = "backbone") -> Path:
    """An artifact with an encoder that has learned nothing."""
    torch.manual_seed(3)
    c = model.channels
    about = ArtifactConfig(
        kind, model, None, ImageSize.of(16), (0.5,) * c, (0.25,) * c, None, {}, library_versions()
    )
    save_artifact(path, tensors=build_encoder(model).state_dict(), config=about)
    return path


def fill(folder: Path) -> Path:
    """A folder with `data` (12, 6 and 9 pictures of three colours) and `artifact`."""
    paint(folder / "data" / "train", 12, seed=0)
    paint(folder / "data" / "val", 6, seed=4)
    paint(folder / "data" / "test", 9, seed=1)
    publish(folder / "artifact")
    return folder


def seven_steps(place: Path) -> FinetuneConfig:
    """Seven steps with everything that a resumed run has to restore; validated after 3, 6 and 7."""
    return FinetuneConfig(
        artifact=place / "artifact",
        data=FinetuneDataConfig(place / "data", workers=0),
        optimizer=FinetuneRecipe(
            steps=7,
            batch_size=4,
            micro_batch=2,
            base_lr=0.1,
            ema_decay=0.5,
            drop_path=0.3,
            random_erasing=0.5,
        ),
        run=FinetuneRunConfig(Path("run"), device="cpu", save_steps=2, log_steps=3),
    )


def to(config: FinetuneConfig, out: Path, **recipe: Any) -> FinetuneConfig:
    return replace(config, run=replace(config.run, out=out), optimizer=replace(config.optimizer, **recipe))


def without_val(short: FinetuneConfig, place: Path, out: Path, **recipe: Any) -> FinetuneConfig:
    """The same without a val split."""
    config = to(short, out, **recipe)
    data = replace(config.data, images=place / "data" / "train")
    return replace(config, data=data, test=place / "data" / "test")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def save_classifier(path: Path, names: tuple[str, ...] = COLOURS, *, multi_label: bool = False) -> Path:
    """A classifier with random weights."""
    torch.manual_seed(3)
    head = LINEAR_HEAD | ({MULTI_LABEL: True} if multi_label else {})
    about = ArtifactConfig(
        "classifier",
        MODEL,
        None,
        ImageSize.of(16),
        (0.5,) * 3,
        (0.25,) * 3,
        names,
        {},
        library_versions(),
        head,
    )
    save_artifact(path, tensors=build_classifier(MODEL, len(names)).state_dict(), config=about)
    return path


def tag(folder: Path, counts: dict[str, int]) -> Path:
    """Pictures that are red, green, both or dark, with a CSV file per split."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        lines = ["image,labels"]
        for number in range(count):
            tags = [name for name, bit in zip(TAGS[1:], (1, 2), strict=True) if number & bit] or ["dark"]
            pixels = rng.integers(0, 60, (18, 18, 3))
            pixels[:, :, 0] += 150 * ("red" in tags)
            pixels[:, :, 1] += 150 * ("green" in tags)
            path = folder / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            lines.append(f"{split}/{number}.png,{';'.join(tags)}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder
