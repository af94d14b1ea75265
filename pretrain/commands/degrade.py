"""Show what degraded training images look like.

Draws the image beside every degradation of --method beyond, with a few random draws of each.

Examples:
  coma degrade PHOTO --out sheet.png
  coma degrade PHOTO --out zooms.png --kind zoom-in zoom-in+mask --draws 6
  coma degrade PHOTO --out small.png --size 72 --unit 8
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from coma.arguments import parse_arguments
from coma.config.objectives import Degradation
from coma.errors import BadInput
from coma.preflight import check_regular_file
from coma.ranges import MEAN, SEED, STD, Range, Ranged

Channels = tuple[float, float, float]

_NO_PLACE = {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors of what --out names; others are the machine's, see `coma.cli`."""


@dataclass(frozen=True)
class DegradeConfig(Ranged):
    """Image, degradations and sheet."""

    image: Annotated[Path, tyro.conf.Positional]
    """An image file of three channels."""
    out: Path
    """The PNG to write."""
    kind: tuple[Degradation, ...] = (
        *("zoom-out", "zoom-out+mask", "distort", "blur", "decolor"),
        *("zoom-in", "zoom-in+mask", "zoom-in+coma"),
    )
    """Degradations with their default settings: +mask hides 75 % of the units (zooming in, of the centre's),
    zoom-in+coma splits the centre over 2 views."""
    draws: Annotated[int, Range(1, 64)] = 4
    """Random draws of each degradation."""
    size: Annotated[int, Range(16, 2048)] = 288
    """Side of the square view in pixels; its centre is what zooming in shows (published: 224 of 288)."""
    unit: Annotated[int | None, Range(1, 2048)] = None
    """Side in pixels of a mask unit, the unit of border and masks; published: 32 of 288; default: a ninth of
    the view"""
    mean: Annotated[Channels, MEAN] = (0.485, 0.456, 0.406)
    """Mean of every channel, of pixels scaled to 0..1. Pixels are normalised before they are degraded, as
    in training, which only decolor shows. The default is ImageNet's; a run's is in its artifact."""
    std: Annotated[Channels, STD] = (0.229, 0.224, 0.225)
    """Standard deviation of every channel."""
    seed: Annotated[int, SEED] = 0
    """Seed of the first draw; later draws use the following numbers."""


def run(argv: list[str]) -> None:
    """Degrades the image and draws the sheet.

    Raises:
        BadInput: the image does not exist, or the sheet cannot be drawn or written.
    """
    config = parse_arguments(DegradeConfig, argv, prog="coma degrade", description=__doc__)
    _check(config)

    from coma.data.channels import convert_channels
    from coma.data.decode import decode
    from coma.data.pixel_values import check_pixels
    from coma.data.transforms import centre_crop, resize
    from pretrain.visualize.reconstructions import degradation_sheet

    name = str(config.image)
    try:
        check_regular_file(config.image, "give an image file", must_exist=False)
        picture = decode(config.image.read_bytes(), name)
    except OSError as error:
        raise BadInput(f"{name}: cannot be read ({error.strerror}); give an image file") from None
    pixels = convert_channels(picture, 3, name)
    check_pixels(pixels, config.mean, config.std, lambda: name)
    view = resize(pixels, centre_crop(*pixels.shape[:2]), config.size, config.size)
    kinds = tuple(dict.fromkeys(config.kind))
    unit = config.unit or -(-config.size // 9)
    try:
        if config.out.is_dir():
            raise BadInput(f"--out {config.out}: is a directory; give a file name")
        degradation_sheet(
            view, kinds, config.mean, config.std, config.out, unit=unit, draws=config.draws, seed=config.seed
        )
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        blocked = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is where its folder should be" if blocked else error.strerror
        raise BadInput(f"--out {config.out}: cannot be written ({reason})") from None
    print(config.out)


def _check(config: DegradeConfig) -> None:
    if config.out.suffix.lower() != ".png":
        raise BadInput(f"--out {config.out}: a PNG is written; give a file name that ends in .png")
    if config.unit is not None and config.unit > config.size:
        raise BadInput(f"--unit {config.unit} must be at most --size {config.size}")
    if config.seed + config.draws > 2**63:
        raise BadInput(f"--seed {config.seed} is too large: those of the other --draws count on from it")
    if not config.kind:
        raise BadInput("--kind: name at least one")
