"""The tab that compares all runtimes of a model."""

from __future__ import annotations

from typing import Any

import gradio as gr

from coma.runtimes.model_spec import GraphKind
from demo.compare_runtimes import RuntimeTiming, time_runtimes
from demo.pages.page_state import PRIVATE
from demo.session import MODEL_EVENT, Session, note, table

PROGRESS = gr.Progress()
HEAD = ("runtime", "latency", "speed-up", "cosine", "largest difference", "version")


def runtimes_tab(session: Session, picture: gr.Image) -> None:
    """Builds the tab."""
    choices: dict[str, tuple[str, GraphKind]] = {
        f"{name}: {form}" if len(forms) > 1 or len(session.models.names) > 1 else form: (name, form)
        for name in session.models.names
        for forms in (session.models[name].forms,)
        for form in forms
    }
    gr.Markdown(
        "Runs the same weights with PyTorch, ONNX Runtime, OpenVINO and TensorRT on the picture on the left. "
        "Exported files are listed only if `coma export` verified them and they hold these weights."
    )
    with gr.Row(elem_classes="settings", equal_height=True):
        what = gr.Dropdown(
            list(choices), value=list(choices)[-1], label="Model", elem_id="compare-model", filterable=False
        )
        go = gr.Button("Compare", variant="primary", elem_id="compare")
    result = gr.HTML(_waiting(session, *list(choices.values())[-1]), elem_id="comparison", label="Table")
    plain = gr.JSON(visible=False, label="Comparison")

    def compare_runtimes(picture: str | None, what: str, progress: Any = PROGRESS) -> tuple[str, list[Any]]:
        """Measures every runtime of a model on a picture."""
        name, form = choices[what]
        model = session.models[name]
        config = model.config
        channels = config.model.channels if config else len(model.description(form).preprocessing.mean)
        pixels = session.pixels(picture, channels)

        def report_progress(share: float, title: str) -> None:
            progress(share, desc=f"running {title}")

        rows = time_runtimes(model, form, pixels, report_progress)
        return _result(rows, form), [vars(row) for row in rows]

    event = go.click(
        compare_runtimes, [picture, what], [result, plain], api_name="compare_runtimes", **MODEL_EVENT
    )
    gr.on(
        [what.change, picture.change], lambda chosen: _waiting(session, *choices[chosen]), what, result,
        cancels=[event], **PRIVATE,
    )  # fmt: skip


def _waiting(session: Session, name: str, form: GraphKind) -> str:
    rows = [
        [option.title, f"not available: {option.reason}" if option.reason else "press Compare"]
        for option in session.models[name].options(form)
    ]
    off = [i for i, option in enumerate(session.models[name].options(form)) if option.reason]
    return table(HEAD, rows, off, caption="Runtimes")


def _result(rows: list[RuntimeTiming], form: GraphKind) -> str:
    first = next((row for row in rows if row.reason is None), None)
    shown: list[list[str]] = []
    for row in rows:
        if row.reason is not None or first is None:
            shown.append([row.title, f"not available: {row.reason}"])
            continue
        unit = " of 255" if form == "reconstructor" else ""
        same = "reference" if row is first else f"{row.difference:.2g}{unit}"
        shown.append(
            [
                row.title,
                f"{row.milliseconds:.1f} ms",
                f"{first.milliseconds / row.milliseconds:.2f}",
                "1" if row is first else f"{row.cosine:.7f}",
                same,
                row.version,
            ]
        )
    off = [i for i, row in enumerate(rows) if row.reason is not None]
    text = (
        "Latency is the median for one picture, including copies to and from the GPU; speed-up, cosine and "
        "difference are relative to the first row."
    )
    return table(HEAD, shown, off, caption="Runtimes") + note(text)
