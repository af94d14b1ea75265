"""Checks the `segmentation` of one object: polygons, or run lengths as numbers or text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


def mask_error(segmentation: Any, width: int, height: int) -> str:
    """Returns a short description of the error; empty if there is none."""
    if isinstance(segmentation, list):
        return _polygons_fault(segmentation)
    if isinstance(segmentation, dict):
        return _runs_fault(segmentation, width, height)
    return f"is a {type(segmentation).__name__}, not polygons or run lengths"


def decode_run_lengths(text: str) -> list[int]:
    """Decodes COCO's compressed run lengths: 5 bits per character, differences to the second last run.

    The format is that of `rleToString` in pycocotools, `common/maskApi.c`.

    Raises:
        ValueError: a text that ends inside a number, or an invalid character.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"the character {character!r} does not occur in run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the run lengths end inside a number")
    return runs


def _polygons_fault(polygons: list[Any]) -> str:
    if not isinstance(polygons[0], list):
        return "is one list of numbers; it must be a list of polygons, each a list"
    for polygon in polygons:
        if not isinstance(polygon, list):
            return "mixes polygons with something else"
        if len(polygon) % 2:
            return f"a polygon has {len(polygon)} numbers, which are no pairs"
        if len(polygon) < 6:
            return f"a polygon has {len(polygon) // 2} points; it needs 3"
        try:
            finite = math.isfinite(sum(polygon))
        except TypeError:
            return "a polygon holds something that is no number"
        if not finite:
            return "a polygon holds NaN or infinite values"
    return ""


def _runs_fault(runs: dict[str, Any], width: int, height: int) -> str:
    size, counts = runs.get("size"), runs.get("counts")
    if size != [height, width]:
        return f"its run lengths are for size {size}, the image has [{height}, {width}]"
    if isinstance(counts, str):
        try:
            counts = decode_run_lengths(counts)
        except ValueError as error:
            return str(error)
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        return "its counts are neither whole numbers nor text"
    if min(counts, default=0) < 0 or sum(counts) != width * height:
        return f"its run lengths cover {sum(counts)} pixels, the image has {width * height}"
    return ""


def encode_runs(mask: np.ndarray) -> dict[str, Any]:
    """Returns COCO's uncompressed run lengths of a mask, bool `[h, w]`: columns from the left, 0 first."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    if counts[-1] == 0 and len(counts) > 1:
        counts.pop()
    return {"size": list(mask.shape), "counts": counts}


def decode_runs(runs: dict[str, Any]) -> np.ndarray:
    """Returns the mask, bool `[h, w]`, of run lengths without faults, as numbers or text."""
    counts = runs["counts"]
    counts = decode_run_lengths(counts) if isinstance(counts, str) else counts
    height, width = runs["size"]
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def mask_area(runs: dict[str, Any]) -> int:
    """Returns the number of pixels of a mask in run lengths, numbers or text, without decoding the mask."""
    counts = runs["counts"]
    return sum((decode_run_lengths(counts) if isinstance(counts, str) else counts)[1::2])


def filled(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Returns the mask, bool `[height, width]`, of polygons or run lengths of an object."""
    if isinstance(segmentation, dict):
        return decode_runs(segmentation)
    picture = Image.new("1", (width, height))
    for polygon in segmentation:
        ImageDraw.Draw(picture).polygon(polygon, fill=1, outline=1)
    return np.asarray(picture)
