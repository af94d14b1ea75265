"""Compare, Explore, Nearest and the downloads in a real browser: what is shown is that of the controls."""

import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
from browser_visits import CHROMIUM, DESKTOP, EXPLORED, Visit
from PIL import Image

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium; apt-get install chromium"),
]

FRAME = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""Waits until the page has been drawn."""
WATCH = """() => {
    const seen = window.seen = new Set();
    const look = () => {
        const values = ['row', 'col'].map(id => document.querySelector(`#${id} input`).value);
        const picture = document.querySelector('#here img')?.src;
        seen.add(JSON.stringify([!document.body.dataset.stalePlace, ...values, picture]));
        requestAnimationFrame(look);
    };
    look();
}"""
"""Notes in every frame whether the similarity counts as current, the position, and the picture shown."""
VISIBLE = "each => getComputedStyle(each).opacity"


@pytest.fixture
def visit(browser, address) -> Iterator[Visit]:
    visit = Visit(browser, address, **DESKTOP)
    yield visit
    assert visit.outside(address) == [] and visit.errors == []
    visit.context.close()


def explore(visit: Visit) -> Any:
    visit.page.get_by_role("tab", name="Explore").click()
    visit.page.wait_for_function(EXPLORED)
    return visit.page


def test_models_are_compared_side_by_side_and_blink(visit):
    page = visit.page
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare-models")
    page.wait_for_selector(".compared img")
    shown = page.locator(".compared figure").all_inner_texts()
    assert [text.split("\n")[0] for text in shown] == ["Masked", "small", "masked"]
    for text in shown[1:]:
        assert re.search(r"PSNR \d+\.\d\d dB, SSIM -?0\.\d+, \d+ ms\. (coma|pretrained).*48 px", text), text
    tops = {round(each.bounding_box()["y"]) for each in page.locator(".compared figure").all()}
    assert len(tops) == 1, "side by side"
    upper = page.locator(".compared figure").nth(1).locator("img").nth(1)
    assert opacities(page, upper) == {"1"}
    page.get_by_label("Blink between picture and reconstruction").check()
    assert opacities(page, upper) == {"0", "1"}
    page.get_by_label("Blink between picture and reconstruction").uncheck()
    page.fill("#compare-seed input", "5")
    page.wait_for_selector(".compared img", state="detached")  # nothing is shown with other settings
    page.get_by_label("masked", exact=True).uncheck()
    page.click("#compare-models")
    page.get_by_text("Choose 2 to 4 models, not 1.").first.wait_for()
    page.get_by_label("masked", exact=True).check()


def opacities(page: Any, picture: Any) -> set[str]:
    found = set()
    for _ in range(20):
        found.add(picture.evaluate(VISIBLE))
        page.wait_for_timeout(120)
    return found


def test_a_click_on_a_patch_shows_what_is_similar_in_both_pictures(visit):
    page = explore(visit)
    assert page.locator("#pyramid img").count() == 6 and page.locator("#gates img").count() == 3
    first, second = (page.get_attribute(f"#{name} img", "src") for name in ("here", "there"))
    page.evaluate(WATCH)
    box = page.locator("#place img").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.75)
    page.wait_for_function("() => Math.abs(document.querySelector('#row input').value - 0.75) < 0.02")
    assert float(page.input_value("#col input")) == pytest.approx(0.25, abs=0.02)
    page.wait_for_function(EXPLORED)
    assert page.get_attribute("#here img", "src") != first
    assert page.get_attribute("#there img", "src") != second
    page.evaluate(FRAME)
    page.focus("#row input[type=range]")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(300)
    page.wait_for_function(EXPLORED)
    frames = [json.loads(each) for each in page.evaluate("[...window.seen]")]
    shown = {}
    for current, row, col, picture in frames:
        if current:
            assert shown.setdefault((row, col), picture) == picture, "one picture for a position"
    assert len(shown) >= 3 and len(set(shown.values())) == len(shown), shown
    text = page.inner_text("#scale")
    page.click("#second > button")
    page.click("#other button[aria-label='Remove Image']")
    page.wait_for_function("() => !document.querySelector('#there img')")
    page.wait_for_function(EXPLORED)
    assert "ring in the second picture" in text and "ring" not in page.inner_text("#scale")


def test_explore_follows_the_picture_and_its_other_controls(visit):
    page = explore(visit)
    page.locator("#examples button").nth(1).click()
    page.wait_for_function("() => document.body.dataset.stalePlace")
    page.wait_for_function(EXPLORED)
    regions = page.locator("#pyramid img").nth(4)
    src = regions.get_attribute("src")
    page.locator("#stage label", has_text="2").click()
    page.wait_for_function("() => document.querySelector('#scale').innerText.includes('stage 2')")
    page.wait_for_function(EXPLORED)
    assert page.locator("#pyramid").get_by_text("4 regions of stage 2").count()
    assert regions.get_attribute("src") != src
    page.get_by_role("tab", name="Nearest").click()
    page.click("#find")
    page.wait_for_selector("#nearest img")
    assert page.locator("#nearest img").count() == 4
    assert re.match(r"(0\.99|1\.00)\d flower\.jpg", page.inner_text("#nearest").strip())
    page.locator("#examples button").nth(0).click()
    page.wait_for_selector("#nearest img", state="detached")


def test_files_are_saved_under_telling_names(visit, tmp_path):
    page = visit.page
    page.fill("#seed input", "4")
    visit.until("text.includes('seed\\n4')")
    visit.current()
    visit.more()
    stem = "temple-small-coma-seed-4"
    with page.expect_download() as started:
        page.click("#figure")
    assert started.value.suggested_filename == f"{stem}-figure.png"
    with Image.open(started.value.path()) as figure:
        assert figure.width > 1000
    with page.expect_download() as started:
        page.click("#zip")
    assert started.value.suggested_filename == f"{stem}.zip"
    with zipfile.ZipFile(started.value.path()) as archive:
        assert f"{stem}-reconstruction.png" in archive.namelist()
    page.click("#animate")
    page.wait_for_selector("#animation img")
    with page.expect_download() as started:
        page.locator("#animation").get_by_label("Download").click()
    assert started.value.suggested_filename == "temple-small-mask-ratios-seed-4.gif"
    assert page.locator("#ratio-scores tbody tr").count() == 8
    page.fill("#seed input", "6")
    page.wait_for_selector("#animation img", state="detached")
