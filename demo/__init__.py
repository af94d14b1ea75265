"""A page in the browser that shows what a model makes of hidden parts of a picture.

`upload`, `fit`, `masks`, `reconstruct`, `paint`, `inside`, `finetuned` and `models` take arrays and give
arrays and know nothing of the page; `app` and `pages` build it with gradio. Three modules stand between it
and strangers: `middleware` checks requests, `inputs` the arguments of events, `storage` every file.
"""
