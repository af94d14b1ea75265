"""All private names of other libraries that this room uses; `test_private.py` notices when they change."""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial, wraps
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch import Tensor


def use_device(device: str) -> None:
    """Makes mmengine build and run models on this device (cuda or cpu), where it would take what it finds."""
    importlib.import_module("mmengine.device.utils").DEVICE = device  # type: ignore[attr-defined]


def parse_option_value(text: str) -> Any:
    """Returns the value of a `--cfg-options` entry, parsed as OpenMMLab's tools parse it."""
    from mmengine.config import DictAction

    return DictAction._parse_iterable(text)


def download_safely() -> None:
    """Makes mmengine's downloads of checkpoints load tensors and numbers only.

    mmengine downloads `http`, `torchvision` and `open-mmlab` addresses through a function of torch that
    unpickles anything by default.
    """
    load_url = partial(torch.hub.load_state_dict_from_url, weights_only=True)
    importlib.import_module("mmengine.runner.checkpoint").load_url = load_url  # type: ignore[attr-defined]


def numpy_constructors() -> list[Any]:
    """Returns the functions that pickled numpy arrays and scalars call."""
    multiarray: Any = importlib.import_module("numpy._core.multiarray")
    return [multiarray._reconstruct, multiarray.scalar]


def read_images_in_inferencers() -> None:
    """Makes mmengine's inferencers read images with `ReadImage` where the configuration does.

    They refuse pipelines without `LoadImageFromFile`, in whose place they put a reader of their own.
    """
    from mmengine.infer import BaseInferencer

    theirs = BaseInferencer.__init__
    if hasattr(theirs, "__wrapped__"):
        return

    @wraps(theirs)
    def start(self: Any, *arguments: Any, **settings: Any) -> None:
        self._init_pipeline = partial(_init_pipeline, self._init_pipeline)
        theirs(self, *arguments, **settings)

    BaseInferencer.__init__ = start  # type: ignore[method-assign]


def _init_pipeline(theirs: Any, config: Any) -> Any:
    from mmengine.registry import TRANSFORMS

    steps = config.test_dataloader.dataset.pipeline
    found = [i for i, step in enumerate(steps) if step["type"] == "ReadImage"]
    if not found:
        return theirs(config)
    ours, steps[found[0]] = steps[found[0]], {"type": "LoadImageFromFile"}
    pipeline = theirs(config)
    (place,) = [i for i, each in enumerate(pipeline.transforms) if type(each).__name__ == "InferencerLoader"]
    pipeline.transforms[place] = TRANSFORMS.build(ours)
    return pipeline


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Pastes masks as mmdet does: probabilities `[n, h, w]` in boxes `[n, 4]` to bool `[n, H, W]`."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    pasted = torch.zeros(len(masks), *size, dtype=torch.bool)
    for whole, mask, box in zip(pasted, masks, boxes, strict=True):
        part, place = _do_paste_mask(mask[None, None], box[None], *size)
        whole[place] = part[0] >= threshold
    return pasted


def paste_masks_beyond_edges() -> None:
    """Makes mmdet, once it is imported, paste masks of boxes beside the image as nothing.

    On a CPU it pastes a mask only where its box is, and fails where that is nowhere; QueryInst, whose boxes
    are not clipped, predicts such boxes. On a GPU it pastes into whole images.
    """
    heads = sys.modules.get("mmdet.models.roi_heads.mask_heads.fcn_mask_head")
    theirs = getattr(heads, "_do_paste_mask", None)
    if theirs is None or hasattr(theirs, "__wrapped__"):
        return

    @wraps(theirs)
    def paste(masks: Tensor, boxes: Tensor, img_h: int, img_w: int, skip_empty: bool = True) -> Any:
        least, most = boxes.amin(0)[:2], boxes.amax(0)[2:]
        beside = bool((most < 0).any() or (least > least.new_tensor([img_w, img_h])).any())
        return theirs(masks, boxes, img_h, img_w, skip_empty and not beside)

    vars(heads)["_do_paste_mask"] = paste


def exit_on_send_error(message: str) -> None:
    """Ends this process with a message when it cannot send an object through a queue.

    Otherwise the process that reads the queue would wait forever.
    """

    def end(error: Exception, _: object) -> None:
        os.write(2, f"{message}: {type(error).__name__}: {error}\n".encode())
        os._exit(1)

    Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]
