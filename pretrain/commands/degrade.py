"""Show what degraded training images look like.

Draws one picture with every degradation of --method beyond, a few random draws of each, beside the image.

Examples:
  coma degrade PHOTO --out sheet.png
  coma degrade PHOTO --out zooms.png --kind zoom-in zoom-out --draws 6
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pretrain.errors import BadInput

Kind = Literal["zoom-in", "zoom-out", "distort", "blur", "decolor"]


@dataclass(frozen=True)
class DegradeConfig:
    """What to show."""

    image: Annotated[Path, tyro.conf.Positional]
    """An image file of three channels."""
    out: Path
    """The PNG to write."""
    kind: tuple[Kind, ...] = ("zoom-in", "zoom-out", "distort", "blur", "decolor")
    """Which degradations."""
    draws: int = 4
    """Random draws of each."""
    size: int = 224
    """Side of the square view in pixels; its centre is what zooming in shows."""
    seed: int = 0


def run(argv: list[str]) -> None:
    """Parse, degrade, draw.

    Raises:
        BadInput: no such image, or numbers that make no sheet.
    """
    config = tyro.cli(DegradeConfig, args=argv, prog="coma degrade", description=__doc__)
    if not 1 <= config.draws <= 64:
        raise BadInput(f"--draws {config.draws} must be 1 to 64")
    if config.size < 16:
        raise BadInput(f"--size {config.size} must be at least 16")
    if not config.kind:
        raise BadInput("--kind: name at least one")

    from pretrain.data.channels import adapt
    from pretrain.data.images import decode
    from pretrain.data.transforms import centre_square, resize
    from pretrain.pictures import degradation_sheet

    name = str(config.image)
    try:
        picture = decode(config.image.read_bytes(), name)
    except OSError as error:
        raise BadInput(f"{name}: cannot be read ({error.strerror}); give an image file") from None
    pixels = adapt(picture, 3, name)
    view = resize(pixels, centre_square(*pixels.shape[:2]), config.size, config.size)
    kinds = tuple(dict.fromkeys(config.kind))
    degradation_sheet(view, config.out, kinds, config.draws, config.seed)
    print(config.out)
