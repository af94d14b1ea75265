"""The pages of detectors and segmentors in a real browser, with models whose answers are known."""

import pytest
from browser_visits import CHROMIUM, DESKTOP, Visit, violations

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium; apt-get install chromium"),
]
DIMMED = """() => {
    const masks = [...document.querySelectorAll('#detections .mask')];
    const [first, second] = masks.map(each => Number(getComputedStyle(each).opacity));
    return first < second;
}"""
"""Whether the first object is fainter than the second."""


def test_objects_and_classes_are_named_and_shown_on_hover(browser, predictions):
    visit = Visit(browser, predictions, **DESKTOP)
    page = visit.page
    page.get_by_role("tab", name="Detect").click()
    page.click("#detector-go")
    page.wait_for_selector("#detections .legend-item")
    names = page.locator("#detections .legend-item").all_inner_texts()
    assert [name.strip() for name in names] == ["roof 0.91", "roof 0.91 (2)"]
    assert "0.91" in page.inner_text("#objects tbody") and "2 objects" in page.inner_text("#objects")
    page.locator("#detections .legend-item").nth(1).hover()
    page.wait_for_function("() => document.querySelector('#detections .mask.active')")
    page.wait_for_function(DIMMED)
    assert violations(page) == set()
    page.fill("#score input", "0.2")
    page.wait_for_selector("#detections .legend-item", state="detached")  # nothing of another threshold
    page.click("#detector-go")
    page.locator("#detections .legend-item", has_text="sky 0.30").wait_for()

    page.get_by_role("tab", name="Segment").click()
    page.click("#segmentor-go")
    page.wait_for_selector("#classes .legend-item")
    names = page.locator("#classes .legend-item").all_inner_texts()
    assert [name.strip() for name in names] == ["roof 75%", "sky 25%"]
    colours = {each.evaluate("each => getComputedStyle(each).backgroundColor") for each in
               page.locator("#classes .legend-item").all()}  # fmt: skip
    assert len(colours) == 2
    assert violations(page) == set()
    assert visit.outside(predictions) == [] and visit.errors == []
    visit.context.close()
