"""Folders of pictures, and what a search for images says of them."""

import os
from pathlib import Path

import pytest
from encoded_images import COLOUR, encoded
from PIL import Image

from coma.data.sources.image_folder import FolderSource

TINY = ["--model", "tiny", "--image-size", "32", "--batch-size", "2", "--device", "cpu", "--workers", "0"]


def save(path: Path, kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.fromarray(COLOUR), kind))
    return path


def found(folder: Path) -> list[str]:
    source = FolderSource(folder)
    return [os.path.relpath(source.path(i), folder) for i in range(len(source))]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines that were to be written once, and forgets them."""
    lines = [record.getMessage() for record in caplog.records if getattr(record, "once", False)]
    caplog.clear()
    return lines
