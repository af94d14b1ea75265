"""Registers our modules with mmengine for MMDetection and MMSegmentation.

    custom_imports = dict(imports=['downstream.openmmlab'], allow_failed_imports=False)

Importing this package has side effects, as mmengine's plug-ins do: it registers backbones, neck, image
reader, training loop and layer-wise learning rates, makes checkpoints load safely and inferencers read images
as training does, and, where mmcv has no compiled operators, registers those of torchvision. Import it before
mmdet and mmseg, which import `mmcv.ops`; `python -m downstream.openmmlab TOOL ...` does so for OpenMMLab's
tools.
"""

from downstream.openmmlab.checkpoint import allow_safe_loading
from downstream.openmmlab.op_registry import register_ops
from downstream.private import read_images_in_inferencers

register_ops()
allow_safe_loading()
read_images_in_inferencers()

from downstream.openmmlab.backbones import DyViT, PlainViT  # noqa: E402
from downstream.openmmlab.necks import SimpleFeaturePyramid  # noqa: E402
from downstream.openmmlab.optim import LayerDecayConstructor  # noqa: E402
from downstream.openmmlab.train_loop import AccumulatingTrainLoop  # noqa: E402
from downstream.openmmlab.transforms import ReadImage  # noqa: E402
from downstream.openmmlab.worker_init import init_worker  # noqa: E402

__all__ = [
    "AccumulatingTrainLoop",
    "DyViT",
    "LayerDecayConstructor",
    "PlainViT",
    "ReadImage",
    "SimpleFeaturePyramid",
    "init_worker",
]
