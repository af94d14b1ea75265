"""The tab that runs one model by every runtime there is, and compares them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from coma.runtimes.model_spec import GraphKind
from demo.compare_runtimes import RuntimeTiming, time_runtimes
from demo.session import MODEL_EVENT, Session, note, table

PROGRESS = gr.Progress()
HEAD = ("runtime", "one picture", "times PyTorch's speed", "cosine", "largest difference", "what ran")


def runtimes_tab(session: Session, picture: gr.Image) -> None:
    """Build the tab."""
    choices: dict[str, tuple[str, GraphKind]] = {
        f"{name}: {form}" if len(forms) > 1 or len(session.models.names) > 1 else form: (name, form)
        for name in session.models.names
        for forms in (session.models[name].forms,)
        for form in forms
    }
    gr.Markdown(
        "The same weights by PyTorch, ONNX Runtime and TensorRT, on the picture on the left. A file is "
        "offered only if `coma export` verified it and it was made of these very weights."
    )
    with gr.Row(elem_classes="settings", equal_height=True):
        what = gr.Dropdown(
            list(choices), value=list(choices)[-1], label="Model", elem_id="compare-model", filterable=False
        )
        go = gr.Button("Compare", variant="primary", elem_id="compare")
    result = gr.HTML(_waiting(session, *list(choices.values())[-1]), elem_id="comparison", label="Table")
    plain = gr.JSON(visible=False, label="Comparison")

    def compare_runtimes(picture: str | None, what: str, progress: Any = PROGRESS) -> tuple[str, list[Any]]:
        """Time every runtime of a model on a picture."""
        name, form = choices[what]
        model = session.models[name]
        config = model.config
        channels = config.model.channels if config else len(model.description(form).preprocessing.mean)
        pixels = session.pixels(picture, channels)

        def report_progress(share: float, title: str) -> None:
            progress(share, desc=f"running {title}")

        rows = time_runtimes(model, form, pixels, report_progress)
        return _result(rows, form), [vars(row) for row in rows]

    go.click(compare_runtimes, [picture, what], [result, plain], api_name="compare_runtimes", **MODEL_EVENT)
    what.change(
        lambda chosen: _waiting(session, *choices[chosen]),
        what,
        result,
        api_visibility="private",
        show_progress="hidden",
    )


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
    text = "Median of the runs, copies to and from a GPU included; differences are to the first row."
    return table(HEAD, shown, off, caption="Runtimes") + note(text)
