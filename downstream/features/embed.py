"""`embed` computes features of all images of a source and writes them to a file.

The work is done in parts (see `parts`): by this process, by all processes that torchrun started, or by tasks
of a Ray cluster (see `cluster`). Whoever computes a part, its content and the order of the file are the same.
"""

from __future__ import annotations

import logging
import math
from contextlib import closing
from pathlib import Path

import torch

from coma.artifact import library_versions
from coma.data import Source, open_source
from coma.errors import BadInput
from coma.messages import abridged, counted
from coma.progress import Bar, Progress
from downstream.features.files import SUFFIXES, FeaturesFile, FeaturesInfo
from downstream.features.models import FeatureModel, FeatureRequest, open_feature_model
from downstream.features.parts import FeatureParts
from downstream.features.reading import Reading, compute_parts
from downstream.parts import listing_hash
from pretrain.training.distributed import Processes

log = logging.getLogger(__name__)

_NAMED = 3
"""Number of unreadable images that a message names; the file lists all."""
_PART_BYTES = 1 << 26
"""Most bytes of features in a part: what a process holds before it writes."""


def embed(
    request: FeatureRequest,
    reading: Reading,
    out: Path,
    *,
    part_images: int = 512,
    group: Processes | None = None,
    ray: str | None = None,
    progress: Progress | None = None,
) -> FeaturesInfo:
    """Computes features of all images and writes them to `out`, in the order of the images.

    A call that was stopped at any moment continues when it is made again.

    Args:
        request: The model, and which of its features.
        reading: The images.
        out: File to write, `.parquet` or `.npz`.
        part_images: Largest number of images that are computed again after a stop.
        group: This process among those of torchrun; every one of them has to call this function.
        ray: Address of a Ray cluster that computes the features.
        progress: Shows a bar with the time left.

    Returns:
        The description of the file, with the images that were skipped.

    Raises:
        BadInput: a model, images or a file that cannot be used.
        CheckFailed: features are not finite.
        ComaError: the disk is full; finished parts are kept.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise BadInput(f"--out {out}: give a name that ends in {' or '.join(SUFFIXES)}")
    group = group or Processes(torch.device("cpu"))
    with group.raise_on_all_ranks():
        source = open_source(reading.images, reading.split, tiles=reading.tiles)
        model = open_feature_model(request)
        names, listing = listing_hash(source)
        if group.main:
            shape = " x ".join(map(str, model.spec.shape))
            log.info("features: %s values per image, by %s", shape, model.title)
    if group.share(listing) != listing:
        raise BadInput(f"{reading.images}: the processes see different images; give a folder that all share")
    info = FeaturesInfo(
        spec=model.spec,
        images=str(reading.images.absolute()),
        location=str(source.location.absolute()),
        split=reading.split,
        listing=listing,
        count=len(source),
        runtime=model.title,
        versions=library_versions(),
    )
    size = min(part_images, max(_PART_BYTES // (4 * math.prod(model.spec.shape)), 1))
    parts = FeatureParts(out, info, size)
    with group.raise_on_all_ranks():
        complete = group.main and parts.prepare()
    if group.share(complete):
        log.info("%s: is complete already", out)
        return FeaturesFile(out).info
    bar = progress.bar("images", len(source), parts.done(), lines=20) if progress else None
    todo = group.share(parts.missing())
    if parts.done() and group.main:
        log.info("%s: %s of %d are done already", out, counted(parts.done(), "image"), len(source))
    if ray is not None:
        from downstream.features.cluster import compute_on_cluster

        compute_on_cluster(ray, request, reading, parts, todo, bar)
    else:
        _compute(model, source, names, reading, parts, todo, group, bar)
    with group.raise_on_all_ranks():
        info = parts.merge() if group.main else info
    info = group.share(info)
    if info.skipped and group.main:
        log.warning(
            "skipped %s: %s",
            counted(len(info.skipped), "image that cannot be read", "images that cannot be read"),
            abridged(info.skipped, _NAMED, "; "),
        )
    return info


def _compute(
    model: FeatureModel,
    source: Source,
    names: list[str],
    reading: Reading,
    parts: FeatureParts,
    todo: list[int],
    group: Processes,
    bar: Bar | None,
) -> None:
    """Computes this process's share of the parts; all processes finish a part before they begin the next."""
    own = todo[group.rank :: group.world]
    turns = -(-len(todo) // group.world)

    def advance(count: int) -> None:
        if bar is not None:
            bar.advance(count * group.world)  # the others are about as far

    ranges = [parts.images(number) for number in own]
    computed = compute_parts(model, source, names, reading, ranges, advance)
    with closing(computed):
        for turn in range(turns):
            with group.raise_on_all_ranks():
                if turn < len(own):
                    rows, failures = next(computed)
                    parts.write(own[turn], parts.encode(rows, failures))
            if bar is not None and group.world > 1:
                bar.update(parts.done())
