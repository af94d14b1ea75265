"""A small dataset in COCO's format."""

from pathlib import Path

import pytest
from dataset_files import coco, save, write


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    """A folder with a train split that has nothing wrong."""
    write(tmp_path / "annotations" / "train.json", coco())
    for n in (1, 2):
        save(tmp_path / "train" / f"{n}.jpg")
    return tmp_path
