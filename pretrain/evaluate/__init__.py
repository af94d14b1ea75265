"""How good are frozen features? Accuracy of neighbours and of a linear classifier on labelled images."""

from pretrain.data import shared_labels
from pretrain.evaluate.features import Features, extract_features, random_encoder
from pretrain.evaluate.knn import knn_votes
from pretrain.evaluate.linear import LinearClassifier, fit_linear
from pretrain.evaluate.scoring import Protocol, Score, evaluate, score

__all__ = [
    "Features",
    "LinearClassifier",
    "Protocol",
    "Score",
    "evaluate",
    "extract_features",
    "fit_linear",
    "knn_votes",
    "random_encoder",
    "score",
    "shared_labels",
]
