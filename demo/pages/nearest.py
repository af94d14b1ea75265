"""The tab that searches the pictures of a file of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from demo.nearest import MOST, PictureSearch
from demo.pages.page_state import clear_on_change
from demo.session import MODEL_EVENT, Session, note


def nearest_tab(session: Session, picture: gr.Image, search: PictureSearch) -> None:
    """Builds the tab, which searches on a press of the button."""
    gr.HTML(note(search.title), padding=False)
    with gr.Row(elem_classes="settings", equal_height=True):
        count = gr.Slider(1, MOST, 12, step=1, label="Pictures", elem_id="nearest-count", buttons=[])
        go = gr.Button("Find similar pictures", variant="primary", elem_id="find")
    found = gr.Gallery(
        label="Nearest pictures", show_label=False, format="png", columns=6, height="auto", interactive=False,
        object_fit="contain", buttons=["download", "fullscreen"], elem_id="nearest", elem_classes="pictures",
    )  # fmt: skip
    plain = gr.JSON(visible=False, label="Similarities")

    def nearest(picture: str | None, count: float) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
        """Returns the pictures of the collection that are most similar to a picture."""
        results = search.nearest(session.pixels(picture, search.channels), int(count))
        pictures = [(each.thumbnail, f"{each.similarity:.3f} {each.name}") for each in results]
        files = session.save_all(pictures, f"{Path(str(picture)).stem} nearest")
        return files, [{"name": each.name, "similarity": round(each.similarity, 4)} for each in results]

    event = go.click(nearest, [picture, count], [found, plain], api_name="nearest", **MODEL_EVENT)
    clear_on_change([picture, count], [found, plain], event)
