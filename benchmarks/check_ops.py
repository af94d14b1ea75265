"""Our stand-ins for mmcv's compiled operators against a compiled mmcv: differences and speed, side by side.

    python benchmarks/check_ops.py --out benchmarks/results/check_ops_cpu.json

It runs where mmcv is compiled, which is another environment than the one with mmcv-lite: the two packages
share their name. To make one, with this repository installed:

    python -m venv compiled && . compiled/bin/activate
    pip install -e . torch==2.11.0 torchvision==0.26.0 mmengine==0.10.7
    pip install "setuptools<81" wheel ninja psutil packaging
    export MMCV_WITH_OPS=1 MAX_JOBS=4 CFLAGS="-O1 -g0 -w -DNDEBUG -fwrapv"
    pip install --no-build-isolation --no-cache-dir mmcv==2.1.0

The functions of `downstream.openmmlab.mmcv_ops` are called directly and take nothing's place. Boxes are
random and crowded, as before suppression; the comparison is repeated over draws, times are medians
of rounds in turn. mmcv has no focal losses for the CPU: there, only ours are timed (with CUDA, both are).

Equal scores are where the two differ: mmcv sorts without keeping the order of equals, and its softnms swaps
boxes as it goes, while ours take the first of equals. Two rows have scores of two decimals, to show what that
changes; elsewhere, lowered scores are equal by chance at most. By hand, on five draws: given mmcv's own order
of equals, ours decide the same.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import report, time_in_turn
from torch import Tensor

from downstream.openmmlab.mmcv_ops import OPERATORS

Operators = Mapping[str, Callable[..., Any]]
Answer = tuple[list[Any], Tensor]
"""Decisions, in order (which boxes stay), and numbers of one shape whatever the decisions."""

METHODS = ("naive", "linear", "gaussian")
IMAGE = (800, 1344)


def crowded(n: int, generator: torch.Generator) -> Tensor:
    """Corners `[n, 4]` of boxes in `IMAGE`, around ten times fewer objects."""
    objects = -(-n // 10)
    size = torch.tensor(IMAGE[::-1])
    centre = torch.rand(objects, 2, generator=generator) * size
    side = 2 ** (4 + 4 * torch.rand(objects, 2, generator=generator))  # 16 to 256 pixels
    which = torch.randint(objects, (n,), generator=generator)
    moved = centre[which] + 0.2 * side[which] * torch.randn(n, 2, generator=generator)
    half = side[which] * (0.2 * torch.randn(n, 2, generator=generator)).exp() / 2
    moved = torch.minimum(moved.clamp(min=1), size - 1)  # no box without area
    low, high = (torch.minimum(corner.clamp(min=0), size) for corner in (moved - half, moved + half))
    return torch.cat([low, high], dim=1)


def run_nms(operators: Operators, boxes: Tensor, scores: Tensor, threshold: float, offset: int) -> Answer:
    """Which boxes stay."""
    return operators["nms"](boxes, scores, iou_threshold=threshold, offset=offset).tolist(), torch.zeros(0)


def run_softnms(operators: Operators, boxes: Tensor, scores: Tensor, method: int, offset: int) -> Answer:
    """Which boxes are taken, and the lowered score of every box, 0 where it was dropped."""
    dets = boxes.new_empty(len(boxes), 5)
    options = {"iou_threshold": 0.5, "sigma": 0.5, "min_score": 0.05, "method": method, "offset": offset}
    inds = operators["softnms"](boxes, scores, dets, **options)
    lowered = torch.zeros(len(boxes))
    lowered[inds] = dets[: len(inds), 4]
    return inds.tolist(), lowered


def run_nms_match(operators: Operators, boxes: Tensor, scores: Tensor, threshold: float) -> Answer:
    """The groups."""
    dets = torch.cat([boxes, scores[:, None]], dim=1)
    return [tuple(g) for g in operators["nms_match"](dets, iou_threshold=threshold)], torch.zeros(0)


def run_roi_align(
    operators: Operators, x: Tensor, rois: Tensor, grad: Tensor, backward: bool, sampling: int, aligned: bool
) -> Answer:
    """Bins, or the gradient of the features."""
    out = torch.zeros_like(x if backward else grad)
    unused = x.new_zeros(0)
    operators["roi_align_backward" if backward else "roi_align_forward"](
        grad if backward else x,
        rois,
        *((unused, unused, out) if backward else (out, unused, unused)),
        aligned_height=grad.shape[2],
        aligned_width=grad.shape[3],
        spatial_scale=1 / 8,
        sampling_ratio=sampling,
        pool_mode=1,
        aligned=aligned,
    )
    return [], out


def run_focal(operators: Operators, kind: str, x: Tensor, target: Tensor, weight: Tensor) -> Answer:
    """Loss or derivative."""
    rows = kind == "softmax_focal_loss_forward"
    out = x.new_zeros(len(x)) if rows else torch.zeros_like(x)
    buff = (x.new_zeros(len(x)),) if kind == "softmax_focal_loss_backward" else ()
    operators[kind](x, target, weight, *buff, out, gamma=2.0, alpha=0.25)
    return [], out


def cases(n: int, seed: int, device: torch.device) -> dict[str, Callable[[Operators], Answer]]:
    """Every comparison on one draw: what it is called, and how it is run with some operators."""
    generator = torch.Generator().manual_seed(seed)
    boxes, scores = crowded(n, generator), (1 + torch.randperm(n, generator=generator)) / n  # no two equal
    tied = (scores * 100).round() / 100
    x = torch.randn(2, 64, IMAGE[0] // 8, IMAGE[1] // 8, generator=generator).to(device)
    image = torch.randint(2, (512, 1), generator=generator)
    rois = torch.cat([image, crowded(512, generator)], dim=1).to(device)
    grad = torch.randn(512, 64, 7, 7, generator=generator).to(device)
    logits = (4 * torch.randn(n, 80, generator=generator)).to(device)
    label = torch.randint(80, (n,), generator=generator)
    background = label.where(torch.rand(n, generator=generator) < 0.1, 80).to(device)
    label, weight = label.to(device), torch.rand(80, generator=generator).to(device)
    there = boxes.to(device)

    found: dict[str, Callable[[Operators], Answer]] = {}
    for offset in (0, 1):
        for threshold in (0.5, 0.7):
            name = f"nms over {threshold}, offset {offset}"
            found[name] = partial(
                run_nms, boxes=there, scores=scores.to(device), threshold=threshold, offset=offset
            )
        for method, name in enumerate(METHODS):
            found[f"softnms {name}, offset {offset}"] = partial(
                run_softnms, boxes=boxes, scores=scores, method=method, offset=offset
            )
    found["nms over 0.5, equal scores"] = partial(
        run_nms, boxes=there, scores=tied.to(device), threshold=0.5, offset=0
    )
    found["softnms linear, equal scores"] = partial(run_softnms, boxes=boxes, scores=tied, method=1, offset=0)
    found["nms_match from 0.5"] = partial(run_nms_match, boxes=boxes, scores=scores, threshold=0.5)
    for backward in (False, True):
        for aligned in (False, True):
            for sampling in (0, 2):
                way = "backward" if backward else "forward"
                name = f"roi_align {way}, {'' if aligned else 'not '}aligned, sampling {sampling}"
                found[name] = partial(
                    run_roi_align, x=x, rois=rois, grad=grad, backward=backward, sampling=sampling,
                    aligned=aligned,
                )  # fmt: skip
    none = logits.new_zeros(0)
    for way in ("forward", "backward"):
        for kind, values, target in (
            ("sigmoid", logits, background),
            ("softmax", logits.softmax(dim=1), label),
        ):
            name = f"{kind}_focal_loss_{way}"
            found[name] = partial(run_focal, kind=name, x=values, target=target, weight=none)
            found[f"{name}, weighted"] = partial(run_focal, kind=name, x=values, target=label, weight=weight)
    return found


def differing(ours: list[Any], theirs: list[Any]) -> tuple[int, int]:
    """How many decisions only one of them made; where there are none, how many are in another place."""
    if otherwise := len(set(ours) ^ set(theirs)):
        return otherwise, 0
    return 0, sum(a != b for a, b in zip(ours, theirs, strict=True))


def farthest(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference."""
    return (ours - theirs).abs().max().item() if ours.numel() else 0.0


