"""Errors of detections and of region proposals, whose order and number depend on rounding.

Nearly equal scores make the order arbitrary, so detections are matched first; both ways, so that duplicates
and inventions count like missing detections.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from export.verify.errors import OutputErrors, Role

SURE = 0.3
"""Detections with at least this score are counted apart from the others."""
_SAME_PLACE = 0.9  # minimum intersection over union of a match
_SAME_CORNERS = 0.01  # or maximum distance of the corners in pixels, for boxes without area


def add_detections(
    errors: OutputErrors, wanted: dict[str, Tensor], found: dict[str, Tensor], role: Role, prefix: str = ""
) -> None:
    """Adds the detections of one image to the errors of the outputs `prefix` + name.

    Args:
        errors: Errors to add to.
        wanted: boxes `[n, 4]`, scores `[n]` in descending order, labels `[n]`, and perhaps masks
            `[n, h, w]`; empty slots have score 0.
        found: Detections in the same form.
        role: Role of the outputs.
        prefix: Start of the names.
    """
    for name in ("boxes", "scores"):
        if not found[name].isfinite().all() or not wanted[name].isfinite().all():
            errors.of(prefix + name, role).add(wanted[name], found[name])
            return
    partners = match(wanted, found)
    for own, matched in ((wanted, partners), (found, match(found, wanted))):
        sure, there = own["scores"] >= SURE, own["scores"] > 0
        for name, chosen in (("labels", sure), (f"labels below {SURE}", there & ~sure)):
            errors.of(prefix + name, role).count(int((matched[chosen] >= 0).sum()), int(chosen.sum()))
    ours = (partners >= 0).nonzero()[:, 0]
    for name in ("boxes", "scores", "masks"):
        if name in wanted and len(ours):
            errors.of(prefix + name, role).add(wanted[name][ours], found[name][partners[ours]])


def match(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> Tensor:
    """Returns the partner of every detection: same class, nearly the same box; the likeliest choose first.

    Args:
        wanted: boxes `[n, 4]`, scores `[n]` in descending order, and labels `[n]`; empty slots have score 0.
        found: Detections in the same form.

    Returns:
        Indices into `found`, int64 `[n]`; -1 for detections without a partner and for empty slots.
    """
    ours, theirs = wanted["boxes"].float(), found["boxes"].float()
    overlap = box_iou(ours, theirs).nan_to_num()
    overlap[torch.cdist(ours, theirs, p=torch.inf) < _SAME_CORNERS] = 1
    overlap[wanted["labels"][:, None] != found["labels"]] = 0
    overlap[:, found["scores"] <= 0] = 0
    partners = torch.full((len(ours),), -1)
    for number in range(int((wanted["scores"] > 0).sum())):
        best = int(overlap[number].argmax())
        if overlap[number, best] >= _SAME_PLACE:
            partners[number] = best
            overlap[:, best] = 0
    return partners
