"""A web demo that reconstructs masked images.

`upload`, `videos`, `resize`, `masking`, `reconstruction`, `render`, `introspection`, `predict` and `models`
compute with arrays and do not know the page; `app` and `pages` build the page with gradio. Three modules
protect the server: `middleware` checks requests, `inputs` checks arguments of events, `storage` checks every
file.
"""
