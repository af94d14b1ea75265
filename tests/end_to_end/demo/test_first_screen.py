"""The first screen in a real browser: what is visible, that it is current, its address, its accessibility."""

import json

import pytest
from browser_visits import CHROMIUM, DESKTOP, EXPLORED, PHONE, Visit, violations
from PIL import Image

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium; apt-get install chromium"),
]

DARK = {"color_scheme": "dark"}
WATCH = """() => {
    const card = name => [...document.querySelectorAll('#numbers .card')].find(
        each => each.innerText.startsWith(name))?.querySelector('dd').innerText;
    const seen = window.seen = new Set();
    const look = () => {
        const [ratio, seed] = ['ratio', 'seed'].map(id => document.querySelector(`#${id} input`).value);
        const current = !document.body.dataset.stale;
        seen.add(JSON.stringify([current, ratio, seed, card('mask ratio'), card('seed')]));
        requestAnimationFrame(look);
    };
    look();
}"""
"""Notes in every frame whether the result counts as current, the controls, and the numbers below it."""


@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_everything_that_matters_is_on_the_first_screen_and_does_not_jump(browser, address, options):
    visit = Visit(browser, address, slower=6, **options)
    page, (width, height) = visit.page, options["viewport"].values()
    assert page.evaluate("window.shift") < 0.05
    boxes = {name: page.locator(f"#{name}").bounding_box() for name in
             ("picture", "controls", "masked", "rebuilt", "again", "rebuild-model", "method")}  # fmt: skip
    for name, box in boxes.items():
        assert box["y"] >= 0 and box["y"] + box["height"] <= height, (name, box)
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, (name, box)
    assert boxes["controls"]["y"] + boxes["controls"]["height"] <= boxes["masked"]["y"]
    assert min(boxes[name]["height"] for name in ("picture", "masked", "rebuilt")) >= 140
    names = page.locator("#examples .caption-label, #result [data-testid=block-label]")
    assert names.evaluate_all("all => all.filter(e => e.scrollWidth > e.clientWidth).length") == 0, "cut off"
    assert not page.locator("#runtime").is_visible()
    visit.more()
    assert page.locator("#runtime").is_visible()
    page.wait_for_timeout(600)  # what moves sooner after a click does not count
    page.add_style_tag(content="#tabs { margin-top: 300px; }")
    page.wait_for_function("window.shift > 0.1")  # the measure works
    visit.context.close()


def test_the_result_is_never_that_of_other_settings(browser, address):
    visit = Visit(browser, address, **DESKTOP)
    page = visit.page
    visit.choose("method", "MAE")
    page.wait_for_selector("#ratio input[type=range]", state="visible")
    visit.until("text.includes('78%')")
    page.evaluate(WATCH)
    box = page.locator("#ratio input[type=range]").bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.77, y)
    page.mouse.down()
    for share in (0.7, 0.6, 0.5, 0.4, 0.3, 0.2):
        page.mouse.move(box["x"] + box["width"] * share, y)
        page.wait_for_timeout(30)
    visit.until("!text.includes('78%')")  # while the button is down
    page.mouse.up()
    page.focus("#ratio input[type=range]")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    for seed in (1, 2, 3, 4, 5):
        page.fill("#seed input", str(seed))
    visit.current()
    visit.until("text.includes('seed\\n5')")
    ratio = float(page.input_value("#ratio input"))
    assert visit.number("mask ratio") == hidden(ratio)
    frames = [json.loads(each) for each in page.evaluate("[...window.seen]")]
    others = {current: [frame for now, *frame in frames if now is current and is_of_others(*frame)]
              for current in (True, False)}  # fmt: skip
    assert others[True] == [], others[True]
    assert others[False], "older results were shown, and marked as such"
    visit.context.close()


def hidden(ratio: float) -> str:
    """The share of hidden units, of 3 x 3, as the page writes it."""
    return f"{1 - min(max(round(9 * (1 - ratio)), 1), 8) / 9:.0%}"


def is_of_others(ratio: str, seed: str, shown_ratio: str, shown_seed: str) -> bool:
    return seed != shown_seed or shown_ratio != hidden(float(ratio))


def test_the_address_keeps_the_settings_and_no_upload(browser, address, tmp_path):
    wanted = "?model=masked&method=mae&ratio=0.5&seed=7&example=flower"
    visit = Visit(browser, f"{address}{wanted}", **DESKTOP)
    page = visit.page

    def shown() -> list[str]:
        visit.current()
        return [page.input_value(f"#{name} input") for name in ("rebuild-model", "method", "ratio", "seed")]

    visit.until("text.includes('seed\\n7')")
    assert shown() == ["masked", "MAE: one random mask", "0.5", "7"] and page.url == f"{address}{wanted}"
    page.fill("#seed input", "8")
    visit.until("text.includes('seed\\n8')")
    visit.current()
    psnr = visit.number("PSNR, masked pixels")
    page.reload()
    visit.until("text.includes('seed\\n8')")
    assert shown()[-1] == "8" and visit.number("PSNR, masked pixels") == psnr
    Image.new("RGB", (90, 70), (9, 99, 199)).save(tmp_path / "private.png")
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", str(tmp_path / "private.png"))
    page.wait_for_function("() => document.querySelector('#about')?.innerText.includes('90 x 70')")
    visit.current()
    page.wait_for_function("() => !location.search.includes('example')")
    assert "private" not in page.url and "seed=8" in page.url
    page.goto(f"{address}?model=/etc&method=x&ratio=nan&seed=-1&example=../../etc/passwd")
    visit.current()
    assert shown() == ["small", "CoMA: complementary pair", "0.75", "0"]
    visit.context.close()


@pytest.mark.parametrize("options", [DESKTOP, DESKTOP | DARK, PHONE], ids=["light", "dark", "phone"])
def test_axe_finds_nothing_serious(browser, address, options):
    visit = Visit(browser, address, **options)
    visit.more()
    found = violations(visit.page)
    for tab in ("Compare", "Explore", "Nearest", "Classify", "Runtimes"):
        visit.open_tab(tab)
        visit.page.wait_for_timeout(300)
        if tab == "Explore":
            visit.page.wait_for_function(EXPLORED)
        found |= violations(visit.page)
    assert found == set()
    visit.context.close()


def test_axe_would_find_a_fault(browser, address):
    visit = Visit(browser, address, **DESKTOP)
    visit.page.evaluate("document.querySelector('#rules p').style.color = '#eee'")
    assert any(each.startswith("color-contrast") for each in violations(visit.page))
    visit.context.close()
