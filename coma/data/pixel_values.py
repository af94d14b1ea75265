"""Pixels that do not fit the mean and standard deviation they are normalised with, or each other.

Integer pixels are scaled to 0..1; floats stay as they are, in whatever unit. So statistics of 0..255 turn
8-bit images into constants, and so do floats of 0..255 among them. Both are refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from coma.data.channels import convert_channels
from coma.data.decode_arrays import max_value
from coma.data.image import DecodedImage
from coma.data.shuffle import sample_indices
from coma.data.sources.base import Source
from coma.errors import BadImage, BadInput
from coma.messages import counted

log = logging.getLogger(__name__)

_LOOKED_AT = 16
"""Images that are looked at before anything begins."""
_FAR = 30.0
"""Standard deviations between the mean of an image and that of all from which on their units differ."""
_MARKS = (-32768.0, -32767.0, -99999.0, -9999.0, -999.0)
"""What rasters commonly write where they know nothing."""
_HUGE = 1e9
"""Larger values than any measurement: netCDF and others write 9.97e36 or 1e20 where they know nothing."""


class Values(NamedTuple):
    """The range of one image."""

    name: str
    kind: str
    """8-bit, 16-bit or float."""
    low: float
    """Smallest value, as it is stored."""
    high: float
    """Largest value, as it is stored."""
    contrast: float
    """Standard deviation of the values, integers scaled to 0..1."""

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {self.low:.4g} to {self.high:.4g})"


def values_of(pixels: np.ndarray, name: str, contrast: float) -> Values:
    """Returns the range of an image's pixels `[H, W, C]`, whose contrast is known."""
    kind = {1: "8-bit", 2: "16-bit"}.get(pixels.dtype.itemsize, "float")
    return Values(name, kind, float(pixels.min()), float(pixels.max()), contrast)


def check_pixels(
    pixels: np.ndarray,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    name: Callable[[], str],
    *,
    fixed: bool = False,
) -> None:
    """Refuses an image that the mean and standard deviation are not meant for.

    Args:
        pixels: `[H, W, C]`, as they are stored.
        mean: Mean per channel that the pixels will be normalised with; None where it is not known yet.
        std: Standard deviation per channel; None where it is not known yet.
        name: Gives the image's name.
        fixed: The mean and standard deviation are those of a trained model, so only the images can change.

    Raises:
        BadInput: statistics of larger values than the image's, or the other way round, or a mark for missing
            values that is not declared.
    """
    if pixels.dtype != np.float32:
        if mean and std and max(*mean, *std) > 1:
            raise BadInput(_too_large(pixels, mean, std, name(), fixed))
        return
    low, high = float(pixels.min()), float(pixels.max())
    for mark in (low, high):
        others = pixels[pixels != mark] if mark in _MARKS or abs(mark) > _HUGE else pixels[:0]
        if others.size and abs(others - mark).min() > 10 * others.std(dtype=np.float64):
            raise BadInput(
                f"{name()}: {pixels.size - others.size} of {pixels.size} values are {mark:g}, far from all "
                "others; if they are missing, save them as NaN or declare them "
                f"(gdal_edit.py -a_nodata {mark:g} FILE)"
            )
    if mean and std and min(mean) >= 0 and max(*mean, *std) <= 1:
        far = np.abs(pixels.mean(axis=(0, 1), dtype=np.float64) - mean) / std
        if far.max() > _FAR:
            otherwise = "" if fixed else ", or all images in the unit of this one"
            raise BadInput(
                f"{name()}: float values of {low:.4g} to {high:.4g}, but mean ({format_values(mean)}) "
                f"and standard deviation ({format_values(std)}) are of values in 0..1; save such images scaled "
                f"to 0..1{otherwise}"
            )


def check_sample(
    source: Source, channels: int, mean: Sequence[float], std: Sequence[float], *, fixed: bool = False
) -> None:
    """Checks a few images, spread over the source, by `check_pixels`; says how many had values filled.

    Raises:
        BadInput: as `check_pixels`.
    """
    filled = looked_at = 0
    for i in sample_indices(len(source), _LOOKED_AT):
        try:
            name = source.describe(i)
            picture = source.decode(i)
            check_pixels(
                convert_channels(picture, channels, name), mean, std, lambda name=name: name, fixed=fixed
            )
        except BadImage:
            continue
        looked_at += 1
        filled += picture.missing is not None
    say_filled(source, filled, looked_at)


def say_filled(source: Source, filled: int, looked_at: int, share: float | None = None) -> None:
    """Logs how many images had missing values, where there are any."""
    if filled:
        of_them = "" if share is None else f" ({share:.2%} of all values)"
        log.info(
            f"{source.location}: {filled} of {counted(looked_at, 'image')} looked at hold nodata, NaN or "
            f"infinite values{of_them}; they are filled with the mean of their channel",
            extra={"once": True},
        )


def filled_share(picture: DecodedImage) -> str:
    """Returns how much of a picture was missing, for messages."""
    share = 0.0 if picture.missing is None else picture.missing.mean()
    return f"{share:.2%} of its values are nodata, NaN or infinite; filled with the mean of their channel"


def check_mixture(location: object, images: Sequence[Values]) -> None:
    """Refuses images of units that do not go together: some would be constants beside the others.

    Raises:
        BadInput: naming an image of each unit.
    """
    images = [image for image in images if image.contrast > 0]
    floats = [image for image in images if image.kind == "float"]
    bytes_ = [image for image in images if image.kind == "8-bit"]
    words = [image for image in images if image.kind == "16-bit"]
    counts = bytes_ or words
    other_unit = [image for image in floats if image.high > 2 or image.low < -0.25]
    if counts and other_unit:
        raise BadInput(
            f"{location}: {counts[0]} and {other_unit[0]} are of different units: integers are scaled to "
            f"0..1, floats are not; save the float images ({len(other_unit)} of {len(images)} looked at) "
            "scaled to 0..1, or train on them separately"
        )
    anyway = "save them in one range, or give --mean and --std to train nevertheless"
    unit = [image for image in floats if image.low >= 0 and image.high <= 1 and image.contrast > 0.02]
    large = [image for image in floats if image.low >= 0 and image.high > 32]
    if unit and large and len(unit) + len(large) == len(floats):
        raise BadInput(f"{location}: {unit[0]} and {large[0]} are of different units; {anyway}")
    if bytes_ and words and max(image.high for image in words) < 2**13:
        usual, dark = (np.median([image.contrast for image in each]) for each in (bytes_, words))
        if usual > 8 * dark:
            raise BadInput(
                f"{location}: {words[0]} uses a small part of its 16 bits (a sensor of 12 bits?) and would "
                f"be nearly constant beside {bytes_[0]}; {anyway}"
            )


def _too_large(
    pixels: np.ndarray, mean: Sequence[float], std: Sequence[float], name: str, fixed: bool
) -> str:
    facts = (
        f"{name}: its pixels are scaled to 0..1, but mean ({format_values(mean)}) and standard deviation "
        f"({format_values(std)}) are of larger values"
    )
    if fixed:
        return f"{facts}: the model learned from float images; give float images in the same unit"
    white = 255 if max(*mean, *std) <= 255 else max_value(pixels)
    means, stds = ([value / white if value > 1 else value for value in values] for values in (mean, std))
    return f"{facts}; divided by {white}: --mean {format_values(means)} --std {format_values(stds)}"


def format_values(values: Sequence[float]) -> str:
    """Returns the numbers as they are given to a flag."""
    return " ".join(f"{value:.4g}" for value in values)
