"""Checks that pixels fit the mean and standard deviation that normalise them, and that images fit each other.

Integer pixels are scaled to 0..1; floats are used as they are, in any unit. Statistics of values 0..255 would
make 8-bit images nearly constant, and so would float images of values 0..255 among them. Both are refused
with the name of an image.
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

_SAMPLE = 16
"""Number of images that are checked before a run starts."""
_MAX_DISTANCE = 30.0
"""Maximum distance of an image's mean from the mean of all images, in standard deviations."""
_NODATA = (-32768.0, -32767.0, -99999.0, -9999.0, -999.0)
"""Values that rasters commonly use for missing values."""
_HUGE = 1e9
"""Larger values are missing ones: netCDF and other formats write 9.97e36 or 1e20."""


class PixelRange(NamedTuple):
    """The range of the pixel values of one image."""

    name: str
    kind: str
    """8-bit, 16-bit or float."""
    low: float
    """Smallest stored value."""
    high: float
    """Largest stored value."""
    contrast: float
    """Standard deviation of the values; integers are scaled to 0..1."""

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {self.low:.4g} to {self.high:.4g})"


def pixel_range(pixels: np.ndarray, name: str, contrast: float) -> PixelRange:
    """Returns the range of pixels `[H, W, C]`; see `PixelRange` for `contrast`."""
    kind = {1: "8-bit", 2: "16-bit"}.get(pixels.dtype.itemsize, "float")
    return PixelRange(name, kind, float(pixels.min()), float(pixels.max()), contrast)


def check_pixels(
    pixels: np.ndarray,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    name: Callable[[], str],
    *,
    fixed: bool = False,
) -> None:
    """Checks that the mean and standard deviation fit an image.

    Args:
        pixels: Stored values, `[H, W, C]`.
        mean: Mean per channel for the normalisation; None if it is not known yet.
        std: Standard deviation per channel; None if it is not known yet.
        name: Returns the name of the image.
        fixed: Whether the mean and standard deviation are those of a trained model, so only the images can
            change.

    Raises:
        BadInput: The statistics are of larger or smaller values than those of the image, or the image has
            missing values that are not declared.
    """
    if pixels.dtype != np.float32:
        if mean and std and max(*mean, *std) > 1:
            raise BadInput(_too_large(pixels, mean, std, name(), fixed))
        return
    low, high = float(pixels.min()), float(pixels.max())
    for extreme in (low, high):
        others = pixels[pixels != extreme] if extreme in _NODATA or abs(extreme) > _HUGE else pixels[:0]
        if others.size and abs(others - extreme).min() > 10 * others.std(dtype=np.float64):
            raise BadInput(
                f"{name()}: {pixels.size - others.size} of {pixels.size} values are {extreme:g}, far from "
                "all others; if they are missing values, save them as NaN or declare them "
                f"(gdal_edit.py -a_nodata {extreme:g} FILE)"
            )
    if mean and std and min(mean) >= 0 and max(*mean, *std) <= 1:
        far = np.abs(pixels.mean(axis=(0, 1), dtype=np.float64) - mean) / std
        if far.max() > _MAX_DISTANCE:
            otherwise = "" if fixed else ", or all images in the unit of this one"
            raise BadInput(
                f"{name()}: float values of {low:.4g} to {high:.4g}, but mean ({format_values(mean)}) and "
                f"standard deviation ({format_values(std)}) are of values in 0..1; save such images scaled "
                f"to 0..1{otherwise}"
            )


def check_sample(
    source: Source, channels: int, mean: Sequence[float], std: Sequence[float], *, fixed: bool = False
) -> None:
    """Checks a few images, spread over the source, and logs how many had missing values.

    Raises:
        BadInput: See `check_pixels`.
    """
    filled = checked = 0
    chosen = sample_indices(len(source), _SAMPLE, source.blocks)
    source.prefetch(chosen)
    for i in chosen:
        try:
            name = source.describe(i)
            image = source.decode(i)
            check_pixels(
                convert_channels(image, channels, name), mean, std, lambda name=name: name, fixed=fixed
            )
        except BadImage:
            continue
        checked += 1
        filled += image.missing is not None
    log_filled(source, filled, checked)


def log_filled(source: Source, filled: int, checked: int, share: float | None = None) -> None:
    """Logs how many images had missing values, if any had."""
    if filled:
        of_them = "" if share is None else f" ({share:.2%} of all values)"
        log.info(
            f"{source.location}: {filled} of {counted(checked, 'image')} looked at have nodata, NaN or "
            f"infinite values{of_them}; they are filled with the mean of their channel",
            extra={"once": True},
        )


def describe_filled(image: DecodedImage) -> str:
    """Returns the share of missing values of an image, in words."""
    share = 0.0 if image.missing is None else image.missing.mean()
    return f"{share:.2%} of its values are nodata, NaN or infinite; filled with the mean of their channel"


def check_same_unit(location: object, images: Sequence[PixelRange]) -> None:
    """Checks that all images are in the same unit; otherwise some would be nearly constant beside the others.

    Raises:
        BadInput: They are not; the message names an image of each unit.
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
    anyway = "save them in one range, or give --mean and --std to train anyway"
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
        return f"{facts}: the model was trained on float images; give float images in the same unit"
    white = 255 if max(*mean, *std) <= 255 else max_value(pixels)
    means, stds = ([value / white if value > 1 else value for value in values] for values in (mean, std))
    return f"{facts}; divided by {white}: --mean {format_values(means)} --std {format_values(stds)}"


def format_values(values: Sequence[float]) -> str:
    """Returns numbers in the form of a flag's value."""
    return " ".join(f"{value:.4g}" for value in values)
