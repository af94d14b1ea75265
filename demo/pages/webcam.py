"""The webcam: the camera and the size that the page asks for, and what the page says when it gets none."""

from __future__ import annotations

import json

import gradio as gr

OPTIONS = gr.WebcamOptions(
    mirror=False,
    constraints={"video": {"facingMode": "environment", "width": {"ideal": 1280}, "height": {"ideal": 960}}},
)
"""The camera at a phone's back, where there are two. Not mirrored: gradio mirrors what it shows of a recording,
but not its file, which the model gets."""
REASONS = {
    "NotAllowedError": "The browser may not use the camera: allow it for this page, then click here again.",
    "NotFoundError": "No camera was found: connect one, then click here again.",
    "NotReadableError": "The camera does not answer; another program may be using it.",
}
"""What the page says, by the name of the browser's error. gradio says nothing."""

SCRIPT = f"""() => {{
    const reasons = {json.dumps(REASONS)}, place = '[title="grant webcam access"]';
    if (!navigator.mediaDevices) document.body.dataset.noCamera = '';
    addEventListener('unhandledrejection', event => {{
        const text = reasons[event.reason?.name];
        if (text) for (const each of document.querySelectorAll(place)) {{
            each.querySelector('[role=alert]')?.remove();
            const said = document.createElement('p');
            said.setAttribute('role', 'alert');
            said.textContent = text;
            each.append(said);
        }}
    }});
    document.addEventListener('loadedmetadata', ({{target}}) => {{
        if (target.srcObject || target.duration !== Infinity) return;
        target.addEventListener('durationchange', () => target.currentTime = 0, {{once: true}});
        target.currentTime = Number.MAX_SAFE_INTEGER;
    }}, true);
}}"""
"""Does what gradio leaves out: hides the webcam where browsers have none to give, which is on pages that come
neither by HTTPS nor from this machine, says why there is no picture, and finds out how long a recording is,
which its file does not say, by going to its end."""