def main() -> None:
    """Compare, time, print the table; `--out` keeps it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--boxes", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=10, help="random inputs to compare on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        extension = importlib.import_module("mmcv._ext")
    except ImportError as error:
        sys.exit(f"this environment has no compiled mmcv ({error}): --help says how to make one")
    compiled = vars(extension)

    rows = []
    draws = [cases(args.boxes, seed, args.device) for seed in range(args.draws)]
    for name in draws[0]:
        absent = "focal" in name and args.device.type == "cpu"
        otherwise, elsewhere, decided, distance, size = 0, 0, 0, 0.0, 0.0
        for draw in draws if not absent else ():
            (ours, our_numbers), (theirs, numbers) = draw[name](OPERATORS), draw[name](compiled)
            only_one, moved = differing(ours, theirs)
            otherwise, elsewhere, decided = otherwise + only_one, elsewhere + moved, decided + len(theirs)
            distance = max(distance, farthest(our_numbers, numbers))
            size = max(size, farthest(numbers, torch.zeros_like(numbers)))
        actions = {"ours": partial(draws[0][name], OPERATORS)}
        if not absent:
            actions["compiled"] = partial(draws[0][name], compiled)
        seconds = time_in_turn(actions, args.rounds, args.device, warm=1)
        rows.append(
            {
                "operator": name,
                "kept by one only": f"{otherwise} of {decided}" if decided else "-",
                "in another order": f"{elsewhere}" if decided else "-",
                "largest difference": f"{distance:.1e} (values to {size:.3g})" if size else "-",
                "compiled, ms": f"{1e3 * seconds['compiled']:.3g}" if not absent else "none",
                "ours, ms": f"{1e3 * seconds['ours']:.3g}",
            }
        )
    how = f"mmcv {version('mmcv')} compiled for {args.device.type}, torchvision {version('torchvision')}, "
    how += f"{args.boxes} boxes, {args.draws} draws, median of {args.rounds} rounds"
    report(how, rows, args.out)


if __name__ == "__main__":
    main()
