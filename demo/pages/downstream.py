"""The tabs of fine-tuned models: classify, detect, segment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from coma.errors import BadInput
from coma.runtimes.model_spec import GraphKind
from demo.inputs import EVENT_SECONDS, CheckedVideo
from demo.models import Model
from demo.pages import webcam
from demo.pages.page_state import clear_on_change
from demo.predict import (
    MOST_SHOWN,
    Annotation,
    classify,
    describe_objects,
    detect,
    segment,
    shares,
    show_classes,
    show_objects,
    shown_picture,
)
from demo.predict_video import AMOUNTS, FramePrediction, count_classes, predict_frame, write_frames
from demo.session import MODEL_EVENT, Session, address, note, slug, table
from demo.upload import MAX_BYTES
from demo.videos import AVAILABLE, FORMATS, MOST_FRAMES, VIDEO_SECONDS, Clip, read_clip

TITLES: dict[GraphKind, str] = {"classifier": "Classify", "detector": "Detect", "segmentor": "Segment"}
PROGRESS = gr.Progress()
FRAME_SECONDS = EVENT_SECONDS * 3 / 4
"""Seconds of an event in which the frames of a video are predicted; in the rest the result is written."""


def classify_tab(session: Session, picture: gr.Image) -> None:
    """Builds the tab that shows the five most probable classes."""
    model, runtime, go = _pickers(session, "classifier", "Classify")
    bars = gr.Label(label="Top 5", num_top_classes=5, elem_id="top5")

    def run(picture: str | None, model: str, runtime: str) -> dict[str, float]:
        """Returns the most probable classes of a picture."""
        chosen, opened = _open(session, model, runtime, "classifier")
        return classify(opened, _pixels(session, chosen, picture), chosen.class_names())

    inputs = [picture, model, runtime]
    event = go.click(run, inputs, bars, api_name="classify", **MODEL_EVENT)
    clear_on_change(inputs, [bars], event)
    _video_part(session, "classifier", model, runtime)


def detect_tab(session: Session, picture: gr.Image) -> None:
    """Builds the tab that shows detected objects."""
    model, runtime, go = _pickers(session, "detector", "Detect")
    score = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Score threshold", elem_id="score")
    drawn = _annotated("Detected objects", "detections")
    rows = gr.HTML(elem_id="objects")
    plain = gr.JSON(visible=False, label="Objects")

    def run(picture: str | None, model: str, runtime: str, score: float) -> tuple[Any, str, list[Any]]:
        """Returns the objects in a picture with at least this score."""
        chosen, opened = _open(session, model, runtime, "detector")
        pixels = _pixels(session, chosen, picture)
        found = detect(opened, pixels, chosen.class_names(), float(score))
        facts = describe_objects(found, session.uploads.open(str(picture)).scale)
        cells = [
            [each.name, f"{each.score:.2f}", " ".join(f"{v:.0f}" for v in about["box"])]
            for each, about in zip(found[:50], facts, strict=False)
        ]
        text = table(("class", "score", "x1 y1 x2 y2, pixels"), cells, caption=f"{len(found)} objects")
        empty = note("No object reaches this score; lower the threshold.")
        shown = shown_picture(pixels)
        annotations = show_objects(found, pixels.shape[0], pixels.shape[1], shown)
        more = note(f"The {MOST_SHOWN} first objects are drawn.") if len(found) > MOST_SHOWN else ""
        colours = [chosen.palette()[each.number] for each in found]
        drawing = _drawing(session, shown, annotations, colours, f"{Path(str(picture)).stem} {model} objects")
        return drawing, text + more if found else empty, facts

    inputs, outputs = [picture, model, runtime, score], [drawn, rows, plain]
    event = gr.on([go.click, score.release], run, inputs, outputs, api_name="detect", **MODEL_EVENT)
    clear_on_change(inputs, outputs, event)
    _video_part(session, "detector", model, runtime, score)


def segment_tab(session: Session, picture: gr.Image) -> None:
    """Builds the tab that shows the class of every pixel."""
    model, runtime, go = _pickers(session, "segmentor", "Segment")
    drawn = _annotated("Classes: point at a name to see where it is", "classes")
    plain = gr.JSON(visible=False, label="Class shares")

    def run(picture: str | None, model: str, runtime: str) -> tuple[Any, dict[str, float]]:
        """Returns the class of every pixel."""
        chosen, opened = _open(session, model, runtime, "segmentor")
        pixels = _pixels(session, chosen, picture)
        classes, names = segment(opened, pixels), chosen.class_names()
        shown, found = shown_picture(pixels), shares(classes, names)
        colours = [chosen.palette()[i] for i, _, _ in found]
        annotations = show_classes(classes, names, shown)
        drawing = _drawing(session, shown, annotations, colours, f"{Path(str(picture)).stem} {model} classes")
        return drawing, {name: round(share, 4) for _, name, share in found}

    inputs, outputs = [picture, model, runtime], [drawn, plain]
    event = go.click(run, inputs, outputs, api_name="segment", **MODEL_EVENT)
    clear_on_change(inputs, outputs, event)
    _video_part(session, "segmentor", model, runtime)


def _video_part(session: Session, form: GraphKind, *controls: gr.Dropdown | gr.Slider) -> None:
    """Builds the folded part that predicts on a video, with the model, runtime and threshold of its tab."""
    if not AVAILABLE:
        return
    verb = TITLES[form]
    with gr.Accordion("Video", open=False, elem_id=f"{form}-video"):
        video = CheckedVideo(
            label="Video", sources=["upload", "webcam"], include_audio=False, webcam_options=webcam.OPTIONS,
            height=280, elem_id=f"{form}-clip",
        )  # fmt: skip
        about = f"{FORMATS}; at most {MAX_BYTES >> 20} MB. "
        gr.HTML(note(f"{about}At most {MOST_FRAMES} frames of the first {VIDEO_SECONDS} seconds are used."))
        go = gr.Button(f"{verb} video", variant="primary", elem_id=f"{form}-video-go")
        shown = gr.Image(
            label="Video with predictions", format="webp", interactive=False, elem_id=f"{form}-frames",
            buttons=["fullscreen"], alt_text="The frames of the video with their predictions",
        )  # fmt: skip
        classes = gr.HTML(elem_id=f"{form}-video-classes", label="Classes in the video")
        plain = gr.JSON(visible=False, label="Predictions by frame")

    async def run(
        video: str | None, model: str, runtime: str, score: float = 0.0, progress: Any = PROGRESS
    ) -> tuple[str, str, dict[str, Any]]:
        """Predicts on the frames of a video."""
        until = time.monotonic() + FRAME_SECONDS
        progress(0, desc="decoding")
        clip = await read_clip(session.storage, video)
        chosen, opened = await asyncio.to_thread(_open, session, model, runtime, form)
        done: list[FramePrediction] = []
        began = now = time.monotonic()
        for frame in clip.frames:
            progress((len(done), len(clip.frames)), desc="predicting", unit="frames")
            before = now
            work = asyncio.to_thread(predict_frame, chosen, opened, form, frame, float(score), clip.scale)
            done.append(await work)
            now = time.monotonic()
            if now + (now - before) > until:  # the next one would not be done in time
                break
        progress(1, desc="writing")
        path = session.new_file(f"{slug(f'{Path(str(video)).stem} {model} {verb}')}.webp")
        played = clip.seconds * len(done) / len(clip.frames)
        await asyncio.to_thread(write_frames, path, [each.drawn for each in done], played)
        rows = count_classes(form, done)
        facts = {
            "frames": len(done), "frames_decoded": len(clip.frames), "frames_in_video": clip.total,
            "video_seconds": round(played, 2), "computing_seconds": round(now - began, 2),
            "classes": [{"class": name, "frames": count, AMOUNTS[form].replace(" ", "_"): round(amount, 4)}
                        for name, count, amount in rows],
            "predictions": [each.facts for each in done],
        }  # fmt: skip
        text = _describe_video(form, clip, len(done), played, now - began, rows)
        link = f"<p class='note'><a href='{address(str(path))}' download>Save the animation (WebP)</a></p>"
        return str(path), link + text, facts

    inputs, outputs = [video, *controls], [shown, classes, plain]
    event = go.click(run, inputs, outputs, api_name=f"{verb.lower()}_video", **MODEL_EVENT)
    clear_on_change(inputs, outputs, event)


def _describe_video(
    form: GraphKind, clip: Clip, done: int, played: float, seconds: float, rows: list[tuple[str, int, float]]
) -> str:
    """Returns a line on what was computed, and the table of classes, as HTML."""
    whole = clip.whole and done == len(clip.frames)
    text = f"{done} of {clip.total} frames, {'all' if whole else 'the first'} {played:.1f} s, "
    text += f"{seconds:.1f} s of computing."
    if done < len(clip.frames):
        text += f" The time ended before the other {len(clip.frames) - done}."
    cells = [
        [name, f"{count} of {done}", f"{amount:.0f}" if form == "detector" else f"{amount:.0%}"]
        for name, count, amount in rows
    ]
    if not rows:
        return note(text) + note("No object reaches this score; lower the threshold.")
    return note(text) + table(("class", "frames", AMOUNTS[form]), cells, caption="Classes in the video")


def _annotated(label: str, name: str) -> gr.AnnotatedImage:
    return gr.AnnotatedImage(label=label, format="png", elem_id=name, buttons=["fullscreen"])


def _drawing(
    session: Session,
    picture: np.ndarray,
    annotations: Sequence[Annotation],
    colours: Sequence[tuple[int, int, int]],
    name: str,
) -> Any:
    """Returns an annotated picture for the page, with a colour for each annotation."""
    labels = [label for _, label in annotations]
    codes = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours]
    value = (session.save(picture, name), list(annotations))
    return gr.update(value=value, color_map=dict(zip(labels, codes, strict=False)))


def _pickers(session: Session, form: GraphKind, verb: str) -> tuple[gr.Dropdown, gr.Dropdown, gr.Button]:
    """Returns the choice of model, the choice of runtime, and the start button."""
    models = session.models.having(form)
    with gr.Row(elem_classes="settings", equal_height=True):
        model = gr.Dropdown(
            [each.name for each in models], value=models[0].name, label="Model", visible=len(models) > 1,
            elem_id=f"{form}-model", filterable=False,
        )  # fmt: skip
        titles = _titles(models[0], form)
        runtime = gr.Dropdown(
            titles, value=titles[0], label="Runtime", elem_id=f"{form}-runtime", filterable=False
        )
        go = gr.Button(verb, variant="primary", elem_id=f"{form}-go")

    def changed(name: str) -> Any:
        there = _titles(session.models[name], form)
        return gr.update(choices=there, value=there[0])

    model.change(changed, model, runtime, api_visibility="private", show_progress="hidden")
    return model, runtime, go


def _titles(model: Model, form: GraphKind) -> list[str]:
    return [option.title for option in model.options(form) if not option.reason]


def _open(session: Session, model: str, runtime: str, form: GraphKind) -> tuple[Model, Any]:
    chosen = session.models[model]
    if form not in chosen.forms:
        raise BadInput(f"This model is not a {form}; choose one from the list.")
    return chosen, chosen.runtime(form, runtime or None)


def _pixels(session: Session, model: Model, picture: str | None) -> np.ndarray:
    return session.pixels(picture, len(model.description(model.kind).preprocessing.mean))  # pyright: ignore
