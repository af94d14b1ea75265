"""All that MMDetection and MMSegmentation need from here; importing it registers it with mmengine.

    custom_imports = dict(imports=['downstream.openmmlab'], allow_failed_imports=False)

This is mmengine's way of plugging in, and the one module here whose import has effects: backbones and neck,
reading, layer-wise learning rates, checkpoints that load safely, and, where mmcv came without its compiled
operators, those of torchvision. It must come before the first import of `mmcv.ops`, which mmdet and mmseg do
as they are imported.
"""

from downstream.openmmlab.checkpoint import allow_safe_loading
from downstream.openmmlab.op_registry import register_ops

register_ops()
allow_safe_loading()

from downstream.openmmlab.backbones import DyViT, PlainViT  # noqa: E402
from downstream.openmmlab.necks import SimpleFeaturePyramid  # noqa: E402
from downstream.openmmlab.optim import LayerDecayConstructor  # noqa: E402
from downstream.openmmlab.transforms import ReadImage  # noqa: E402
from downstream.openmmlab.worker_init import init_worker  # noqa: E402

__all__ = [
    "DyViT",
    "LayerDecayConstructor",
    "PlainViT",
    "ReadImage",
    "SimpleFeaturePyramid",
    "init_worker",
]
