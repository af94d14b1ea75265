"""The nearest pictures of a file of `coma embed`, which the operator names with `coma demo --search FILE`.

The feature of a visitor's picture comes from a model of the page, the one whose weights made the file.
Visitors get thumbnails of images that the file lists, drawn anew, and their file names; nothing else is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coma.artifact.load import artifact_hash
from coma.data.image import DecodedImage
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.messages import counted
from coma.paths import artifact_directory
from demo.models import Models
from downstream.features.models import FeatureRequest, open_feature_model
from downstream.search.collection import open_collection, short_name
from downstream.search.neighbours import nearest
from downstream.search.query import feature_of
from downstream.search.vectors import unit_parts

MOST = 24
"""Most pictures that one request returns."""
_TRIED = 16
"""Pictures that are opened at the start, about: one of them must be there."""
SIDE = 256
"""Longer side of a thumbnail in pixels."""


@dataclass(frozen=True)
class FoundPicture:
    """A picture of the file: its name, its cosine similarity, and a thumbnail, uint8 `[H, W, 3]`."""

    name: str
    similarity: float
    thumbnail: np.ndarray


class PictureSearch:
    """A file of features, in memory, and the model that made it.

    Args:
        file: File of `coma embed`.
        models: Models of the page.

    Raises:
        BadInput: the file or its images cannot be read, or no model of the page made it.
    """

    def __init__(self, file: Path, models: Models) -> None:
        collection = open_collection([file])
        spec = collection.files[0].info.spec
        known = [models[name] for name in models.names]
        made = next(
            (each for each in known if each.artifact and artifact_hash(each.artifact) == spec.sha256), None
        )
        if made is None:
            raise BadInput(
                f"--search {file}: its features come from {spec.model}, which is not on the page; name the "
                "artifact that made them as a MODEL"
            )
        size, source = ImageSize(*spec.image_size), str(artifact_directory(str(made.artifact)))
        self._model = open_feature_model(FeatureRequest(source, spec.stage, image_size=size))
        if reason := spec.difference(self._model.spec):
            raise BadInput(f"--search {file}: holds features of {reason}; run coma embed again")
        (self._album,) = collection.albums
        self._parts = list(unit_parts(collection.files))
        self.title = f"{made.name} finds the most similar of {counted(len(collection), 'picture')}."
        paths = [path for _, part in self._parts for path in part.paths]
        tried = paths[:: max(1, len(paths) // _TRIED)]
        if all(self._album.thumbnail(path, SIDE) is None for path in tried):
            raise BadInput(
                f"--search {file}: its images cannot be read: {self._album.failures[0]}; run coma embed "
                "again where they are now"
            )
        self._album.failures.clear()

    @property
    def channels(self) -> int:
        """Returns the number of channels of the pictures."""
        return self._model.channels

    def nearest(self, pixels: np.ndarray, most: int) -> list[FoundPicture]:
        """Returns the most similar pictures, the nearest first; those that no longer exist are left out.

        Args:
            pixels: `[H, W, channels]`, uint8, or float32 in 0..1.
            most: Number of pictures, at most `MOST`.
        """
        vector = feature_of(DecodedImage(pixels, alpha=False), self._model, "picture")
        found = []
        for hit in nearest(self._parts, vector, min(most, MOST)):
            thumbnail = self._album.thumbnail(hit.path, SIDE)
            if thumbnail is not None:
                found.append(FoundPicture(short_name(hit.path), hit.similarity, np.asarray(thumbnail)))
        self._album.failures.clear()
        return found
