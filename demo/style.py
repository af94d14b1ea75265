"""Style sheet and theme of the page. It uses system fonts, so nothing is downloaded."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container { width: 100% !important; max-width: 1500px !important; margin: 0 auto !important; }
.gradio-container main { padding-top: 10px !important; gap: 8px; }
body:not(:has(#result)) :is(#guide, footer) { visibility: hidden; }
#header .prose { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 14px; }
#header h1 { font-size: 1.5rem; font-weight: 700; margin: 0; letter-spacing: -.01em; }
#header p { margin: 0; color: var(--body-text-color-subdued); }
#left { display: grid !important; grid-template-rows: 240px 100px auto auto; }
#picture { grid-row: 1; } #examples { grid-row: 2; } #about { grid-row: 3; } #rules { grid-row: 4; }
#controls { align-items: end; min-height: 92px; } #controls .form { flex: 1 1 0; }
#controls button { height: 46px; flex: 0 1 130px; }
.panels { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); position: relative; }
.panels > .block { aspect-ratio: 1; height: auto !important; min-width: 0 !important; }
.panels img { object-fit: contain; image-rendering: auto; }
#numbers { min-height: 114px; } #about { min-height: 90px; }
body[data-stale] :is(#result, #numbers, #views), body[data-stale-place] #explored > *,
  body[data-stale-features] #features > * { opacity: .45; transition: opacity .2s .15s; }
#explored, #features { position: relative; } #place img { cursor: crosshair; }
body[data-stale] #result::after, body[data-stale-place] #explored::after,
  body[data-stale-features] #features::after { content: "Updating\\2026";
  position: absolute; inset: 45% 0 auto; margin: auto;
  width: max-content; padding: 4px 12px; border-radius: 8px; background: #111827; color: #fff; z-index: 9; }
:is(#result, #explored, #features):has(.error)::after { content: "Not updated" !important; }
.compared { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 170px), 1fr)); gap: 12px; }
.compared figure { margin: 0; } .compared figure div { position: relative; aspect-ratio: 1; }
.compared img { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; object-fit: contain; }
.compared figcaption { font-size: .85rem; } .tabitem:has(#blink input:checked) .compared img + img {
  animation: blink 1.6s steps(1) infinite; }
@keyframes blink { 50% { opacity: 0; } }
.badge { margin: 4px 0; padding: 4px 8px; border-radius: 8px; background: #92400e; color: #fff;
  font-weight: 600; font-size: .85rem; }
#examples .grid-container { padding: 0 !important; }
#examples .caption-label { left: 0 !important; right: 0 !important; border-radius: 0; padding: 0 2px;
  text-align: center; max-width: none !important; letter-spacing: -.02em; }
#examples .thumbnail-lg { height: 84px; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
#examples .thumbnail-lg { width: 100% !important; }
.settings input[role=combobox] { text-overflow: ellipsis; padding-right: 24px !important; }
.settings button.lg { align-self: end; height: 46px; font-size: 1rem; }
.heading { font-weight: 600; margin: 2px 0; }
.cards { display: flex; flex-wrap: wrap; gap: 10px; margin: 4px 0; }
.cards .card { flex: 1 1 118px; padding: 8px 12px; border-radius: 10px;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.cards dt { font-size: .78rem; color: var(--body-text-color-subdued); white-space: nowrap; }
.cards dd { margin: 0; font-size: 1.25rem; font-weight: 650; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.note { font-size: .85rem; color: var(--body-text-color-subdued); margin: 4px 0; }
.leak { margin: 8px 0; padding: 8px 12px; border-radius: 8px; background: #b42318; color: #fff;
  font-weight: 600; }
ul.off { list-style: none; margin: 0; padding: 0; font-size: .85rem; color: var(--body-text-color-subdued); }
ul.off li { opacity: .75; } ul.off li::before { content: "\\2298\\a0"; } ul.off b { font-weight: 600; }
.scroll { overflow: auto; max-height: 460px; }
.scroll table { width: 100%; border-collapse: collapse; font-size: .92rem; }
.scroll caption { text-align: left; font-weight: 600; padding: 4px 0; }
.prose .scroll :is(table, tr) { border: 0 !important; }
.prose .scroll :is(th, td) { text-align: left; padding: 6px 10px; vertical-align: top; white-space: pre-wrap;
  border-width: 0 0 1px !important; border-color: var(--border-color-primary) !important;
  font-variant-numeric: tabular-nums; }
.scroll tr.off { opacity: .55; }
.legend .legend-item { padding: 4px 10px 4px 24px; min-height: 24px; color: var(--body-text-color);
  border: 1px solid var(--border-color-primary);
  background-image: linear-gradient(90deg, transparent 16px, var(--background-fill-primary) 16px); }
.pictures .caption-label { white-space: normal !important; font-size: .78rem !important;
  max-width: 94% !important; text-align: left; }
.pictures .grid-wrap, .pictures .fixed-height { min-height: 0 !important; max-height: none !important; }
.dark { --color-accent: #2dd4bf; }
.icon-button, a.download-link, .video-container .controls .icon { min-width: 24px; min-height: 24px;
  display: inline-flex !important; align-items: center; justify-content: center; }
.source-selection button { min-width: 24px; min-height: 24px; }
body[data-insecure] :is([aria-label="Capture from camera"], [aria-label="Paste from clipboard"]) {
  display: none !important; }
[title="grant webcam access"] .wrap { min-height: 0; }
[title="grant webcam access"], .upload-container:has(> .refused) { position: relative; }
.refused { position: absolute; inset: 28px 0 0; padding: 4px 12px; text-align: center; pointer-events: none;
  color: var(--body-text-color); background: var(--background-fill-primary); }
.volume-control-wrapper { display: none !important; }
.video-container > :first-child { flex: 1 1 0; min-height: 0; }
footer .divider { display: none !important; }
#right .block:has(.empty[aria-label]) { min-height: 64px; }
#right .empty[aria-label] { display: none; } #top5 { overflow: visible !important; }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 1px; }
@media (max-width: 700px) {
  #header h1 { font-size: 1.2rem; } #header p { display: none; }
  .gradio-container { padding: 8px !important; max-width: 100vw !important; overflow-x: clip; }
  #main { display: grid !important; grid-template-columns: minmax(0, 1fr);
    grid-template-rows: 150px 84px minmax(580px, auto) auto auto; gap: 8px; }
  #left, #right { width: 100%; min-width: 0 !important; contain: inline-size; overflow-x: clip; }
  #left { display: contents !important; }
  #right { grid-row: 3; } #about { grid-row: 4; } #rules { grid-row: 5; }
  #picture { height: 150px !important; } #examples .thumbnail-lg { height: 66px; }
  #examples { height: 84px !important; min-height: 0 !important; overflow: hidden; }
  #controls { min-height: 154px; align-content: start; } #controls .form { flex: 1 1 100%; }
  #controls .form > * { flex: 1 1 40%; } #controls button { flex: 1 1 100%; }
  .panels { grid-template-columns: repeat(2, minmax(0, 1fr)); } #seen { order: 3; }
  .settings:not(#controls) .form > *, .settings:not(#controls) > .block { flex: 1 1 100% !important; }
  .settings button.lg { font-size: .95rem; white-space: nowrap; }
  .cards .card { flex: 1 1 29%; padding: 6px 8px; } .cards dd { font-size: 1.02rem; }
  #right .pictures .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
}
"""


def theme() -> Any:
    """Returns the colours and fonts."""
    import gradio as gr
    from gradio.themes.utils.fonts import Font

    colours = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=[Font("system-ui"), Font("-apple-system"), Font("Segoe UI"), Font("sans-serif")],
        font_mono=[Font("ui-monospace"), Font("Menlo"), Font("Consolas"), Font("monospace")],
    )
    return colours.set(  # contrasts of at least 4.5
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )
