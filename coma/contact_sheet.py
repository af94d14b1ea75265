"""Contact sheets: captioned columns of pictures, or rows of captioned pictures, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from coma.atomic_io import write_whole
from coma.fonts import Font, load_fonts

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
    fonts = load_fonts([title, notes, *(heading for heading, _, _ in columns)], 22, 15, 14)
    sheet_width = 2 * _MARGIN + across * (cell[0] + _GAP) - _GAP
    room = sheet_width - 2 * _MARGIN
    title, notes = _wrap(title, fonts[0], room), _wrap(notes, fonts[2], room)
    headings = [_wrap(heading, fonts[1], cell[0]) for heading, _, _ in columns]

    notes_top = _MARGIN + _depth(title, fonts[0]) + 8
    first_band = notes_top + _depth(notes, fonts[2]) + 16
    to_pictures = max(_depth(text, fonts[1]) for text in headings) + 8
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


@dataclass(frozen=True)
class Cell:
    """A picture of a contact sheet and the lines below it; None draws a blank."""

    picture: Image.Image | None
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """Pictures of a contact sheet that belong together, and the line above them."""

    heading: str
    cells: Sequence[Cell]


def draw_sections(
    sections: Sequence[Section], title: str, notes: str = "", across: int = 6, side: int = _CELL
) -> Image.Image:
    """Lays out sections below each other: pictures in their own shape, `across` of them in a row.

    Args:
        sections: Captioned pictures; captions are cut in the middle where they are too long.
        title: First line.
        notes: Lines below it; words are wrapped.
        across: Most pictures in a row.
        side: Longer side of every picture in pixels.
    """
    across = max(min(across, max((len(section.cells) for section in sections), default=1)), 3)
    cells = [cell for section in sections for cell in section.cells]
    texts = [title, notes, *(s.heading for s in sections), *(cell.caption for cell in cells)]
    fonts = load_fonts(texts, 22, 15, 13)
    width = 2 * _MARGIN + across * (side + _GAP) - _GAP
    room = width - 2 * _MARGIN
    title, notes = _wrap(title, fonts[0], room), _wrap(notes, fonts[2], room)
    captions = [
        ["\n".join(_cut(line, fonts[2], side) for line in cell.caption.split("\n")) for cell in section.cells]
        for section in sections
    ]
    below = _depth(max((text for texts in captions for text in texts), key=_lines, default=""), fonts[2]) + 18
    top = _MARGIN + _depth(title, fonts[0]) + 8 + (_depth(notes, fonts[2]) + 14 if notes else 6)
    rows = [
        [
            max(_size(cell, side)[1] for cell in section.cells[at : at + across])
            for at in range(0, len(section.cells), across)
        ]
        for section in sections
    ]
    height = top + sum(
        (26 if section.heading else 0) + sum(heights) + len(heights) * below + _GAP
        for section, heights in zip(sections, rows, strict=True)
    )
    sheet = Image.new("RGB", (width, height + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((_MARGIN, _MARGIN), title, _INK, fonts[0])
    draw.multiline_text((_MARGIN, _MARGIN + _depth(title, fonts[0]) + 8), notes, _FAINT, fonts[2])
    for section, texts, heights in zip(sections, captions, rows, strict=True):
        if section.heading:
            draw.text((_MARGIN, top), _cut(section.heading, fonts[1], room), _INK, fonts[1])
            top += 26
        for place, (cell, text) in enumerate(zip(section.cells, texts, strict=True)):
            down, right = divmod(place, across)
            foot = top + sum(heights[: down + 1]) + down * below
            _draw_cell(sheet, cell, text, fonts[2], (_MARGIN + right * (side + _GAP), foot), side)
        top += sum(heights) + len(heights) * below + _GAP
    return sheet


def with_title(picture: Image.Image, title: str) -> Image.Image:
    """Returns a picture with a margin, under a title."""
    (font,) = load_fonts([title], 22)
    title = _wrap(title, font, picture.width)
    top = _MARGIN + _depth(title, font) + 16
    sheet = Image.new("RGB", (picture.width + 2 * _MARGIN, top + picture.height + _MARGIN), _PAPER)
    ImageDraw.Draw(sheet).multiline_text((_MARGIN, _MARGIN), title, _INK, font)
    sheet.paste(picture, (_MARGIN, top))
    return sheet


def _size(cell: Cell, side: int) -> tuple[int, int]:
    """Returns width and height of a picture on the sheet."""
    if cell.picture is None:
        return side, side
    scale = side / max(cell.picture.size)
    width, height = (max(round(length * scale), 1) for length in cell.picture.size)
    return width, height


def _draw_cell(
    sheet: Image.Image, cell: Cell, caption: str, font: Font, corner: tuple[int, int], side: int
) -> None:
    """Draws a picture whose lower left corner is `corner`, and its caption right below it."""
    left, foot = corner
    draw, (width, height) = ImageDraw.Draw(sheet), _size(cell, side)
    if cell.picture is None:
        draw.rectangle((left, foot - height, left + width - 1, foot - 1), outline=_HIDDEN)
        middle = (left + width / 2, foot - height / 2)
        draw.text(middle, "no picture", _FAINT, font, anchor="mm")
    else:
        picture = cell.picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + (side - width) // 2, foot - height))
    draw.multiline_text((left, foot + 3), caption, _INK, font)


def _lines(text: str) -> int:
    return text.count("\n")


def _depth(text: str, font: Font) -> int:
    """Returns the height of a text of several lines in pixels."""
    return round(ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)[3])


def _cut(text: str, font: Font, width: float) -> str:
    """Returns one line of at most `width` pixels: the middle of a longer one is left out."""
    if font.getlength(text) <= width:
        return text
    kept = next(n for n in range(len(text), -1, -1) if font.getlength(_short(text, n)) <= width or not n)
    return _short(text, kept)


def _short(text: str, kept: int) -> str:
    """Returns the first third and the last two thirds of `kept` characters of a text."""
    head = kept // 3
    return f"{text[:head]}...{text[len(text) - (kept - head) :]}"


def _wrap(text: str, font: Font, width: float) -> str:
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
