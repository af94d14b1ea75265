"""Says whether a picture was among the images that a model was trained on.

A run directory lists its images (`coma.data.listing`); pictures are compared with them by file name and size
in bytes. A changed copy is therefore not recognised, and a model without a list is said to be unknown.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coma.data.listing import read_listing
from coma.errors import BadInput
from coma.paths import artifact_directory

ROLE = "images"
"""Role of the training images in the listing."""


class TrainingImages:
    """The images of a run, kept as hashes: 8 bytes for each.

    Args:
        artifact: The `artifact` directory of a run.

    Raises:
        BadInput: the run has no list of its images, or it is damaged.
    """

    def __init__(self, artifact: Path) -> None:
        listed = (read_listing(artifact_directory(artifact).resolve().parent) or {}).get(ROLE)
        if listed is None:
            raise BadInput(f"{artifact}: no list of training images beside it")
        pairs = zip(listed["names"], listed["sizes"], strict=True)
        self._hashes = np.array([_hash(name, size) for name, size in pairs], np.int64)

    def __contains__(self, file: tuple[str, int]) -> bool:
        """Returns whether an image has this file name and this size in bytes."""
        return bool((self._hashes == _hash(*file)).any())


def _hash(name: str, size: int) -> int:
    """Returns a hash of the letters and digits of a file name, all that gradio's uploads keep of it."""
    return hash(("".join(filter(str.isalnum, Path(name).name)), size))
