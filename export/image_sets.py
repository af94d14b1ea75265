"""Image sets: the images that verify, calibrate or time a model, and those that are left out, with reasons.

Broken files, images of a single colour and duplicates add nothing to a comparison, so other images of the
source replace them. An image set with too few usable images is refused.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import numpy as np

from coma.data.sources.base import Source
from coma.errors import BadImage, BadInput
from coma.messages import counted
from coma.runtimes.manifest import Selection
from export.preprocessing import Photographs, evenly_spaced

log = logging.getLogger(__name__)

_CANDIDATES = 4
"""Maximum number of images to read for each image of the set."""


@dataclass(frozen=True)
class Purpose:
    """Purpose of an image set, and the number of images that it needs.

    Attributes:
        flag: Flag that names the source.
        count_flag: Flag for the number of images; a number below `least` accepts that few.
        least: Minimum number of usable images.
        advised: A smaller set causes a warning.
        distinct: Whether duplicates and images of a single colour are left out.
    """

    flag: str
    count_flag: str | None
    least: int
    advised: int
    distinct: bool = True


VERIFICATION = Purpose("--verify", "--verify-images", least=4, advised=4)
CALIBRATION = Purpose("--calibrate", "--calibrate-images", least=8, advised=32)
TIMING = Purpose("--images", None, least=1, advised=1, distinct=False)


@dataclass(frozen=True)
class ImageSet:
    """Decoded images.

    Attributes:
        selection: Source of the images, and those that are left out.
        pictures: Pixels `[H, W, c]`.
        names: Names of the images in messages.
        files: Contents of the image files; empty if the source has no files.
    """

    selection: Selection
    pictures: tuple[np.ndarray, ...]
    names: tuple[str, ...] = ()
    files: tuple[bytes, ...] = ()


def read_image_set(source: Source, channels: int, most: int, purpose: Purpose = VERIFICATION) -> ImageSet:
    """Reads up to `most` usable images, evenly spaced over the source, and logs which ones are left out.

    Raises:
        BadInput: fewer than `purpose.least` images are usable (or than `most`, if that is smaller).
    """
    location = "scikit-image" if isinstance(source, Photographs) else str(source.location)
    wider = evenly_spaced(len(source), most * _CANDIDATES)
    numbers = list(dict.fromkeys(evenly_spaced(len(source), most) + wider))[: len(wider)]
    used: list[int] = []
    pictures: list[np.ndarray] = []
    left_out: dict[str, str] = {}
    known: dict[bytes, str] = {}
    for number in numbers:
        if len(pictures) == most:
            break
        name = name_in(source, number)
        try:
            picture = source.read(number, channels)
        except BadImage as error:
            left_out[name] = reason_of(error, source, number)
            continue
        if purpose.distinct:
            content = _content(picture)
            if (picture == picture[:1, :1]).all():
                left_out[name] = "a single colour"
            elif content in known:
                left_out[name] = f"the same pixels as {known[content]}"
            if name in left_out:
                continue
            known[content] = name
        used.append(number)
        pictures.append(picture)
    selection = Selection(location, len(pictures), len(source), left_out)
    _check(selection, most, purpose)
    encoded = [source.read_bytes(number) for number in used] if purpose is TIMING else []
    files = tuple(each for each in encoded if each is not None)
    names = tuple(map(source.describe, used))
    return ImageSet(selection, tuple(pictures), names, files if len(files) == len(pictures) else ())


def shared_images(one: ImageSet, other: ImageSet) -> int:
    """Returns the number of images that are in both sets."""
    return len({_content(each) for each in one.pictures} & {_content(each) for each in other.pictures})


def name_in(source: Source, number: int) -> str:
    """Returns the name of an image within its source."""
    return source.describe(number).removeprefix(f"{source.location}/")


def reason_of(error: BadImage, source: Source, number: int) -> str:
    """Returns why an image cannot be read, without its name."""
    return str(error).removeprefix(f"{source.describe(number)}: ")


def _check(found: Selection, most: int, purpose: Purpose) -> None:
    """Refuses a set that is too small; warns about a small set and about images that are left out.

    Raises:
        BadInput: too few images are usable.
    """
    place = f"{purpose.flag} {found.location}"
    if found.used < min(purpose.least, most):
        looked_at = counted(found.used + len(found.left_out), "image")
        left_out = f", left out are {found.names}" if found.left_out else ""
        least = counted(min(purpose.least, most), "different image")
        remedy = f"give {least} or more with {purpose.flag}"
        if found.used and purpose.count_flag:
            remedy += f", or accept {found.used} with {purpose.count_flag} {found.used}"
        raise BadInput(f"{place}: {found.used} of {looked_at} can be used{left_out}; {remedy}")
    if found.left_out:
        used, left_out = counted(found.used, "image"), len(found.left_out)
        log.warning("%s: %s used, %d left out: %s", place, used, left_out, found.names)
    if found.used < purpose.advised:
        log.warning(
            "%s: %s only; at least %d different ones are advised",
            place,
            counted(found.used, "image"),
            purpose.advised,
        )


def _content(picture: np.ndarray) -> bytes:
    about = f"{picture.shape} {picture.dtype}".encode()
    return hashlib.sha256(about + np.ascontiguousarray(picture).tobytes()).digest()
