"""A real browser on the served page: upload, brush, other methods and runtimes, a phone; nothing leaves."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from browser_visits import CHROMIUM, PHONE, Visit
from PIL import Image
from upload_files import animations, good_files

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium; apt-get install chromium"),
]


UNNAMED = """() => [...document.querySelectorAll('button, input:not([type=file]), select, textarea')]
    .filter(e => e.offsetParent && !e.ariaLabel && !e.title && !e.getAttribute('aria-labelledby'))
    .filter(e => !(e.innerText || '').trim() && ![...(e.labels || [])].some(l => l.innerText.trim()))
    .filter(e => ![...e.querySelectorAll('img')].some(i => i.alt))
    .map(e => e.outerHTML.slice(0, 160))"""
"""What a screen reader would call "button" and no more."""


@pytest.mark.slow
def test_a_visit(browser, address, tmp_path):
    visit = Visit(browser, address, viewport={"width": 1440, "height": 1000})
    page = visit.page
    first = visit.number("PSNR, masked pixels")
    assert re.fullmatch(r"\d+\.\d\d dB", first) and visit.number("mask unit") == "16 px"
    visit.more()
    assert page.locator("#views img").count() == 6

    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", str(tmp_path / "mine.png"))
    page.wait_for_function("() => document.querySelector('#about').innerText.includes('120 x 90 px')")
    visit.current()
    assert visit.number("PSNR, masked pixels") != first

    visit.choose("method", "CoMA: four views")
    visit.until("text.includes('75%') || text.includes('78%')")
    page.wait_for_function("() => document.querySelectorAll('#views img').length == 10")
    page.locator("#runtime label", has_text="ONNX Runtime").click()
    page.wait_for_selector("#numbers .card[title^='ONNX Runtime 1']")
    assert "TensorRT" in page.inner_text("#missing") and "coma export" in page.inner_text("#missing")

    visit.choose("method", "Brush")
    page.wait_for_selector("#brush canvas")
    visit.until("text.includes('Paint over')")
    page.wait_for_timeout(1500)  # the canvas draws its picture
    box = page.locator("#brush canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)
    visit.until("text.includes('PSNR')")
    hidden = int(visit.number("mask ratio").rstrip("%"))
    assert 5 < hidden < 60, "the brush hid something, and not everything"

    page.get_by_role("tab", name="Explore").click()
    page.wait_for_selector("#attention img")
    page.wait_for_selector("#gate-weights table")
    assert "stage 1, block 1" in page.inner_text("#gate-weights")
    page.get_by_role("tab", name="Classify").click()
    page.click("#classifier-go")
    page.wait_for_function("() => /cat|cup|face/.test(document.querySelector('#top5').innerText)")
    shot = Path(os.environ.get("COMA_SCREENSHOTS") or tmp_path) / "visit.png"
    page.screenshot(path=str(shot), full_page=True)
    assert shot.stat().st_size > 20_000
    assert visit.outside(address) == [] and visit.errors == []
    visit.context.close()


def test_bad_uploads_are_answered_on_the_page(browser, address, tmp_path):
    visit = Visit(browser, address)
    (tmp_path / "holiday.jpg").write_text("no photograph at all\n" * 30)
    visit.page.click("#picture button[aria-label='Remove Image']")
    visit.page.set_input_files("#picture input[type=file]", str(tmp_path / "holiday.jpg"))
    visit.page.get_by_text("is not a picture").first.wait_for()
    said = "() => getComputedStyle(document.querySelector('#result'), '::after').content == '\"Not updated\"'"
    visit.page.wait_for_function(said)  # not: Updating
    visit.page.locator("#examples button").first.click()
    visit.current()
    assert not visit.page.evaluate(said)
    visit.context.close()


def test_files_of_every_kind_are_taken_and_described(browser, address, tmp_path):
    visit = Visit(browser, address)
    page, good, moving = visit.page, good_files(tmp_path / "good"), animations(tmp_path / "moving")
    for path, told in (
        (good["still.heic"], r"60 x 40 px, HEIC, [\d.]+ kB\. "),
        (good["still.avif"], r"60 x 40 px, AVIF, [\d.]+ kB\. "),
        (moving["GIF"], r"60 x 40 px, GIF, [\d.]+ kB; animated: this is the first frame\. "),
    ):
        page.click("#picture button[aria-label='Remove Image']")
        page.set_input_files("#picture input[type=file]", str(path))
        page.wait_for_function(f"() => document.querySelector('#about')?.innerText.match(/{told}/)")
        visit.current()
        assert re.fullmatch(r"-?\d+\.\d\d dB", visit.number("PSNR, masked pixels"))
    visit.context.close()


def test_a_phone_in_the_dark(browser, address):
    visit = Visit(
        browser,
        address,
        color_scheme="dark",
        **PHONE,
    )
    width = visit.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "no scrolling sideways"
    background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) < 200
    visit.page.locator("#again").tap()
    visit.page.wait_for_function("() => document.querySelector('#seed input').value != '0'")
    assert visit.outside(address) == [] and visit.errors == []
    visit.context.close()


def test_everything_has_a_name_and_a_place_in_the_order_of_tabs(browser, address):
    visit = Visit(browser, address)
    unnamed = visit.page.evaluate(UNNAMED)
    assert unnamed == []
    names = set()
    for _ in range(45):
        visit.page.keyboard.press("Tab")
        names.add(
            visit.page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''")
        )
    assert {"Reconstruct", "New mask", "temple"} <= {name.strip() for name in names}
    visit.context.close()


def test_the_watch_for_outside_requests_notices_one(browser, address):
    visit = Visit(browser, address)
    visit.page.evaluate("fetch('http://example.invalid/font.woff2').catch(() => 0)")
    visit.page.wait_for_timeout(300)
    assert visit.outside(address) == ["http://example.invalid/font.woff2"]
    assert visit.errors  # and the console said that it failed
    visit.context.close()
