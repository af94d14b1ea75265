"""The linear probe: its optimum against closed cases, its held-out share, what it must not depend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coma.errors import BadInput
from pretrain.evaluate import (
    fit_linear,
)
from pretrain.evaluate.linear_probe import draw_validation, loss_and_gradient, minimise, principal_axes


def blobs(n: int, c: int, classes: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian clouds: features `[n, c]` and labels `[n]`; `apart` is the distance scale of their centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = apart * torch.randn(classes, c, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centres[labels] + torch.randn(n, c, generator=generator), labels


def graph_loss(x, labels, weight, penalty):
    """The penalised loss, written with torch's own cross-entropy."""
    scores = x @ weight[:-1] + weight[-1]
    return torch.nn.functional.cross_entropy(scores, labels) + penalty / 2 * weight[:-1].square().sum()


@pytest.mark.parametrize("memory", [1, 200, 2**28])
def test_gradient_equals_autograd(memory):
    x, labels = blobs(23, 5, 3, apart=1)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    expected = graph_loss(x.double(), labels, weight, 0.3)
    expected.backward()
    loss, gradient = loss_and_gradient(x.double(), labels, weight.detach(), 0.3, memory=memory)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, weight.grad)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("any_number", [False, True])
def test_gradient_with_class_weights_and_any_number_of_classes(any_number, weighted):
    x, labels = blobs(23, 5, 3, apart=1)
    targets = (torch.rand(23, 3) < 0.4).double() if any_number else labels
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64) if weighted else None
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    logits = x.double() @ weight[:-1] + weight[-1]
    if any_number:
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction="none"
        )
        expected = losses.sum() / 23
    else:
        expected = torch.nn.functional.cross_entropy(logits, targets, weight=weights, reduction="sum") / 23
    expected = expected + 0.3 / 2 * weight[:-1].square().sum()
    expected.backward()
    loss, gradient = loss_and_gradient(x.double(), targets, weight.detach(), 0.3, weights, memory=200)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, weight.grad)


def test_a_penalty_is_chosen_on_given_images():
    x, labels = blobs(60, 5, 3, apart=1)
    noise = torch.randint(0, 3, (60,))
    assert fit_linear(x, labels, 3, chosen_on=(x, noise)).penalty > fit_linear(x, labels, 3).penalty
    targets = torch.nn.functional.one_hot(labels, 3).float()
    fitted = fit_linear(x, targets, 3, chosen_on=(x, targets))
    assert ((fitted(x) > 0) == (targets > 0)).float().mean() > 0.9


def test_optimum_equals_newtons():
    """Two classes, one feature, by Newton's method on the difference of the two score functions."""
    x = torch.tensor([-1.0, -0.5, 0.2, 0.3, 1.0, 2.0], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 0, 1, 1])
    penalty, slope, bias = 0.1, 0.0, 0.0
    design = torch.stack([x, torch.ones_like(x)], dim=1)
    for _ in range(30):  # both classes share a slope's penalty equally: penalty/2 * 2 * (slope/2)^2
        p = torch.sigmoid(slope * x + bias)
        gradient = design.T @ (p - labels) / 6 + torch.tensor([penalty * slope / 2, 0.0])
        hessian = (design * (p * (1 - p))[:, None]).T @ design / 6 + torch.diag(
            torch.tensor([penalty / 2, 0.0])
        )
        slope, bias = (torch.tensor([slope, bias]) - torch.linalg.solve(hessian, gradient)).tolist()
    weight = minimise(x[:, None], labels, torch.zeros(2, 2, dtype=torch.float64), penalty, torch.ones(1), 100)
    difference = weight[:, 1] - weight[:, 0]
    torch.testing.assert_close(
        difference, torch.tensor([slope, bias], dtype=torch.float64), atol=1e-3, rtol=0
    )


