"""A page that is served to the tests of the demo, with very small models."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export_files import classifier, pretrained


@contextmanager
def served(folder: Path, *given: Path) -> Iterator[Any]:
    """The page of these artifacts, running; its uploads lie in `folder`."""
    from demo.commands.demo import load_models, serve

    page = serve(load_models(given, "cpu"), folder)
    try:
        yield page
    finally:
        page.close(verbose=False)
        page.server.thread.join(60)  # gradio waits for five seconds, which a busy machine exceeds


def models(folder: Path) -> tuple[Path, Path]:
    """Weights that give answers worth looking at: of pre-training, and of a classifier."""
    return pretrained(folder / "small" / "run" / "artifact"), classifier(folder / "pets" / "artifact")
