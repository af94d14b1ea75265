"""Files of small datasets, and what is said when they are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coma.errors import BadInput

Content = dict[str, Any]


def save(path: Path, size: tuple[int, int] = (40, 30), orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (90, 120, 30)).save(path, exif=exif)
    return path


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(BadInput) as caught:
        action()
    return str(caught.value)


def coco(images: int = 2) -> Content:
    """Images 1, 2, ... of 40 x 30 pixels, each with a cat (10 n + 1) and a dog (10 n + 2)."""

    def thing(number: int, image: int, category: int) -> Content:
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": [4, 5, 20, 10],
            "area": 200,
            "iscrowd": 0,
            "segmentation": [[4, 5, 24, 5, 24, 15, 4, 15]],
        }

    numbers = range(1, images + 1)
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in numbers],
        "annotations": [thing(10 * n + c, n, c) for n in numbers for c in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
