"""The webcam and the clipboard: what the page asks the browser for, and what it says when it gets nothing."""

from __future__ import annotations

import json

import gradio as gr

OPTIONS = gr.WebcamOptions(
    mirror=False,
    constraints={"video": {"facingMode": "environment", "width": {"ideal": 1280}, "height": {"ideal": 960}}},
)
"""The camera at a phone's back, where there are two. Not mirrored: gradio mirrors what it shows of a
recording, but not its file, which the model gets."""
REASONS = {
    "NotAllowedError": "The browser may not use the camera: allow it for this page, then click here again.",
    "NotFoundError": "No camera was found: connect one, then click here again.",
    "NotReadableError": "The camera does not answer; another program may be using it.",
    "Clipboard": "The browser may not read the clipboard: allow it for this page, then click here again.",
}
"""What the page says, by the name of the browser's error; gradio says nothing."""
SCRIPT = f"""() => {{
    if (!isSecureContext) document.body.dataset.insecure = '';
    const reasons = {json.dumps(REASONS)}, places = '[title="grant webcam access"], '
        + '.image-container:has([aria-label="Paste from clipboard"].selected) > .upload-container';
    const clear = () => document.querySelectorAll('.refused').forEach(each => each.remove());
    document.addEventListener('click', clear, true);
    addEventListener('unhandledrejection', ({{reason}}) => {{
        const text = reasons[reason?.message?.includes('Clipboard') ? 'Clipboard' : reason?.name];
        if (!text) return;
        clear();
        for (const each of document.querySelectorAll(places)) {{
            const said = document.createElement('p');
            Object.assign(said, {{className: 'refused', role: 'alert', textContent: text}});
            each.append(said);
        }}
    }});
    document.addEventListener('loadedmetadata', ({{target}}) => {{
        if (target.srcObject || target.duration !== Infinity) return;
        target.addEventListener('durationchange', () => target.currentTime = 0, {{once: true}});
        target.currentTime = Number.MAX_SAFE_INTEGER;
    }}, true);
}}"""
"""Does what gradio leaves out: it marks pages that get neither webcam nor clipboard, which are those that
come neither by HTTPS nor from this machine, says why there is no picture, and finds out how long a recording
is, which its file does not say, by going to its end."""
