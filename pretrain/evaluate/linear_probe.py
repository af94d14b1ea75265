"""A linear classifier on frozen features, trained to the optimum: softmax regression with an L2 penalty.

This is a feature-level probe: features are computed once, from centre crops, and the convex problem is
solved in seconds, by L-BFGS along the principal axes of the features with every axis scaled by its
curvature. (Features are strongly correlated: with 5,000 images and a random DyViT, the weakest penalties
needed 25 times as long without that, and were still short of the optimum.) It is not MAE's linear probing
(He et al. 2021, app. A.2: LARS, a BatchNorm before the classifier, 90 epochs of augmented crops), and its
numbers cannot be compared with those.

Images with any number of classes get a logistic regression per class, in the same way.

The strength of the penalty is chosen on a fifth of every class's training images, by cross-entropy (which
is smoother than accuracy); then the classifier is fitted to all of them. Test images play no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coma.data import hold_out
from coma.errors import BadInput

PENALTIES = tuple(10.0**e for e in (1, 0, -1, -2, -3, -4, -5, -6, -7))
"""Penalties from strong to weak, tried until two in a row are worse than the best; each fit starts from the
last."""


@dataclass(frozen=True)
class LinearClassifier:
    """Linear classifier of standardised features: `(features - mean) / std @ weight + bias`.

    Attributes:
        mean: `[c]`.
        std: `[c]`.
        weight: `[c, classes]`.
        bias: `[classes]`.
        penalty: L2 penalty of the fit.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    def __call__(self, features: Tensor) -> Tensor:
        """Returns the logits `[n, classes]` of features `[n, c]`."""
        return torch.addmm(self.bias, (features - self.mean) / self.std, self.weight)


def fit_linear(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    iterations: int = 100,
    class_weights: Tensor | None = None,
    chosen_on: tuple[Tensor, Tensor] | None = None,
) -> LinearClassifier:
    """Minimises mean cross-entropy + penalty / 2 * |weight|^2 over standardised features.

    Args:
        features: `[n, c]`; the computation runs on their device and in their type.
        labels: int64 `[n]`, each in 0..classes-1; or float32 `[n, classes]` of 0 and 1, for any number of
            classes per image.
        classes: Number of classes.
        penalties: Candidates from strong to weak.
        seed: Seed of the held-out images.
        iterations: Largest number of L-BFGS steps per fit.
        class_weights: `[classes]`: weight of the images of each class in the loss.
        chosen_on: Features and labels that choose the penalty, in place of a fifth of the training images.

    Raises:
        BadInput: no class has two images, so none can be held out to choose among several penalties.
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, 1)  # a constant feature has no effect
    x = (features - mean) / std
    axes, variances = principal_axes(x)
    x = x @ axes  # a rotation, which does not change the penalty
    weight = x.new_zeros(x.shape[1] + 1, classes)  # its last row is the bias
    best, start = penalties[0], weight
    if len(penalties) > 1:
        if chosen_on is None:
            held_out = draw_validation(labels, seed)
            part, part_labels = x[~held_out], labels[~held_out]
            rest, rest_labels = x[held_out], labels[held_out]
        else:
            part, part_labels = x, labels
            rest, rest_labels = (chosen_on[0] - mean) / std @ axes, chosen_on[1]
        lowest, worse = float("inf"), 0
        for penalty in penalties:
            weight = minimise(part, part_labels, weight, penalty, variances, iterations, class_weights)
            loss = loss_and_gradient(rest, rest_labels, weight, 0, class_weights)[0].item()
            worse = 0 if loss < lowest else worse + 1
            if worse == 0:
                best, lowest, start = penalty, loss, weight
            if worse == 2:
                break
    weight = minimise(x, labels, start, best, variances, iterations, class_weights)
    return LinearClassifier(mean, std, axes @ weight[:-1], weight[-1], best)


def draw_validation(labels: Tensor, seed: int) -> Tensor:
    """Returns which images choose the penalty, a fifth of every class, bool `[n]`.

    Raises:
        BadInput: no class has two images.
    """
    chosen = hold_out(labels, 0.2, seed)
    if not chosen.any():
        raise BadInput("a linear probe needs a class with two training images or more; use knn")
    return chosen


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """Returns logits `[n, classes]` of `[n, c]` for weights `[c + 1, classes]`; the last row is the bias."""
    return torch.addmm(weight[-1], x, weight[:-1])


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns axes `[c, c]` (columns) along which features `[n, c]` are uncorrelated, and variances `[c]`."""
    covariance = (x.T @ x).double() / len(x)
    variances, axes = torch.linalg.eigh(covariance)
    return axes.to(x.dtype), variances.clamp(min=0).to(x.dtype)


def minimise(
    x: Tensor,
    labels: Tensor,
    start: Tensor,
    penalty: float,
    variances: Tensor,
    iterations: int,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Returns the weights `[c + 1, classes]` at the optimum of the penalised loss, searched from `start`.

    The search runs in weights divided by `scale`, in which the loss is about equally curved along all axes:
    the curvature of softmax regression at equal scores is variance / classes (Boehning 1992, eq. 3.1).
    """
    classes = start.shape[1]
    curvature = torch.cat([variances / classes + penalty, variances.new_tensor([1 / classes])])
    scale = curvature.rsqrt()[:, None]
    search = (start / scale).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [search],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, gradient = loss_and_gradient(x, labels, search.detach() * scale, penalty, class_weights)
        search.grad = gradient * scale
        return loss

    optimizer.step(closure)
    return search.detach() * scale


def loss_and_gradient(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    penalty: float,
    class_weights: Tensor | None = None,
    memory: int = 2**28,
) -> tuple[Tensor, Tensor]:
    """Returns value and gradient of the penalised loss, in slices of at most `memory` bytes of logits.

    The gradient of the cross-entropy by the scores is softmax - one-hot; written out, it needs no graph. With
    any number of classes per image, it is sigmoid - label for every class.

    Returns:
        A scalar in float64, and the gradient like `weight`.
    """
    rows = max(1, memory // (weight.shape[1] * weight.element_size()))
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    gradient = torch.zeros_like(weight)
    for part, target in zip(x.split(rows), labels.split(rows), strict=True):
        if target.ndim == 2:
            logits = scores(part, weight)
            losses = F.binary_cross_entropy_with_logits(
                logits, target, pos_weight=class_weights, reduction="none"
            )
            factors = 1 if class_weights is None else 1 + (class_weights - 1) * target
            loss += losses.sum(dtype=torch.float64)
            error = (logits.sigmoid() - target) * factors
        else:
            log_probability = F.log_softmax(scores(part, weight), dim=1)
            weighting = 1 if class_weights is None else class_weights[target][:, None]
            chosen = log_probability.gather(1, target[:, None]) * weighting
            loss -= chosen.sum(dtype=torch.float64)
            error = log_probability.exp_()
            error[torch.arange(len(target), device=x.device), target] -= 1
            error *= weighting
        gradient[:-1].addmm_(part.T, error)
        gradient[-1] += error.sum(dim=0)
    gradient /= len(x)
    gradient[:-1] += penalty * weight[:-1]
    return loss / len(x) + penalty / 2 * weight[:-1].double().square().sum(), gradient
