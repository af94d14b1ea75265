"""Search in the features of images: nearest images, near-duplicates, outliers, and a map of the set.

FEATURES is a file that coma embed wrote. QUERY is an image file, or the path of an image in FEATURES. Without
a QUERY, ask with --duplicates, --outliers or --map; several questions are answered one after the other.

Examples:
  coma search features.parquet photo.jpg --out nearest
  coma search features.parquet --duplicates 0.98 --outliers --map --out overview
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from coma.arguments import parse_arguments
from coma.errors import BadInput, Interrupted
from coma.messages import counted, printable
from coma.preflight import check_regular_file, require_folder, require_packages
from coma.ranges import RARE, Range, Ranged

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from downstream.features.files import FeaturesFile
    from downstream.search.neighbours import Neighbours
    from downstream.search.pictures import Album
    from downstream.search.results import Result
    from downstream.search.vectors import Vectors

log = logging.getLogger(__name__)

_SIDE = 160
"""Longer side of a picture on a contact sheet in pixels."""
_GROUPS, _MEMBERS, _CELLS = 20, 12, 60
"""Groups, images of a group, and images altogether that a contact sheet shows at most; the files list all."""


@dataclass(frozen=True)
class SearchConfig(Ranged):
    """Search in the features of images."""

    features: Annotated[Path, tyro.conf.Positional]
    """File of features, .parquet or .npz."""
    query: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[QUERY]")] = None
    """An image file, or the path of an image as FEATURES lists it: its nearest images are searched for."""
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
    images: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH ...")] = ()
    """Where the images are now, one place for each file of features; default: where coma embed read them"""
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

    from downstream.search.vectors import open_files

    files = open_files([config.features, *config.also])
    try:
        _search(config, files)
    except KeyboardInterrupt:
        raise Interrupted("stopped; results that were written stay") from None


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


def _search(config: SearchConfig, files: list[FeaturesFile]) -> None:
    from downstream.search.pictures import warn_of_blanks
    from downstream.search.vectors import read_vectors

    albums = [
        _album(file, place) for file, place in zip(files, config.images or [None] * len(files), strict=True)
    ]
    title = f"{printable(str(config.features))}: {counted(sum(map(len, files)), 'image')}"
    if config.also:
        title = f"{counted(len(files), 'file')}: {counted(sum(map(len, files)), 'image')}"
    log.info("%s, features of %s", title, printable(files[0].info.spec.model))
    if config.query is not None:
        _nearest(config, files, albums)
    if config.duplicates is not None or config.outliers is not None or config.map:
        vectors = read_vectors(files)
        neighbours = _neighbours(config, vectors)
        if config.duplicates is not None:
            _duplicates(config, config.duplicates, vectors, neighbours, albums)
        if config.outliers is not None:
            _outliers(config, (*config.outliers, 10)[0], vectors, neighbours, albums)
        if config.map:
            _map(config, vectors, albums)
    warn_of_blanks(albums)


def _album(file: FeaturesFile, place: Path | None) -> Album:
    from downstream.search.pictures import Album

    images, location = Path(file.info.images), Path(file.info.location)
    if place is None:
        return Album(images, location, file.info.split)
    inside = os.path.relpath(location, images)
    return Album(place, place / inside if place.is_dir() else place, file.info.split)


def _finish(config: SearchConfig, result: Result, draw: Any) -> None:
    """Prints a result; with --out, also draws and writes it."""
    result.print_table()
    if config.out:
        picture: Image.Image | None = draw() if result.rows else None
        result.write(config.out, picture)
        written = [f"{result.name}.{kind}" for kind in ("csv", "json", *(["png"] if picture else []))]
        log.info("%s: %s", config.out, ", ".join(written))


def _nearest(config: SearchConfig, files: list[FeaturesFile], albums: list[Album]) -> None:
    from coma.contact_sheet import Cell, Section, draw_sections
    from downstream.search.neighbours import nearest
    from downstream.search.pictures import cells
    from downstream.search.results import Result
    from downstream.search.vectors import unit_parts

    assert config.query is not None
    query = _query(config, files, albums)
    hits = nearest(unit_parts(files), query.vector, config.top_k, query.row)
    shown = printable(config.query)
    result = Result(
        "nearest",
        f"nearest to {shown}, by cosine similarity",
        [
            {"rank": rank, "similarity": hit.similarity, "path": hit.path, **_file(config, hit.file)}
            for rank, hit in enumerate(hits, start=1)
        ],
    )

    def draw() -> Image.Image:
        found = [(hit.file, hit.path, f"{hit.similarity:.3f}\n{_name(hit.path)}") for hit in hits[:_CELLS]]
        own = Cell(query.picture(), f"query\n{_name(config.query or '')}")
        notes = f"Cosine similarity of features of {_name(files[0].info.spec.model)}."
        return draw_sections(
            [Section("", [own, *cells(albums, found, _SIDE)])], result.title, notes, side=_SIDE
        )

    _finish(config, result, draw)


@dataclass(frozen=True)
class _Query:
    """The feature of a query, its place if it is a row of a file, and its picture."""

    vector: np.ndarray
    row: tuple[int, str] | None
    picture: Any


def _query(config: SearchConfig, files: list[FeaturesFile], albums: list[Album]) -> _Query:
    """Returns the feature of the query: that of its row, or one that the model computes.

    Raises:
        BadInput: it is neither a row nor an image, or its model is another one.
    """
    from downstream.search.vectors import unit_parts

    assert config.query is not None
    text, path = config.query, Path(config.query)
    there = bool(text.strip()) and "\0" not in text and os.path.lexists(path)
    wanted = {
        (number, os.path.relpath(path.resolve(), album.location.resolve()) if there else text)
        for number, album in enumerate(albums)
    }
    for number, rows in unit_parts(files):
        for i, name in enumerate(rows.paths):
            if (number, name) in wanted:
                picture = partial(albums[number].thumbnail, name, _SIDE)
                return _Query(rows.values[i], (number, name), picture)
    if not there:
        raise BadInput(
            f"{printable(text)}: is neither an image file nor the path of an image in {config.features}"
        )
    return _embed_query(config, path, files[0])


def _embed_query(config: SearchConfig, path: Path, file: FeaturesFile) -> _Query:
    from coma.data.channels import convert_channels
    from coma.data.decode import decode
    from coma.data.pixel_values import check_pixels
    from downstream.features.models import FeatureRequest, open_feature_model
    from downstream.search.pictures import picture_of, read_image_file
    from downstream.search.vectors import unit

    check_regular_file(path, "give an image file")
    decoded = decode(read_image_file(path.parent, path.name), str(path))
    spec = file.info.spec
    height, width = spec.image_size
    name = config.model or spec.model
    request = FeatureRequest(
        name,
        spec.stage,
        "mean",
        height if height == width else None,
        device=config.device,
        download=config.download,
    )
    try:
        model = open_feature_model(request)
    except BadInput as error:
        hint = "" if config.model else "; --model names the model if it was moved"
        raise BadInput(f"the query needs the model of {file.path}: {error}{hint}") from None
    if reason := spec.difference(model.spec):
        flag = f"--model {name}" if config.model else name
        raise BadInput(f"{flag}: {file.path} holds features of {reason}; give the model that made them")
    pixels = convert_channels(decoded, model.channels, str(path))
    rule = model.preprocessing
    check_pixels(pixels, rule.mean, rule.std, lambda: str(path), fixed=True)
    vector = unit(model([model.resize(pixels)]), path)[0]
    return _Query(vector, None, lambda: picture_of(decoded.pixels, _SIDE))


def _neighbours(config: SearchConfig, vectors: Vectors) -> Neighbours | None:
    """Returns as many neighbours of every image as the questions need; None if none does."""
    from downstream.search import duplicates
    from downstream.search.neighbours import EXACT, neighbours_of_all

    count = 0 if config.duplicates is None else duplicates.NEIGHBOURS
    count = count if config.outliers is None else max(count, config.k)
    if not count:
        return None
    if len(vectors) < 2:
        raise BadInput(f"{config.features}: has one image; --duplicates and --outliers compare two or more")
    if len(vectors) > EXACT:
        log.info(
            "more than %d images: neighbours are searched with an HNSW graph, which may miss a few", EXACT
        )
    return neighbours_of_all(vectors.values, count)


def _duplicates(
    config: SearchConfig, least: float, vectors: Vectors, neighbours: Neighbours | None, albums: list[Album]
) -> None:
    from coma.contact_sheet import Section, draw_sections
    from downstream.search.duplicates import duplicate_groups
    from downstream.search.pictures import cells
    from downstream.search.results import Result

    assert neighbours is not None
    groups = duplicate_groups(neighbours, least)
    images = sum(len(group.members) for group in groups)
    title = (
        f"near-duplicates: {counted(images, 'image')} in {counted(len(groups), 'group')}, linked by cosine "
        f"similarities of at least {least:g}"
    )
    result = Result(
        "duplicates",
        title,
        [
            {"group": number, "similarity": similarity, **_row(config, vectors, i)}
            for number, group in enumerate(groups, start=1)
            for i, similarity in zip(group.members, group.similarities, strict=True)
        ],
    )

    def draw() -> Image.Image:
        sections = []
        for number, group in enumerate(groups[:_GROUPS], start=1):
            pairs = list(zip(group.members, group.similarities, strict=True))[:_MEMBERS]
            shown = [
                (int(vectors.files[i]), vectors.paths[i], f"{value:.3f}\n{_name(vectors.paths[i])}")
                for i, value in pairs
            ]
            sections.append(
                Section(
                    f"group {number}: {counted(len(group.members), 'image')}", cells(albums, shown, _SIDE)
                )
            )
        notes = "Under each image: similarity to the nearest image of its group."
        if len(groups) > _GROUPS or any(len(group.members) > _MEMBERS for group in groups[:_GROUPS]):
            notes += f" Shown are at most {_GROUPS} groups and {_MEMBERS} images of each."
        return draw_sections(sections, title, notes, side=_SIDE)

    _finish(config, result, draw)


def _outliers(
    config: SearchConfig, most: int, vectors: Vectors, neighbours: Neighbours | None, albums: list[Album]
) -> None:
    from coma.contact_sheet import Section, draw_sections
    from downstream.search.pictures import cells
    from downstream.search.results import Result

    assert neighbours is not None
    distances = 1 - neighbours.similarities[:, : config.k].mean(axis=1)
    order = (-distances).argsort(kind="stable")[:most].tolist()
    k = min(config.k, neighbours.similarities.shape[1])
    title = f"{len(order)} least typical of {counted(len(vectors), 'image')}"
    measure = f"mean cosine distance to the {counted(k, 'nearest image')}; median {_median(distances):.3f}"
    result = Result(
        "outliers",
        f"{title}, by {measure}",
        [
            {"rank": rank, "distance": float(distances[i]), **_row(config, vectors, i)}
            for rank, i in enumerate(order, start=1)
        ],
    )

    def draw() -> Image.Image:
        shown = [
            (int(vectors.files[i]), vectors.paths[i], f"{distances[i]:.3f}\n{_name(vectors.paths[i])}")
            for i in order[:_CELLS]
        ]
        return draw_sections([Section("", cells(albums, shown, _SIDE))], title, f"By {measure}.", side=_SIDE)

    _finish(config, result, draw)


def _median(values: np.ndarray) -> float:
    import numpy as np

    return float(np.median(values))


def _map(config: SearchConfig, vectors: Vectors, albums: list[Album]) -> None:
    import numpy as np

    from downstream.search.layout import map_positions
    from downstream.search.pictures import draw_map
    from downstream.search.results import Result

    n = len(vectors)
    if n > config.map_images:
        log.info(
            "the map shows %d of %d images, evenly spaced; --map-images sets how many", config.map_images, n
        )
    chosen = np.unique(np.linspace(0, n - 1, min(n, config.map_images)).round().astype(np.int64))
    positions = map_positions(vectors.values[chosen])
    result = Result(
        "map",
        f"map of {counted(len(chosen), 'image')} by t-SNE: similar images are near each other",
        [
            {**_row(config, vectors, int(i)), "x": float(x), "y": float(y)}
            for i, (x, y) in zip(chosen, positions, strict=True)
        ],
    )
    images = [(int(vectors.files[i]), vectors.paths[i]) for i in chosen]
    assert config.out is not None
    picture, without = draw_map(albums, images, positions, config.map_size)
    result.write(config.out, picture)
    crowded = f"; {without} found no place, a larger --map-size has more" if without else ""
    log.info("%s: map.csv, map.json, map.png (%s%s)", config.out, result.title, crowded)


def _row(config: SearchConfig, vectors: Vectors, i: int) -> dict[str, str]:
    return {"path": vectors.paths[i], **_file(config, int(vectors.files[i]))}


def _file(config: SearchConfig, number: int) -> dict[str, str]:
    """Returns the column that names the file of features, where there are several."""
    return {"features": str((config.features, *config.also)[number])} if config.also else {}


def _name(path: str) -> str:
    return printable(path.rpartition("/")[2] or path)
