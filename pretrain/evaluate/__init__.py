"""Evaluation of frozen features on labelled images: nearest neighbours, a linear classifier, collapse."""

from coma.data import align_labels
from pretrain.evaluate.collapse import GateStatistics, effective_rank, feature_spread, watched_gates
from pretrain.evaluate.features import Features, extract_features, random_encoder
from pretrain.evaluate.knn import knn_votes
from pretrain.evaluate.linear_probe import LinearClassifier, fit_linear
from pretrain.evaluate.online_probe import Probe, check_labelled, open_probe
from pretrain.evaluate.protocols import Protocol, Score, evaluate, labelled_features, score

__all__ = [
    "Features",
    "GateStatistics",
    "LinearClassifier",
    "Probe",
    "Protocol",
    "Score",
    "align_labels",
    "check_labelled",
    "effective_rank",
    "evaluate",
    "extract_features",
    "feature_spread",
    "fit_linear",
    "knn_votes",
    "labelled_features",
    "open_probe",
    "random_encoder",
    "score",
    "watched_gates",
]
