"""The page that requests are sent to, with very small models."""

import gc
from collections.abc import Iterator

import httpx
import pytest
from demo_files import models, served
from page_requests import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    with served(folder / "uploads", *models(folder)) as page, httpx.Client(timeout=60) as web:
        web.base_url = page.local_url
        yield Server(web, page.config, (folder / "uploads").resolve(), folder)


@pytest.fixture(scope="module", autouse=True)
def litter():
    """What gradio leaves unclosed is collected here, where its warnings are ignored, not in other modules."""
    yield
    gc.collect()
