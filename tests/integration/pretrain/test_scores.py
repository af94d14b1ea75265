"""Scores of features: neighbours against a slow loop, shares, every protocol."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coma.errors import BadInput
from pretrain.evaluate import (
    Features,
    knn_votes,
    score,
)
from pretrain.evaluate.protocols import topk_accuracy


def blobs(n: int, c: int, classes: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian clouds: features `[n, c]` and labels `[n]`; `apart` is the distance scale of their centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = apart * torch.randn(classes, c, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centres[labels] + torch.randn(n, c, generator=generator), labels


# nearest neighbours ----------------------------------------------------------------------------


def slow_votes(train, labels, test, classes, k, temperature):
    """The formula of Wu et al. 2018, sec. 3.4, one image at a time, in double precision."""
    votes = np.zeros((len(test), classes))
    for row, query in enumerate(test):
        cosine = [float(query @ key) / float(np.linalg.norm(query) * np.linalg.norm(key)) for key in train]
        for i in sorted(range(len(train)), key=lambda i: -cosine[i])[:k]:
            votes[row, labels[i]] += math.exp(cosine[i] / temperature)
    return votes


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(2, 5),
    st.floats(0.05, 2),
    st.integers(0, 10**6),
    st.sampled_from([1, 300]),
)
def test_votes_equal_a_slow_loop(k, classes, temperature, seed, memory):
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randn(12, 6, generator=generator), torch.randn(7, 6, generator=generator)
    labels = torch.randint(classes, (12,), generator=generator)
    fast = knn_votes(train, labels, test, classes, k=k, temperature=temperature, memory=memory).numpy()
    slow = slow_votes(train.double().numpy(), labels.numpy(), test.double().numpy(), classes, k, temperature)
    shares = [votes / votes.sum(axis=1, keepdims=True) for votes in (fast, slow)]  # up to a factor per image
    np.testing.assert_allclose(*shares, atol=1e-4)


def test_votes_do_not_overflow_or_vanish_at_a_tiny_temperature():
    train, labels = blobs(20, 4, 2, apart=0.1)
    votes = knn_votes(train, labels, -train, 2, k=20, temperature=1e-4)
    assert votes.isfinite().all()
    assert (votes.max(dim=1).values >= 1).all()


def test_only_k_neighbours_vote():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 1.1], [0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    test = torch.tensor([[1.0, 0.05]])
    assert knn_votes(train, labels, test, 2, k=2)[0, 1] == 0
    assert knn_votes(train, labels, test, 2, k=5, temperature=100.0).argmax() == 1  # almost equal votes


@pytest.mark.parametrize(
    ("k", "temperature", "message"),
    [(0, 1.0, "k = 0"), (6, 1.0, "1 to 5"), (1, 0.0, "temperature 0 must")],
)
def test_impossible_neighbours_are_refused(k, temperature, message):
    features, labels = blobs(5, 3, 2, apart=1)
    with pytest.raises(BadInput, match=message):
        knn_votes(features, labels, features, 2, k=k, temperature=temperature)


# scores ----------------------------------------------------------------------------------------


def test_top_shares_are_counted():
    guess = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    labels = torch.tensor([0, 0, 4])
    assert topk_accuracy(guess, labels, 1) == pytest.approx(1 / 3)
    assert topk_accuracy(guess, labels, 5) == pytest.approx(2 / 3)


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_features_at_hand_are_scored(protocol):
    train, test = Features(*blobs(120, 8, 6, apart=5)), Features(*blobs(60, 8, 6, apart=5, seed=1))
    result = score(train, test, 6, protocol, name="clouds", k=5)
    assert (result.top1, result.top5, result.encoder, result.protocol) == (1.0, 1.0, "clouds", protocol)
    assert (result.train_images, result.test_images, result.classes) == (120, 60, 6)
    assert set(result.settings) == ({"k", "temperature"} if protocol == "knn" else {"penalty"})
    few = score(Features(*blobs(50, 8, 5, apart=5)), Features(*blobs(50, 8, 5, apart=5)), 5, protocol)
    assert few.top5 is None


def test_an_unknown_protocol_is_refused():
    with pytest.raises(BadInput, match="no protocol 'svm'; there are: knn, linear"):
        score(Features(*blobs(4, 2, 2, 1)), Features(*blobs(4, 2, 2, 1)), 2, "svm")  # type: ignore[arg-type]