def test_the_optimum_is_reached_on_correlated_features():
    """For a loss that is penalty-strongly convex, |gradient|^2 / (2 penalty) bounds how far it is from it."""
    generator = torch.Generator().manual_seed(0)
    plain, labels = blobs(400, 30, 4, apart=0.5)
    mix, turn = (torch.randn(30, 30, generator=generator) for _ in range(2))
    x = plain @ mix * torch.logspace(0, -3, 30) @ turn
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    axes, variances = principal_axes(x)
    assert variances.min() < 1e-5 * variances.max()
    x, start, penalty = x @ axes, torch.zeros(31, 4), 1e-5

    def gap(curvature: torch.Tensor) -> float:
        weight = minimise(x, labels, start, penalty, curvature, 100)
        _, gradient = loss_and_gradient(x.double(), labels, weight.double(), penalty)
        return (gradient.square().sum() / (2 * penalty)).item()

    assert gap(variances) < 1e-2
    assert gap(torch.ones(30)) > 0.1  # what the scaling is for


def test_a_strong_penalty_leaves_the_class_frequencies():
    x, _ = blobs(300, 4, 2, apart=1)
    labels = (torch.arange(300) % 3 == 0).long()
    classifier = fit_linear(x, labels, 2, penalties=[1e6])
    torch.testing.assert_close(
        classifier(x).softmax(dim=1).mean(dim=0), torch.tensor([2 / 3, 1 / 3]), atol=1e-3, rtol=0
    )


def test_separable_classes_are_separated():
    train, labels = blobs(300, 8, 5, apart=5)
    test, asked = blobs(200, 8, 5, apart=5, seed=1)
    assert (fit_linear(train, labels, 5)(test).argmax(dim=1) == asked).all()


def test_random_labels_give_chance():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(800, 8, generator=generator), torch.randn(2000, 8, generator=generator)
    labels, asked = (torch.randint(4, (n,), generator=generator) for n in (800, 2000))
    right = (fit_linear(train, labels, 4)(test).argmax(dim=1) == asked).double().mean().item()
    assert abs(right - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)


def test_scale_and_offset_of_features_do_not_matter():
    x, labels = blobs(200, 6, 3, apart=1)
    scale, offset = (
        torch.logspace(-4, 4, 6, dtype=torch.float64),
        torch.linspace(-50, 50, 6, dtype=torch.float64),
    )
    plain = fit_linear(x.double(), labels, 3)
    moved = fit_linear(x.double() * scale + offset * scale, labels, 3)
    torch.testing.assert_close(
        moved(x.double() * scale + offset * scale), plain(x.double()), atol=1e-3, rtol=1e-3
    )
    assert plain.penalty == moved.penalty


def test_constant_features_stay_out():
    x, labels = blobs(100, 4, 2, apart=2)
    constant = torch.cat([x, torch.full((100, 2), 7.3), torch.zeros(100, 1)], dim=1)
    classifier = fit_linear(constant, labels, 2)
    assert classifier.weight.isfinite().all()
    moved = constant.clone()
    moved[:, 4:] += 1e-4  # what rounding does to a constant must not be blown up
    torch.testing.assert_close(classifier(moved), classifier(constant), atol=1e-2, rtol=0)


def test_noise_asks_for_a_stronger_penalty_than_signal():
    few, labels = blobs(60, 100, 2, apart=0.15)
    many, more = blobs(4000, 10, 2, apart=2.0)
    assert fit_linear(few, labels, 2).penalty > fit_linear(many[:, :2], more, 2).penalty


def test_features_of_inference_mode_can_be_fitted():
    with torch.inference_mode():
        x, labels = blobs(60, 4, 3, apart=20)
    assert (fit_linear(x, labels, 3)(x).argmax(dim=1) == labels).all()


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_fifth_of_every_class_is_held_out(counts, seed):
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    if max(counts) == 1:
        with pytest.raises(BadInput, match="two training images"):
            draw_validation(labels, seed)
        return
    held = draw_validation(labels, seed)
    for label, n in enumerate(counts):
        assert held[labels == label].sum() == (0 if n == 1 else max(1, n // 5))
    assert torch.equal(held, draw_validation(labels, seed))


def test_another_seed_holds_out_others():
    labels = torch.arange(100) % 4
    assert not torch.equal(draw_validation(labels, 0), draw_validation(labels, 1))
