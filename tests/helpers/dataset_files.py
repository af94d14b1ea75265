"""Files of small datasets, and what is said when they are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coma.errors import BadInput


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
