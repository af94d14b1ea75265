"""A page that is served to the tests of the demo, with very small models."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export_files import classifier, pretrained

from coma.config import MAEConfig
from coma.data.listing import write_listing
from demo.examples import PICTURES, path_of


@contextmanager
def served(folder: Path, *given: Path, search: Path | None = None) -> Iterator[Any]:
    """The page of these artifacts, running; its uploads lie in `folder`."""
    from demo.commands.demo import load_models, open_search, serve

    known = load_models(given, "cpu")
    page = serve(known, folder, search=open_search(search, known) if search else None)
    try:
        yield page
    finally:
        page.close(verbose=False)
        page.server.thread.join(60)  # gradio waits for five seconds, which a busy machine exceeds


def models(folder: Path) -> tuple[Path, ...]:
    """Weights that give answers worth looking at: of pre-training by CoMA and by MAE, and of a classifier.

    The first run lists an example picture among its training images.
    """
    small = pretrained(folder / "small" / "run" / "artifact")
    file = path_of(PICTURES["coins"])
    listing = {"names": ["money/coins.png"], "sizes": [file.stat().st_size], "labels": None}
    write_listing(small.parent, {"images": listing})
    other = pretrained(folder / "masked" / "artifact", method=MAEConfig())
    assert (small, classifier(folder / "pets" / "artifact"), other) == models_in(folder)
    return models_in(folder)


def exported_models(folder: Path) -> None:
    """Writes them, and the reconstructor of the first one as a file."""
    from export.commands import export

    settings = ("--graph", "reconstructor", "--benchmark-seconds", "0", "--verify-images", "2")
    export.run([str(models(folder)[0]), *settings])


def models_in(folder: Path) -> tuple[Path, ...]:
    """The artifacts that `models` wrote."""
    return folder / "small" / "run" / "artifact", folder / "pets" / "artifact", folder / "masked" / "artifact"


def collection(folder: Path, artifact: Path) -> Path:
    """A file of features of the example pictures, as that artifact sees them."""
    from downstream.commands.embed import embed

    (folder / "album").mkdir()
    for name, file in PICTURES.items():
        shutil.copyfile(path_of(file), folder / "album" / f"{name}{Path(file).suffix}")
    embed(artifact, folder / "album", folder / "features.npz", device="cpu", workers=0)
    return folder / "features.npz"
