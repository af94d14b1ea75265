"""Weighted k-nearest neighbours on frozen features: nothing is trained, so nothing can be tuned.

The k most similar training images of a test image vote for their classes; neighbour i has the weight
exp(s_i / t), where s_i is the cosine similarity and t the temperature (Wu et al. 2018, arXiv 1805.01978, sec.
3.4). k = 20 and t = 0.07 are DINO's values (Caron et al. 2021, arXiv 2104.14294, app. F).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coma.errors import BadInput
from coma.ranges import Range

TEMPERATURE = Range(0, 1e3, above=True)


@torch.inference_mode()
def knn_votes(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    memory: int = 2**28,
) -> Tensor:
    """Returns the votes of the k nearest training images for each class.

    Args:
        train: Features `[n, c]`.
        labels: Classes of the training images, int64 `[n]`, each in 0..classes-1.
        test: Features `[m, c]`.
        classes: Number of classes.
        k: Number of neighbours that vote.
        temperature: Softmax temperature; lower values weight the nearest neighbours more.
        memory: Largest size in bytes of the similarities computed at once; changes no result.

    Returns:
        `[m, classes]`, float32; the nearest neighbour of each row has the weight 1.

    Raises:
        BadInput: k is not 1..n, or the temperature is not positive.
    """
    check_knn(k, temperature, len(train))
    keys = F.normalize(train.float(), dim=-1).T  # c n
    rows = max(1, memory // (4 * len(train)))
    votes = torch.empty(len(test), classes, device=test.device)
    for queries, out in zip(test.split(rows), votes.split(rows), strict=True):
        similarity, neighbour = (F.normalize(queries.float(), dim=-1) @ keys).topk(k)  # m k
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # a common factor, against overflow
        out.zero_().scatter_add_(1, labels[neighbour], weight)
    return votes


def check_knn(k: int, temperature: float, images: int) -> None:
    """Checks the settings of the vote against the number of training images.

    Raises:
        BadInput: naming the setting and its range.
    """
    if not 1 <= k <= images:
        raise BadInput(
            f"k = {k} neighbours must be 1 to {images}, the number of training images; leave knn out of "
            "the protocols, or give coma evaluate a smaller --k"
        )
    TEMPERATURE.check("--temperature", temperature)
