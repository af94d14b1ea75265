"""Datasets of `coma detect` and `coma segment`: found, and checked in full before training starts.

Nothing here needs torch or an OpenMMLab package.
"""

from downstream.datasets.coco import CocoSplit, check_same_classes, open_coco, read_coco
from downstream.datasets.labels import LabelSplit, open_labels

__all__ = ["CocoSplit", "LabelSplit", "check_same_classes", "open_coco", "open_labels", "read_coco"]
