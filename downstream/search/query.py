"""The feature of a query: that of an image of the collection, or one that the model computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from coma.data.channels import convert_channels
from coma.data.decode import HEAD, decode, looks_like_image
from coma.data.image import DecodedImage
from coma.data.pixel_values import check_pixels
from coma.data.remote import read_small_file
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.messages import printable
from coma.paths import Address, Location, parse_location
from coma.preflight import check_regular_file
from downstream.features.files import FeaturesFile
from downstream.features.models import FeatureModel, FeatureRequest, open_feature_model
from downstream.search.collection import SIDE, Collection
from downstream.search.pictures import picture_of, read_image_file
from downstream.search.vectors import unit

_LARGEST = 1 << 28
"""Bytes of a remote image that are read at most."""


@dataclass(frozen=True)
class Query:
    """A query.

    Attributes:
        text: What was asked for.
        vector: Its feature, as a unit vector `[c]`.
        row: File and path, if it is an image of the collection.
        picture: Returns its picture.
    """

    text: str
    vector: np.ndarray
    row: tuple[int, str] | None
    picture: Callable[[], Image.Image | None]


def find_query(text: str, collection: Collection, request: FeatureRequest) -> Query:
    """Returns a query.

    Args:
        text: An image file or its address, or the path of an image of the collection.
        collection: The images and features to search.
        request: The model for other images; an empty name stands for the one that the collection names.

    Raises:
        BadInput: it is neither, its file is not an image, or the model is another one.
    """
    path = parse_location(text) if "://" in text else Path(text)
    if isinstance(path, Address):
        return _computed(path, collection.files[0], request)
    there = bool(text.strip()) and "\0" not in text and os.path.lexists(path)
    for number, (file, album) in enumerate(zip(collection.files, collection.albums, strict=True)):
        name = os.path.relpath(path.resolve(), album.location.resolve()) if there else text
        if name in file.paths():
            values = next(rows.values[rows.paths.index(name)] for rows in file.groups() if name in rows.paths)
            vector = unit(values[None], file.path)[0]
            return Query(text, vector, (number, name), partial(album.thumbnail, name, SIDE))
    if not there:
        first = collection.files[0].path
        raise BadInput(f"{printable(text)}: is neither an image file nor the path of an image in {first}")
    return _computed(path, collection.files[0], request)


def _content(path: Location) -> bytes:
    if isinstance(path, Path):
        check_regular_file(path, "give an image file")
        return read_image_file(path.parent, path.name)
    content = read_small_file(path, most=_LARGEST)
    if content is None:
        raise BadInput(f"{path}: there is no such file, or it may not be read; give the address of an image")
    if not looks_like_image(content[:HEAD]):
        raise BadInput(f"{path}: is not an image; give the address of an image file")
    return content


def _computed(path: Location, file: FeaturesFile, request: FeatureRequest) -> Query:
    image = decode(_content(path), str(path))
    spec = file.info.spec
    given = request.model
    request = replace(
        request, model=given or spec.model, stage=spec.stage, image_size=ImageSize(*spec.image_size)
    )
    try:
        model = open_feature_model(request)
    except BadInput as error:
        hint = "" if given else "; --model names the model if it was moved"
        raise BadInput(f"the query needs the model of {file.path}: {error}{hint}") from None
    if reason := spec.difference(model.spec):
        flag = f"--model {given}" if given else spec.model
        raise BadInput(f"{flag}: {file.path} holds features of {reason}; give the model that made them")
    return Query(str(path), feature_of(image, model, str(path)), None, lambda: picture_of(image.pixels, SIDE))


def feature_of(image: DecodedImage, model: FeatureModel, name: str) -> np.ndarray:
    """Returns the feature of an image as a unit vector `[c]`.

    Args:
        image: The image.
        model: Model that computes it.
        name: Name of the image, for errors.

    Raises:
        BadImage: its channels or values do not fit the model.
    """
    pixels = convert_channels(image, model.channels, name)
    rule = model.preprocessing
    check_pixels(pixels, rule.mean, rule.std, lambda: name, fixed=True)
    return unit(model([model.resize(pixels)]), name)[0]
