"""Datasets of drawn shapes in the formats of downstream, and artifacts of very small encoders."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export_files import about
from PIL import Image, ImageDraw

from coma.artifact import save_artifact
from coma.config import DyViTConfig, EncoderConfig, ViTConfig
from coma.models import build_encoder
from downstream.openmmlab.op_registry import register_ops

DYVIT = DyViTConfig(dim=8, depths=(1, 1, 2, 1), heads=(2, 2, 2, 2), windows=((4, 8), (4,), (0, 2), (0,)))
VIT = ViTConfig(patch=16, dim=16, depth=2, heads=2)
COLOURS = {"square": (220, 40, 40), "disc": (40, 60, 220)}


SMALL = ["--head-channels", "32", "--short-side", "64", "--batch-size", "2", "--workers", "0"]
"""Options of small detectors."""


def artifact(directory: Path, model: EncoderConfig = DYVIT, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = about(
        "backbone", model, model.unit * 2, mean=(0.4,) * model.channels, std=(0.2,) * model.channels
    )
    save_artifact(directory, tensors=build_encoder(model).state_dict(), config=config)
    return directory


def shapes(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, Image.Image, list[dict]]:
    """A picture with a square and a disc, its label map, and its objects."""
    noise = rng.integers(90, 160, (height, width, 3), dtype=np.uint8)
    picture, labels = Image.fromarray(noise), Image.new("L", (width, height), 0)
    objects = []
    for number, name in enumerate(COLOURS, start=1):
        side = int(rng.integers(20, 32))
        left = int(rng.integers(0, width // 2 - side)) + (number - 1) * width // 2
        top = int(rng.integers(0, height - side))
        box = (left, top, left + side, top + side)
        for image, colour in ((picture, COLOURS[name]), (labels, number)):
            draw = ImageDraw.Draw(image)
            (draw.rectangle if name == "square" else draw.ellipse)(box, fill=colour)
        polygon = [left, top, left + side, top, left + side, top + side, left, top + side]
        objects.append({"category_id": number, "bbox": [left, top, side, side], "segmentation": [polygon]})
    return picture, labels, objects


def coco(
    root: Path, train: int = 6, val: int = 3, masks: bool = True, size: tuple[int, int] = (96, 64)
) -> Path:
    """`annotations/{train,val}.json` and images beside."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(1, count + 1):
            picture, _, objects = shapes(rng, *size)
            picture.save(root / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
            for each in objects:
                area = each["bbox"][2] * each["bbox"][3]
                record = {"id": len(annotations) + 1, "image_id": i, "iscrowd": 0, "area": area, **each}
                annotations.append(record if masks else {**record, "segmentation": []})
        categories = [{"id": n, "name": name} for n, name in enumerate(COLOURS, start=1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def labelled(root: Path, train: int = 6, val: int = 3, size: tuple[int, int] = (96, 64)) -> Path:
    """`img_dir/{train,val}`, `ann_dir/{train,val}` and `classes.json`."""
    rng = np.random.default_rng(1)
    for split, count in (("train", train), ("val", val)):
        for folder in ("img_dir", "ann_dir"):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            picture, labels, _ = shapes(rng, *size)
            picture.save(root / "img_dir" / split / f"{i}.png")
            labels.save(root / "ann_dir" / split / f"{i}.png")
    (root / "classes.json").write_text(json.dumps({"classes": ["ground", *COLOURS]}))
    return root


def provided_ops() -> Any:
    """`mmcv.ops`, imported after the operators were provided to an mmcv that was there before."""
    importlib.import_module("mmcv")
    register_ops()
    return importlib.import_module("mmcv.ops")
