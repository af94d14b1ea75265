"""Lists of class names that lie beside labels: classes.txt, labels.txt, CVAT's labelmap.txt, classes.json."""

from __future__ import annotations

import json
from collections import Counter

from coma.errors import BadInput
from downstream.datasets.files import DatasetFiles

NO_CLASS = ("__ignore__", "_background_", "__background__", "background")
"""Names in such lists that are no class of objects."""


def class_list(files: DatasetFiles, *names: str) -> tuple[str, ...] | None:
    """Returns the class names of the first of these files in the dataset's folder; None: there is none.

    Raises:
        BadInput: a list without names, or with a name twice.
    """
    for name in files.in_root(*names):
        text, path = files.text(name), files.root / name
        if name.endswith(".json"):
            try:
                content = json.loads(text)
                found = content["classes"] if isinstance(content, dict) else content
                found = [str(each) for each in found]
            except (ValueError, RecursionError, KeyError, TypeError):
                raise BadInput(f'{path}: must hold {{"classes": ["cat", "dog"]}}') from None
        elif name == "labelmap.txt":  # CVAT: name:red,green,blue:parts:actions
            lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
            found = [line.partition(":")[0].strip() for line in lines]
        else:
            found = [line.strip() for line in text.splitlines() if line.strip()]
        if name not in ("obj.names", "_darknet.labels", "classes.txt"):  # there, numbers count every line
            found = [each for each in found if each not in NO_CLASS]
        twice = [each for each, n in Counter(found).items() if n > 1]
        if not found or twice:
            what = f"lists {twice[0]!r} twice" if twice else "lists no class"
            raise BadInput(f"{path}: {what}; write one name a line")
        return tuple(found)
    return None
