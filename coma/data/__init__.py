"""From files to batches: sources, the stream of training samples, statistics, and packing.

The stream is a pure function of (run seed, position), so batches do not depend on how many processes
read them, and a loader's whole state is the number of samples consumed.
"""

from coma.data.augment import labelled_batches
from coma.data.batches import Batch, BatchLayout
from coma.data.labelled_splits import (
    LabelledSplits,
    log_missing_classes,
    open_labelled,
    open_labelled_splits,
    unreadable_images,
)
from coma.data.labels import align_labels, align_single_labels, class_indices, topk_accuracy
from coma.data.loader import check_loader, evaluation_batches, normalized_batches, training_batches
from coma.data.pixel_values import check_sample
from coma.data.sources.base import ArraySource, Source
from coma.data.sources.open import open_source
from coma.data.sources.subset import Subset, balanced_subset, hold_out
from coma.data.statistics import compute_mean_std
from coma.data.transforms import normalize

__all__ = [
    "ArraySource",
    "Batch",
    "BatchLayout",
    "LabelledSplits",
    "Source",
    "Subset",
    "align_labels",
    "align_single_labels",
    "balanced_subset",
    "check_loader",
    "check_sample",
    "class_indices",
    "compute_mean_std",
    "evaluation_batches",
    "hold_out",
    "labelled_batches",
    "log_missing_classes",
    "normalize",
    "normalized_batches",
    "open_labelled",
    "open_labelled_splits",
    "open_source",
    "topk_accuracy",
    "training_batches",
    "unreadable_images",
]
