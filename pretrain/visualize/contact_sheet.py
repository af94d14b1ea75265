"""Contact sheets: captioned columns of pictures as one PNG."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from coma.atomic_io import write_whole

_CELL = 176  # pixels, the longer side of a picture on the sheet at least
_GAP, _MARGIN = 8, 24
_PAPER, _INK, _FAINT, _HIDDEN = (255, 255, 255), (24, 24, 32), (96, 96, 108), (222, 222, 228)

Column = tuple[str, np.ndarray, np.ndarray | None]  # heading, uint8 [b, H, W, 3], shown bool [b, H, W] or all


def draw_sheet(columns: list[Column], title: str, notes: str, across: int | None = None) -> Image.Image:
    """Lays out the columns under title and notes, at most `across` side by side, the others below."""
    across = min(across or len(columns), len(columns))
    rows, height, width = columns[0][1].shape[:3]
    zoom = max(1.0, _CELL / max(height, width))
    cell = (round(width * zoom), round(height * zoom))
    fonts = [ImageFont.load_default(size) for size in (22, 15, 14)]
    sheet_width = 2 * _MARGIN + across * (cell[0] + _GAP) - _GAP
    room = sheet_width - 2 * _MARGIN
    title, notes = _wrap(title, fonts[0], room), _wrap(notes, fonts[2], room)
    headings = [_wrap(heading, fonts[1], cell[0]) for heading, _, _ in columns]

    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def depth(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
        return round(ruler.multiline_textbbox((0, 0), text, font=font)[3])

    notes_top = _MARGIN + depth(title, fonts[0]) + 8
    first_band = notes_top + depth(notes, fonts[2]) + 16
    to_pictures = max(depth(text, fonts[1]) for text in headings) + 8
    band = to_pictures + rows * (cell[1] + _GAP) - _GAP + _MARGIN
    sheet = Image.new("RGB", (sheet_width, first_band + -(-len(columns) // across) * band), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((_MARGIN, _MARGIN), title, _INK, fonts[0])
    draw.multiline_text((_MARGIN, notes_top), notes, _FAINT, fonts[2])
    for column, (heading, (_, pictures, shown)) in enumerate(zip(headings, columns, strict=True)):
        down, place = divmod(column, across)
        left = _MARGIN + place * (cell[0] + _GAP)
        first_row = first_band + down * band + to_pictures
        draw.multiline_text(
            (left + cell[0] / 2, first_row - 8), heading, _INK, fonts[1], anchor="md", align="center"
        )
        for row in range(rows):
            picture = Image.fromarray(pictures[row]).resize(cell, Image.Resampling.BICUBIC)
            if shown is not None:
                stencil = Image.fromarray(shown[row]).resize(cell, Image.Resampling.NEAREST)
                picture = Image.composite(picture, Image.new("RGB", cell, _HIDDEN), stencil)
            sheet.paste(picture, (left, first_row + row * (cell[1] + _GAP)))
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Breaks `text` between words into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def write_png(path: Path, picture: Image.Image) -> None:
    """Saves a PNG atomically: readers see the old picture or the new one."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    write_whole(path, lambda file: file.write(content.getvalue()))
