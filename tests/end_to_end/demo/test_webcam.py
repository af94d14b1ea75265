"""The webcam in a real browser: a picture, a recording, and what the page says where there is no camera.

The camera is a file that is red on the left and blue on the right.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_visits import CHROMIUM, DESKTOP, PHONE, Visit, violations
from PIL import Image

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium; apt-get install chromium"),
]

ALLOWED, FAKE = "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"
NOTE = """
    window.asked = [], window.streams = [];
    const open = navigator.mediaDevices?.getUserMedia.bind(navigator.mediaDevices);
    if (open) navigator.mediaDevices.getUserMedia = async wanted => {
        asked.push(wanted);
        streams.push(await open(wanted));
        return streams.at(-1);
    };"""
"""Notes what the page asks the browser for, and what it gets."""
OFF = "() => streams.length && streams.every(s => s.getTracks().every(one => one.readyState == 'ended'))"
"""Whether the cameras that were on are off."""


def launch(browser: Any, *options: str) -> Any:
    more = ["--no-sandbox", "--disable-dev-shm-usage", *options]
    return browser.browser_type.launch(executable_path=CHROMIUM, args=more)


@pytest.fixture(scope="module")
def camera(browser, tmp_path_factory) -> Iterator[Any]:
    """A browser with a camera."""
    red, blue = (81, 90, 240), (41, 240, 110)  # Y, U, V
    planes = [np.repeat([[red[i]] * half + [blue[i]] * half], rows, axis=0).astype(np.uint8).tobytes()
              for i, half, rows in ((0, 160, 240), (1, 80, 120), (2, 80, 120))]  # fmt: skip
    film = tmp_path_factory.mktemp("camera") / "halves.y4m"
    film.write_bytes(b"YUV4MPEG2 W320 H240 F20:1 Ip A1:1 C420jpeg\n" + b"FRAME\n" + b"".join(planes))
    running = launch(browser, ALLOWED, FAKE, f"--use-file-for-fake-video-capture={film}")
    yield running
    running.close()


def visit_with(browser: Any, address: str, **options: Any) -> Visit:
    visit = Visit(browser, address, **options)
    visit.page.evaluate(f"() => {{ {NOTE} }}")
    return visit


def choose_webcam(page: Any, place: str) -> None:
    """Chooses the webcam, which lies within its place like what comes next, and asks for the camera."""
    page.click(f"{place} button[aria-label='Capture from camera']")
    ask = page.locator(f"{place} [title='grant webcam access'] .wrap")
    bar = page.locator(f"{place} .source-selection")
    page.wait_for_timeout(400)  # it fades in
    assert ask.bounding_box()["y"] + ask.bounding_box()["height"] <= bar.bounding_box()["y"]
    assert_inside(page, place)
    ask.click()


def assert_inside(page: Any, place: str) -> None:
    around = page.locator(place).bounding_box()
    for button in page.locator(f"{place} :is(button, [role=button]):visible").all():
        box, name = button.bounding_box(), button.get_attribute("aria-label")
        assert box["y"] >= around["y"], name
        assert box["y"] + box["height"] <= around["y"] + around["height"], name
        assert min(box["width"], box["height"]) >= 24, (name, box)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def halves(picture: Image.Image) -> str:
    """The colours left and right: r and b."""
    width, height = picture.size
    pixels = np.asarray(picture.convert("RGB"))[height // 2, [width // 4, width * 3 // 4]]
    return "".join("rgb"[each.argmax()] for each in pixels)


@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_picture_of_the_webcam_is_reconstructed_and_classified(camera, predictions, options):
    visit = visit_with(camera, predictions, **options)
    page = visit.page
    first = visit.number("PSNR, masked pixels")
    choose_webcam(page, "#picture")
    page.wait_for_selector("#picture button[aria-label='capture photo']")
    page.wait_for_function("() => document.querySelector('#picture video').readyState > 1")
    assert page.evaluate("getComputedStyle(document.querySelector('#picture video')).transform") == "none"
    assert_inside(page, "#picture")
    assert violations(page) == set()
    page.click("#picture button[aria-label='capture photo']")
    page.wait_for_function("() => /320 x 240 px, PNG/.test(document.querySelector('#about')?.innerText)")
    visit.current()
    page.wait_for_function(OFF)
    assert page.evaluate("asked.map(each => each.audio)") == [False]
    assert "Not in the model's training data" in page.inner_text("#about")
    assert page.locator("#about .badge").count() == 0
    assert visit.number("PSNR, masked pixels") != first
    page.wait_for_function("() => location.search && !location.search.includes('example')")
    assert set(re.findall(r"(\w+)=", page.url)) == {"model", "method", "ratio", "seed"}
    for shown in ("#picture", "#seen"):
        sent = page.request.get(page.get_attribute(f"{shown} img", "src"))
        assert halves(Image.open(io.BytesIO(sent.body()))) == "rb", shown
    visit.open_tab("Classify")
    page.click("#classifier-go")
    page.wait_for_function("() => /cat|cup|face/.test(document.querySelector('#top5').innerText)")
    page.locator("#examples img").first.click()
    page.wait_for_function("() => !/cat|cup|face/.test(document.querySelector('#top5').innerText)")
    page.wait_for_function("() => location.search.includes('example=temple')")
    assert visit.outside(predictions) == [] and visit.errors == []
    visit.context.close()


@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_recording_of_the_webcam_is_segmented(camera, predictions, options):
    visit = visit_with(camera, predictions, **options)
    page = visit.page
    visit.open_tab("Segment")
    page.click("#segmentor-video > button")
    choose_webcam(page, "#segmentor-clip")
    page.click("#segmentor-clip button[aria-label='start recording']")
    assert violations(page) == set()
    page.wait_for_timeout(1500)
    assert_inside(page, "#segmentor-clip")
    page.click("#segmentor-clip button[aria-label='start recording']")  # which stops it, too
    page.wait_for_selector("#segmentor-clip [data-testid='Video-player']")
    lasts = "document.querySelector('.controls .time')?.innerText"
    page.wait_for_function(rf"() => /^0:00 . 0:0[1-9]$/.test({lasts})")
    page.wait_for_function(OFF)
    assert page.evaluate("asked.map(each => each.audio)") == [False]
    assert page.locator("#segmentor-clip .mirror").count() == 0
    assert_inside(page, "#segmentor-clip")
    assert violations(page) == set()
    page.click("#segmentor-video-go")
    page.wait_for_function("() => document.querySelector('#segmentor-frames img')?.naturalWidth == 320")
    told = page.inner_text("#segmentor-video-classes")
    counted = re.search(r"(\d+) of (\d+) frames, all ([\d.]+) s", told)
    assert counted, told
    frames, total, seconds = counted.groups()
    assert 5 < int(frames) <= int(total) and 1 < float(seconds) < 12, told
    assert Path(page.get_attribute("#segmentor-frames img", "src")).name == "sample-painter-segment.webp"
    assert violations(page) == set()
    cell = "getComputedStyle(document.querySelector('#segmentor-video-classes td'))"
    assert page.evaluate(f"{cell}.borderLeftWidth") == "0px"  # gradio draws a black grid
    page.click("#segmentor-clip button[aria-label='Clear']")
    page.wait_for_selector("#segmentor-frames img", state="detached")
    assert visit.outside(predictions) == [] and visit.errors == []
    visit.context.close()


@pytest.mark.parametrize(
    ("options", "said"), [((FAKE,), "allow it for this page"), ((ALLOWED,), "No camera was found")]
)
def test_the_page_says_why_there_is_no_camera(browser, predictions, options, said):
    running = launch(browser, *options)
    visit = visit_with(running, predictions, **PHONE)
    page = visit.page
    choose_webcam(page, "#picture")
    page.locator("#picture [role=alert]", has_text=said).wait_for()
    assert violations(page) == set()
    page.locator("#picture [title='grant webcam access'] .wrap").click()
    page.wait_for_function("() => asked.length == 2")
    page.wait_for_selector("#picture [role=alert]")
    if ALLOWED not in options:
        page.click("#picture button[aria-label='Paste from clipboard']")
        page.locator("#picture [role=alert]", has_text="may not read the clipboard").wait_for()
        assert violations(page) == set()
    page.locator("#examples img").first.click()
    visit.current()
    assert page.locator(".refused").count() == 0
    running.close()


def test_a_page_that_browsers_give_no_camera_does_not_offer_it(browser, predictions):
    running = launch(browser, ALLOWED, FAKE, "--host-resolver-rules=MAP demo.test 127.0.0.1")
    visit = Visit(running, predictions.replace("127.0.0.1", "demo.test"), **DESKTOP)
    for name in ("Capture from camera", "Paste from clipboard"):
        assert not visit.page.locator(f"#picture button[aria-label='{name}']").is_visible(), name
    assert visit.page.locator("#picture button[aria-label='Upload file']").is_visible()
    running.close()
