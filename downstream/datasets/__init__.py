"""Finds and checks the datasets of `coma detect` and `coma segment`, without OpenMMLab."""

from downstream.datasets.coco import CocoSplit, check_same_classes, open_coco, read_coco
from downstream.datasets.labels import LabelSplit, open_labels

__all__ = ["CocoSplit", "LabelSplit", "check_same_classes", "open_coco", "open_labels", "read_coco"]
