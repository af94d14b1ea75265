"""Fonts that have the characters of a text, since classes and files have names in any script."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def load_fonts(texts: Iterable[str], *sizes: int) -> list[Font]:
    """Returns a font in each of the sizes, in pixels: Pillow's for ASCII, else the one of `font_file`."""
    text = "".join(texts)
    if text.isascii():  # Pillow's font has nothing else
        return [ImageFont.load_default(size) for size in sizes]
    return [ImageFont.truetype(font_file(text), size) for size in sizes]


def font_file(texts: Iterable[str]) -> str:
    """Returns the path of the font with the most characters of the texts: DejaVu Sans, or an installed one.

    It logs a warning, once, where some are missing.
    """
    characters = _characters(texts)
    found = _best(characters)
    _say_missing(characters - _glyphs(found))
    return found


def draw_figure(figure: Figure) -> Image.Image:
    """Returns a picture of a figure whose texts are drawn with as many fonts as their characters take.

    It logs a warning, once, where some are in none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    texts = [each for each in figure.findobj(Text) if isinstance(each, Text)]
    fonts = [_dejavu()]
    missing = _characters(each.get_text() for each in texts) - _glyphs(fonts[0])
    while (found := _best(missing)) not in fonts:
        fonts.append(found)
        missing -= _glyphs(found)
    for each in texts:
        each.set_fontfamily([_family(path) for path in fonts])
    _say_missing(missing)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # said above
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _characters(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(c for text in texts for c in text if c.isprintable() and not c.isspace())


@cache
def _best(characters: frozenset[str]) -> str:
    """Returns the first of the fonts with the most of the characters."""
    if characters <= _glyphs(_dejavu()):
        return _dejavu()
    return max((_dejavu(), *_installed()), key=lambda path: len(characters & _glyphs(path)))


@cache
def _dejavu() -> str:
    """Returns the path of DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def _installed() -> tuple[str, ...]:
    """Returns the paths of the installed fonts, regular ones first."""
    from matplotlib.font_manager import findSystemFonts

    return tuple(sorted(findSystemFonts(), key=lambda path: ("Regular" not in Path(path).name, path)))


@cache
def _glyphs(path: str) -> frozenset[str]:
    """Returns the characters that a font can draw in any size; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


@cache
def _family(path: str) -> str:
    """Returns the name under which matplotlib knows a font, from now on."""
    from matplotlib.font_manager import FontProperties, fontManager

    fontManager.addfont(path)
    return FontProperties(fname=path).get_name()


def _say_missing(characters: frozenset[str]) -> None:
    if characters:
        _warn_once(
            "some names have characters that no installed font has: pictures show boxes in their place; "
            "install a font that has them, such as Noto (Debian and Ubuntu: fonts-noto-cjk, fonts-noto-core)"
        )


_warn_once = cache(log.warning)
