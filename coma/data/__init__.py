"""From files to batches: sources, the stream of training samples, statistics, and packing.

The stream is a pure function of (run seed, position), so batches do not depend on how many processes
read them, and a loader's whole state is the number of samples consumed.
"""

from coma.data.augment import labelled_batches
from coma.data.batches import Batch, Slices
from coma.data.labelled import LabelledSplits, open_labelled, say_absent_classes
from coma.data.labels import labels_among, shared_labels, top_share
from coma.data.loader import check_loader, evaluation_batches, training_batches
from coma.data.pixel_values import check_some
from coma.data.sources.base import ArraySource, Source
from coma.data.sources.open import open_source
from coma.data.sources.subset import Subset, balanced, hold_out
from coma.data.statistics import measure
from coma.data.transforms import normalize

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
