"""The pages of detectors and segmentors in a real browser, with models whose answers are known."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from browser_visits import CHROMIUM, DESKTOP, Visit, violations
from demo_files import models

from coma.runtimes.model_spec import Preprocessing
from demo.commands.demo import load_models, serve
from demo.models import Model
from demo.runtimes import RuntimeOption

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


class Known(Model):
    """A model whose predictions on pictures of 640 x 427 pixels are known."""

    spec: Any = None

    def options(self, form: Any) -> list[RuntimeOption]:
        return [RuntimeOption("PyTorch", form, Path("none"))] if form == self.kind else []

    def runtime(self, form: Any, title: str | None = None) -> Any:
        self.spec = SimpleNamespace(
            preprocessing=Preprocessing("none", None, (0.5,) * 3, (0.2,) * 3), class_names=("sky", "roof")
        )
        return self

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = images.shape[-2:]
        if self.kind == "segmentor":
            classes = torch.zeros(1, height, width, dtype=torch.long)
            classes[:, height // 4 :] = 1
            return {"classes": classes}
        boxes = torch.tensor([[[10, 20, 210, 220], [300, 50, 500, 400], [0, 0, 90, 90]]]).float()
        scores = torch.tensor([[0.91, 0.914, 0.3]])
        return {"boxes": boxes, "scores": scores, "labels": torch.tensor([[1, 1, 0]])}


@pytest.fixture(scope="module")
def predictions(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("known")
    given = load_models(models(folder)[:1], "cpu")
    given._models |= {name: Known(name, kind, None, None, []) for name, kind in
                      (("finder", "detector"), ("painter", "segmentor"))}  # fmt: skip
    page = serve(given, folder / "uploads")
    yield page.local_url
    page.close(verbose=False)
    page.server.thread.join(60)


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
