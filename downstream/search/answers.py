"""The answers to the questions of `coma search`: rows, and how to draw them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from coma.contact_sheet import Cell, Section, draw_sections
from coma.messages import counted, printable
from downstream.search.collection import SIDE, Collection, short_name
from downstream.search.duplicates import duplicate_groups
from downstream.search.layout import map_positions
from downstream.search.neighbours import Neighbours, nearest
from downstream.search.pictures import draw_map
from downstream.search.query import Query
from downstream.search.results import Result
from downstream.search.vectors import Vectors, unit_parts

_GROUPS, _MEMBERS, _CELLS = 20, 12, 60
"""Groups, images of a group, and images altogether that a contact sheet shows at most; the files list all."""


def nearest_images(collection: Collection, query: Query, most: int) -> Result:
    """Returns the images that are most similar to a query."""
    hits = nearest(unit_parts(collection.files), query.vector, most, query.row)
    title = f"nearest to {printable(query.text)}, by cosine similarity"

    def draw() -> Image.Image:
        found = [collection.cell(hit.file, hit.path, hit.similarity) for hit in hits[:_CELLS]]
        own = Cell(query.picture(), f"query\n{short_name(query.text)}")
        notes = f"Cosine similarity of features of {collection.model}. Images: {collection.title}."
        return draw_sections([Section("", [own, *found])], title, notes, side=SIDE)

    rows = [
        {"rank": rank, "similarity": hit.similarity, **collection.row(hit.file, hit.path)}
        for rank, hit in enumerate(hits, start=1)
    ]
    return Result("nearest", title, rows, draw)


def near_duplicates(collection: Collection, vectors: Vectors, neighbours: Neighbours, least: float) -> Result:
    """Returns the groups of images that are linked by similarities of at least `least`."""
    groups = duplicate_groups(vectors.values, neighbours, least)
    images = counted(sum(len(group.members) for group in groups), "image")
    linked = f"linked by cosine similarities of at least {least:g}"
    title = f"near-duplicates: {images} in {counted(len(groups), 'group')}, {linked}"

    def draw() -> Image.Image:
        sections = [
            Section(
                f"group {number}: {counted(len(group.members), 'image')}",
                [
                    collection.cell(int(vectors.files[i]), vectors.paths[i], similarity)
                    for i, similarity in list(zip(group.members, group.similarities, strict=True))[:_MEMBERS]
                ],
            )
            for number, group in enumerate(groups[:_GROUPS], start=1)
        ]
        notes = "Under each image: similarity to the nearest image of its group."
        if len(groups) > _GROUPS or any(len(group.members) > _MEMBERS for group in groups[:_GROUPS]):
            notes += f" Shown are at most {_GROUPS} groups and {_MEMBERS} images of each."
        return draw_sections(sections, title, notes, side=SIDE)

    rows = [
        {"group": number, "similarity": similarity, **_row(collection, vectors, i)}
        for number, group in enumerate(groups, start=1)
        for i, similarity in zip(group.members, group.similarities, strict=True)
    ]
    return Result("duplicates", title, rows, draw)


def outliers(collection: Collection, vectors: Vectors, neighbours: Neighbours, most: int, k: int) -> Result:
    """Returns the images with the largest mean cosine distance to their `k` nearest neighbours."""
    k = min(k, neighbours.similarities.shape[1])
    distances = 1 - neighbours.similarities[:, :k].mean(axis=1)
    order = (-distances).argsort(kind="stable")[:most].tolist()
    title = f"{len(order)} least typical of {counted(len(vectors), 'image')}"
    median = float(np.median(distances))
    measure = f"mean cosine distance to the {counted(k, 'nearest image')}; median {median:.3f}"

    def draw() -> Image.Image:
        cells = [
            collection.cell(int(vectors.files[i]), vectors.paths[i], float(distances[i]))
            for i in order[:_CELLS]
        ]
        return draw_sections([Section("", cells)], title, f"By {measure}.", side=SIDE)

    rows = [
        {"rank": rank, "distance": float(distances[i]), **_row(collection, vectors, i)}
        for rank, i in enumerate(order, start=1)
    ]
    return Result("outliers", f"{title}, by {measure}", rows, draw)


def image_map(collection: Collection, vectors: Vectors, most: int, size: int) -> Result:
    """Returns places of up to `most` images on a map of about `size` pixels."""
    n = len(vectors)
    chosen = np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64)).tolist()
    positions = map_positions(vectors.values[chosen])
    share = "" if len(chosen) == n else f" of {n:,}"
    title = f"map of {len(chosen):,}{share} images by t-SNE: similar images are near each other"

    def draw() -> Image.Image:
        images = [(int(vectors.files[i]), vectors.paths[i]) for i in chosen]
        return draw_map(collection.albums, images, positions, size, title)

    rows = [
        {**_row(collection, vectors, i), "x": float(x), "y": float(y)}
        for i, (x, y) in zip(chosen, positions, strict=True)
    ]
    return Result("map", title, rows, draw)


def _row(collection: Collection, vectors: Vectors, i: int) -> dict[str, str]:
    return collection.row(int(vectors.files[i]), vectors.paths[i])
