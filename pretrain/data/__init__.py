"""From files to batches: sources, the stream of training samples, statistics, and packing.

The stream is a pure function of (run seed, position), so batches do not depend on how many processes
read them, and a loader's whole state is the number of samples consumed.
"""

from pretrain.data.augment import labelled_batches
from pretrain.data.labelled import LabelledSplits, open_labelled, say_absent_classes
from pretrain.data.labels import labels_among, shared_labels, top_share
from pretrain.data.opening import open_source
from pretrain.data.pixel_values import check_some
from pretrain.data.samples import Batch, Slices, check_loader, evaluation_batches, training_batches
from pretrain.data.source import ArraySource, Source
from pretrain.data.statistics import measure
from pretrain.data.subset import Subset, balanced, hold_out
from pretrain.data.transforms import normalize

__all__ = [
    "ArraySource",
    "Batch",
    "LabelledSplits",
    "Slices",
    "Source",
    "Subset",
    "balanced",
    "check_loader",
    "check_some",
    "evaluation_batches",
    "hold_out",
    "labelled_batches",
    "labels_among",
    "measure",
    "normalize",
    "open_labelled",
    "open_source",
    "say_absent_classes",
    "shared_labels",
    "top_share",
    "training_batches",
]
