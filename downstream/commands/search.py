"""Search in the features of images: nearest images, near-duplicates, outliers, and a map of the set.

FEATURES is a file that coma embed wrote. QUERY is an image file, or the path of an image in FEATURES. Without
a QUERY, ask with --duplicates, --outliers or --map; several questions are answered one after the other.

Examples:
  coma search features.parquet photo.jpg --out nearest
  coma search features.parquet --duplicates 0.98 --outliers --map --out overview
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from coma.arguments import parse_arguments
from coma.errors import BadInput, Interrupted
from coma.messages import counted, printable
from coma.paths import Location
from coma.preflight import require_folder, require_packages
from coma.ranges import RARE, Range, Ranged

if TYPE_CHECKING:
    from downstream.search.collection import Collection
    from downstream.search.results import Result

log = logging.getLogger(__name__)

_OUTLIERS = 10
"""Images that --outliers lists if it is given no number."""


@dataclass(frozen=True)
class SearchConfig(Ranged):
    """Search in the features of images."""

    features: Annotated[Path, tyro.conf.Positional]
    """File of features, .parquet or .npz."""
    query: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[QUERY]")] = None
    """An image file or its address, or the path of an image as FEATURES lists it: its nearest images are
    searched for."""
    duplicates: Annotated[float | None, Range(0, 1, above=True)] = None
    """List groups of near-duplicates: images that are linked by pairs of at least this cosine similarity."""
    outliers: Annotated[tuple[int, ...] | None, Range(1, 10**6), tyro.conf.arg(metavar="[N]")] = None
    """List the N least typical images (10 if no number is given): those with the largest mean cosine distance
    to their nearest neighbours."""
    map: bool = False
    """Draw a map of the set, with similar images near each other; --out is needed."""
    top_k: Annotated[int, Range(1, 10_000)] = 12
    """Number of nearest images of a QUERY."""
    k: Annotated[int, Range(1, 1000)] = 10
    """Neighbours whose mean distance is the measure of --outliers."""
    also: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FEATURES ...")] = ()
    """More files of features of the same model, which are searched together."""
    out: Path | None = None
    """Folder for the results as CSV, JSON and contact sheets."""
    images: Annotated[tuple[Location, ...], tyro.conf.arg(metavar="PATH ...")] = ()
    """Where the images are now, one place for each file of features; default: where coma embed read them,
    unless that is an address"""
    model: str | None = None
    """Model for a QUERY that is not in FEATURES; default: the one that FEATURES names"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of that model; auto is the GPU where there is one."""
    download: bool = False
    """Download the weights of timm:NAME if they are not in the local cache."""
    map_images: Annotated[int, Range(2, 20_000), RARE] = 2000
    """Most images that the map is computed of, evenly spaced over the set."""
    map_size: Annotated[int, Range(200, 8000), RARE] = 1600
    """Side of the map in pixels."""


def run(argv: list[str]) -> None:
    """Parses the arguments, answers every question, and prints and writes the results.

    Raises:
        BadInput: features, a query or a folder that cannot be used.
        Interrupted: Ctrl-C; results that were written stay.
    """
    config = parse_arguments(SearchConfig, argv, prog="coma search", description=__doc__)
    _check(config)

    from downstream.search.collection import open_collection
    from downstream.search.pictures import warn_of_blanks

    collection = open_collection([config.features, *config.also], config.images)
    log.info("%s, features of %s", collection.title, printable(collection.files[0].info.spec.model))
    try:
        for result in _results(config, collection):
            result.print_table()
            if config.out:
                log.info("%s: %s", config.out, ", ".join(result.write(config.out)))
    except KeyboardInterrupt:
        raise Interrupted("stopped; results that were written stay") from None
    warn_of_blanks(collection.albums)


def _check(config: SearchConfig) -> None:
    if config.query is None and config.duplicates is None and config.outliers is None and not config.map:
        raise BadInput("give a QUERY, --duplicates 0.98, --outliers or --map")
    if config.outliers is not None and len(config.outliers) > 1:
        raise BadInput(f"--outliers: give one number, not {len(config.outliers)}")
    if config.map and config.out is None:
        raise BadInput("--map: draws a picture; give a folder for it with --out FOLDER")
    if config.images and len(config.images) != 1 + len(config.also):
        raise BadInput(f"--images: give one place for each of {counted(1 + len(config.also), 'file')}")
    resolved = [path.resolve() for path in (config.features, *config.also)]
    for path, real in zip((config.features, *config.also), resolved, strict=True):
        if resolved.count(real) > 1:
            raise BadInput(f"{path}: was given twice; leave one out")
    if config.out:
        require_folder(config.out)
    if config.duplicates is not None or config.outliers is not None:
        require_packages("faiss")
    if config.duplicates is not None or config.map:
        require_packages("sklearn")


def _results(config: SearchConfig, collection: Collection) -> Iterator[Result]:
    from downstream.features.models import FeatureRequest
    from downstream.search import answers, duplicates
    from downstream.search.neighbours import EXACT, neighbours_of_all
    from downstream.search.query import find_query
    from downstream.search.vectors import read_vectors

    if config.query is not None:
        request = FeatureRequest(config.model or "", device=config.device, download=config.download)
        query = find_query(config.query, collection, request)
        yield answers.nearest_images(collection, query, config.top_k)
    counts = {
        duplicates.NEIGHBOURS if config.duplicates is not None else 0,
        config.k if config.outliers is not None else 0,
    }
    if max(counts) and len(collection) < 2:
        raise BadInput(f"{config.features}: has one image; --duplicates and --outliers compare two or more")
    if not (max(counts) or config.map):
        return
    vectors = read_vectors(collection.files)
    if max(counts):
        if len(vectors) > EXACT:
            log.info("over %d images: an HNSW graph finds the neighbours, and may miss a few", EXACT)
        neighbours = neighbours_of_all(vectors.values, max(counts))
        if config.duplicates is not None:
            yield answers.near_duplicates(collection, vectors, neighbours, config.duplicates)
        if config.outliers is not None:
            most = (*config.outliers, _OUTLIERS)[0]
            yield answers.outliers(collection, vectors, neighbours, most, config.k)
    if config.map:
        yield answers.image_map(collection, vectors, config.map_images, config.map_size)
