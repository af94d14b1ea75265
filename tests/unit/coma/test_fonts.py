"""Texts in any script are drawn with fonts that have their characters, or a warning says that none has."""

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from coma import fonts
from coma.contact_sheet import Cell, Section, draw_sections
from downstream.draw import draw_labels

CACHES = fonts._best, fonts._installed, fonts._glyphs, fonts._family, fonts._warn_once
HAN = "猫"


@pytest.fixture(autouse=True)
def forgotten():
    """Every test looks for fonts itself, and afterwards the others do."""
    for each in CACHES:
        each.cache_clear()
    yield
    for each in CACHES:
        each.cache_clear()


@pytest.fixture
def han_font(tmp_path, monkeypatch):
    """The one font that is installed: its glyph of `m` is that of a Chinese character."""
    from fontTools.ttLib import TTFont

    font = TTFont(fonts._dejavu())
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap[ord(HAN)] = table.cmap[ord("m")]
    for record in font["name"].names:
        if record.nameID in (1, 4, 16):
            font["name"].setName("Han", record.nameID, record.platformID, record.platEncID, record.langID)
    path = tmp_path / "Han-Regular.ttf"
    font.save(path)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "broken.ttf"), str(path)])
    fonts._installed.cache_clear()
    return str(path)


@pytest.fixture
def no_han_font(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    fonts._installed.cache_clear()


def figure(text):
    drawn = Figure(figsize=(2, 2), dpi=50, layout="constrained")
    axes = drawn.subplots()
    axes.set(title=text)
    axes.set_xticks([0, 1], [text, text])
    return drawn


def sheet(text):
    return np.asarray(draw_sections([Section(text, [Cell(None, text)])], title=text))


def labels(text):
    return draw_labels(np.zeros((60, 60, 3), np.uint8), [text], [(255, 255, 255)])


DRAWN = (
    lambda text: np.asarray(fonts.draw_figure(figure(text))),
    sheet,
    labels,
)


@pytest.mark.parametrize("draw", DRAWN, ids=["figure", "sheet", "labels"])
def test_an_installed_font_draws_what_the_own_one_cannot(draw, han_font, caplog):
    drawn = draw(f"{HAN}!é")
    assert (drawn == draw("m!é")).all() and not caplog.text
    assert (drawn != draw("n!é")).any()  # the comparison can fail


@pytest.mark.parametrize("draw", DRAWN, ids=["figure", "sheet", "labels"])
def test_missing_glyphs_are_said_once(draw, no_han_font, caplog):
    draw(HAN)
    draw("図")
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "install a font" in caplog.text


def test_letters_of_europe_are_no_boxes_on_contact_sheets(no_han_font, caplog):
    """Pillow's own font has ASCII alone."""
    (font,), (plain,) = fonts.load_fonts(["café собака"], 15), fonts.load_fonts(["cat"], 15)
    assert isinstance(font, ImageFont.FreeTypeFont) and isinstance(plain, ImageFont.FreeTypeFont)
    boxes = [ink(each, "\uffff") for each in (font, plain)]
    for letter in "éсобак":
        assert ink(font, letter) != boxes[0] and ink(plain, letter) == boxes[1]
    assert not caplog.text


def ink(font, letter):
    picture = Image.new("L", (30, 30))
    ImageDraw.Draw(picture).text((2, 2), letter, 255, font)
    return picture.tobytes()


@pytest.mark.parametrize("draw", DRAWN, ids=["figure", "sheet", "labels"])
def test_fonts_are_looked_for_only_where_a_character_is_missing(draw, monkeypatch):
    monkeypatch.setattr(
        font_manager, "findSystemFonts", lambda: pytest.fail("it takes a process and a while")
    )
    draw("café собака")
