"""Videos on the served page: by programs, and in a real browser."""

import signal
from pathlib import Path
from typing import Any

import pytest
from browser_visits import CHROMIUM, DESKTOP, PHONE, Visit, violations
from PIL import Image
from video_files import bad_videos, hang, video

from demo import inputs
from demo.pages import downstream

pytestmark = pytest.mark.filterwarnings("ignore")  # gradio and what it builds on warn of each other


@pytest.fixture(scope="module")
def client(predictions, tmp_path_factory):
    from gradio_client import Client

    folder = tmp_path_factory.mktemp("results")
    return Client(predictions, verbose=False, download_files=str(folder), httpx_kwargs={"timeout": 120})


def predict(client: Any, path: Path, model: str, verb: str, **more: Any) -> tuple[str, str, dict[str, Any]]:
    from gradio_client import handle_file

    values = {"video": handle_file(str(path)), "model": model, "runtime": "PyTorch", **more}
    return client.predict(**values, api_name=f"/{verb}_video")


def frames_of(path: str) -> list[Image.Image]:
    with Image.open(path) as film:
        assert film.format == "WEBP"
        found = []
        for number in range(getattr(film, "n_frames", 0)):
            film.seek(number)
            found.append(film.convert("RGB"))
        return found


@pytest.mark.parametrize(
    ("model", "verb", "more", "rows"),
    [
        ("pets", "classify", {}, None),
        ("finder", "detect", {"score": 0.5}, [{"class": "roof", "frames": 6, "objects": 12}]),
        ("painter", "segment", {}, [{"class": "roof", "frames": 6, "mean_share": 0.75},
                                    {"class": "sky", "frames": 6, "mean_share": 0.25}]),
    ],
)  # fmt: skip
def test_every_kind_of_model_predicts_on_a_video(client, tmp_path, model, verb, more, rows):
    path, text, facts = predict(client, video(tmp_path / "My clip.avi", frames=6), model, verb, **more)
    assert Path(path).name == f"my-clip-{model}-{verb}.webp"
    shown = frames_of(path)
    assert len(shown) == 6 and {each.size for each in shown} == {(320, 240)}
    assert len({each.tobytes() for each in shown}) == 6
    assert facts["frames"] == facts["frames_in_video"] == len(facts["predictions"]) == 6
    assert "6 of 6 frames, all 0.6 s, " in text and "6 of 6</td>" in text
    if rows is None:
        (row,) = facts["classes"]
        assert row["class"] in ("cat", "cup", "face") and row["frames"] == 6
        assert facts["predictions"][0][row["class"]] == max(facts["predictions"][0].values())
        assert shown[0].getpixel((2, 2)) != (40, 40, 40), "the class stands in the corner"
    else:
        assert facts["classes"] == rows


def test_boxes_are_in_pixels_of_the_uploaded_file(client, tmp_path):
    from gradio_client import handle_file

    large = video(tmp_path / "large.avi", frames=1, width=640, height=480)
    _, _, facts = predict(client, large, "finder", "detect", score=0.9)
    assert facts["predictions"][0][0]["box"] == [12.5, 25, 262.5, 275]  # of 512 x 384
    Image.new("RGB", (3200, 2400)).save(tmp_path / "large.png")
    picture = handle_file(str(tmp_path / "large.png"))
    _, rows, objects = client.predict(picture, "finder", "PyTorch", 0.9, api_name="/detect")
    assert [each["box"] for each in objects] == [[20, 40, 420, 440], [600, 100, 1000, 800]]  # of 1600 x 1200
    assert "<td>20 40 420 440</td>" in rows


def test_bad_videos_get_a_sentence_and_the_page_lives_on(client, tmp_path, monkeypatch):
    for name, path in bad_videos(tmp_path).items():
        with pytest.raises(Exception) as told:
            predict(client, path, "finder", "detect", score=0.5)
        assert name.split(":")[0] in str(told.value) and "Traceback" not in str(told.value), name
    with pytest.raises(Exception, match="Choose a video first"):
        client.predict(None, "finder", "PyTorch", 0.5, api_name="/detect_video")
    nothing = predict(client, tmp_path / "good.avi", "finder", "detect", score=0.95)
    assert nothing[2]["classes"] == [] and "No object reaches this score" in nothing[1]
    monkeypatch.setattr(downstream, "FRAME_SECONDS", 0.0)  # there is no time for a second frame
    path, text, facts = predict(client, tmp_path / "good.avi", "finder", "detect", score=0.5)
    assert facts["frames"] == len(frames_of(path)) == 1 and facts["frames_decoded"] == 8
    assert "1 of 8 frames, the first 0.1 s, " in text and "The time ended before the other 7." in text


def test_the_end_of_an_event_is_the_end_of_its_decoder(client, tmp_path, monkeypatch):
    started = hang(monkeypatch)
    monkeypatch.setattr(inputs, "EVENT_SECONDS", 1)
    with pytest.raises(Exception, match="longer than 1 seconds"):
        predict(client, video(tmp_path / "a.avi", frames=2), "finder", "detect", score=0.5)
    assert started[0].wait(30) == -signal.SIGKILL


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; apt-get install chromium")
@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_video_is_uploaded_and_its_predictions_play(browser, predictions, tmp_path, options):
    visit = Visit(browser, predictions, **options)
    page = visit.page
    visit.open_tab("Detect")
    page.click("#detector-video > button")
    path = video(tmp_path / "ball.webm", frames=12)  # Chromium plays WebM
    page.set_input_files("#detector-clip input[type=file]", str(path))
    page.wait_for_selector("#detector-clip video")
    assert violations(page) == set()
    page.click("#detector-video-go")
    page.wait_for_selector("#detector-frames img")
    page.wait_for_function("() => document.querySelector('#detector-frames img').naturalWidth == 320")
    assert page.locator("#detector-frames img").get_attribute("alt")
    assert "12 of 12 frames" in page.inner_text("#detector-video-classes")
    assert "24" in page.inner_text("#detector-video-classes tbody")
    with page.expect_download() as saved:
        page.click("#detector-video-classes a")
    assert saved.value.suggested_filename == "ball-finder-detect.webp"
    assert violations(page) == set()
    assert page.evaluate("document.documentElement.scrollWidth") <= options["viewport"]["width"]
    page.wait_for_function("() => document.querySelector('#detector-clip video').readyState >= 1")
    sent = page.request.get(page.get_attribute("#detector-clip video", "src"))
    assert sent.headers["content-type"] == "video/webm" and "content-disposition" not in sent.headers
    assert visit.outside(predictions) == [] and visit.errors == []
    visit.context.close()


def test_without_opencv_there_is_no_part_for_videos(monkeypatch):
    import gradio as gr

    monkeypatch.setattr(downstream, "AVAILABLE", False)
    session: Any = None
    with gr.Blocks() as page:
        downstream._video_part(session, "detector")
    assert not page.blocks or all(not isinstance(each, gr.Accordion) for each in page.blocks.values())
