"""The page that requests are sent to, with very small models."""

import gc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from browser_visits import CHROMIUM
from demo_files import collection, exported_models, models, models_in, served
from known_models import Known
from page_requests import Server

from demo.commands.demo import load_models, serve


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    given = models(folder)
    search = collection(folder, given[0])
    with served(folder / "uploads", *given, search=search) as page, httpx.Client(timeout=60) as web:
        web.base_url = page.local_url
        yield Server(web, page.config, (folder / "uploads").resolve(), folder)


@pytest.fixture(scope="module")
def address(once, tmp_path_factory) -> Iterator[str]:
    """Address of a page whose first model is exported, too, and finds pictures."""
    folder, given = tmp_path_factory.mktemp("page"), models_in(once("page", exported_models))
    with served(folder / "uploads", *given, search=collection(folder, given[0])) as page:
        yield page.local_url


@pytest.fixture(scope="module")
def predictions(tmp_path_factory) -> Iterator[str]:
    """Address of a page with a detector and a segmentor whose answers are known, and a small classifier."""
    folder = tmp_path_factory.mktemp("known")
    given = load_models(models(folder)[:2], "cpu")
    given._models |= {name: Known(name, kind, None, None, []) for name, kind in
                      (("finder", "detector"), ("painter", "segmentor"))}  # fmt: skip
    page = serve(given, folder / "uploads")
    yield page.local_url
    page.close(verbose=False)
    page.server.thread.join(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield running
        running.close()


@pytest.fixture(scope="module", autouse=True)
def litter():
    """What gradio leaves unclosed is collected here, where its warnings are ignored, not in other modules."""
    yield
    gc.collect()
