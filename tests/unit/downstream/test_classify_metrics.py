"""Metrics of classifiers, by hand."""

import pytest
import torch

from downstream.classify.metrics import (
    average_precisions,
    calibration,
    multi_label_metrics,
    single_label_metrics,
)
from downstream.classify.plots import draw_confusion, draw_reliability
from downstream.classify.validation import score

NAMES = ("a", "b", "c")


def test_one_class_per_image():
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.3, 0.3, 0.4]])
    found = single_label_metrics(probabilities, torch.tensor([0, 1, 1, 1]), NAMES)
    assert found["top1"] == 0.5 and found["top5"] is None
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 3) / 2)  # of the two classes with images
    assert found["confusion"] == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    a, b, c = found["classes"]
    assert a == {"name": "a", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1}
    assert b == {"name": "b", "precision": 1.0, "recall": pytest.approx(1 / 3), "f1": 0.5, "support": 3}
    assert (c["precision"], c["recall"], c["support"]) == (0.0, None, 0)
    logs = torch.tensor([0.9, 0.4, 0.8, 0.3]).log()
    assert found["cross_entropy"] == pytest.approx(-logs.mean().item())
    six = torch.arange(6.0).softmax(dim=0).expand(2, 6)
    assert single_label_metrics(six, torch.tensor([0, 1]), tuple("abcdef"))["top5"] == 0.5


def test_calibration_by_hand():
    right = torch.tensor([True, False, True, False, True])
    found = calibration(torch.tensor([0.95, 0.99, 0.5, 0.5, 1.0]), right)
    in_last = abs((0.95 + 0.99 + 1.0) - 2) / 5  # three predictions of the last of 15 bins, two of them right
    assert found.error == pytest.approx(in_last)
    assert found.counts[14] == 3 and found.counts[7] == 2 and sum(found.counts) == 5
    assert found.accuracy[7] == 0.5 and found.confidence[0] is None


def test_any_number_of_classes():
    probabilities = torch.tensor([[0.9, 0.2, 0.1], [0.8, 0.6, 0.1], [0.3, 0.7, 0.2]])
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]])
    found = multi_label_metrics(probabilities, labels, NAMES)
    first = (1 + 2 / 3) / 2  # ranks 1 and 3 of three
    assert [row["ap"] for row in found["classes"]] == [pytest.approx(first), 1.0, None]
    assert found["mean_ap"] == pytest.approx((first + 1) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["macro_f1"] == pytest.approx((0.5 + 1) / 2)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert [row["support"] for row in found["classes"]] == [2, 2, 0]
    validated = score(probabilities.logit(), labels, step=3)
    assert validated.score == validated.mean_ap == pytest.approx(found["mean_ap"])
    assert str(validated) == "mAP 91.67%" and validated.top1 is None
    assert average_precisions(probabilities, labels * 0).tolist() != [0, 0, 0]  # undefined, not zero
    one = multi_label_metrics(probabilities[:, :1], labels[:, :1], NAMES[:1])
    assert [row["ap"] for row in one["classes"]] == [pytest.approx(first)] and one["micro_f1"] == 0.5
    assert score(probabilities.logit(), labels * 0, step=0).score == 0.0


def test_names_with_dollars_are_no_formulas(tmp_path):
    names = ("$5", r"$\frac$ of $^$")
    draw_confusion(tmp_path / "confusion.png", [[1, 0], [0, 2]], names, "1 image of $^$")
    calibration = {"counts": [0, 2], "accuracy": [None, 0.5], "confidence": [None, 0.75]}
    draw_reliability(tmp_path / "reliability.png", calibration, "1 image of $^$")
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "reliability.png"}
