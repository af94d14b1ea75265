"""Undocumented parts of gradio that `demo.gradio_internals` uses still exist and still do the same."""

import asyncio
import inspect
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio import routes
from gradio.blocks import Block

from demo import gradio_internals
from demo.inputs import CheckedBlocks, CheckedEditor, CheckedImage, CheckedVideo

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_methods_that_are_replaced_are_gradios():
    for name in ("move_resource_to_block_cache", "async_move_resource_to_block_cache"):
        assert callable(getattr(Block, name)), name
    for name in ("process_api", "preprocess_data"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (CheckedBlocks, gr.Blocks))
        assert list(theirs.parameters)[:3] == list(ours.parameters)[:3], name
    assert callable(gr.ImageEditor.accept_blobs) and vars(gr.ImageEditor.accept_blobs)["_is_server_fn"]


def test_components_keep_their_template_and_files_stay(tmp_path):
    with gr.Blocks() as page:
        image, editor, video = CheckedImage(), CheckedEditor(), CheckedVideo()
    assert [each.get_block_name() for each in (image, editor, video)] == ["image", "imageeditor", "video"]
    path = tmp_path / "a.png"
    assert image.move_resource_to_block_cache(path) == str(path)
    assert asyncio.run(image.async_move_resource_to_block_cache(path)) == str(path)
    assert gradio_internals.component_id(image) in page.blocks
    page.temp_file_sets[0].add("x")
    gradio_internals.clear_file_lists(page)
    assert not any(page.temp_file_sets)


def test_a_cookie_of_gradios_login_is_known():
    app = SimpleNamespace(auth={"a": "b"}, cookie_id="1", tokens={"token": "a"})
    scope = {"app": app, "headers": [(b"cookie", b"access-token-1=token")]}
    assert gradio_internals.is_logged_in(scope)
    assert not gradio_internals.is_logged_in({**scope, "headers": []})
    assert gradio_internals.is_logged_in({"app": SimpleNamespace(auth=None), "headers": []})
    source = inspect.getsource(routes)
    assert "access-token-{app.cookie_id}" in source and "access-token-unsecure-{app.cookie_id}" in source
    assert "app.tokens[" in source
