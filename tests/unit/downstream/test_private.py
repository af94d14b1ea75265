"""Private names that `downstream.private` uses still exist and still do the same."""

import copy
import importlib
import inspect
import multiprocessing
import os
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import pytest
import torch

import downstream.openmmlab  # noqa: F401
from downstream import private

pytestmark = pytest.mark.filterwarnings("ignore")  # OpenMMLab's packages warn about each other


def test_mmengine_takes_the_device_it_is_told(monkeypatch):
    import mmengine.device
    import mmengine.device.utils
    import mmengine.runner.runner

    monkeypatch.setattr(mmengine.device.utils, "DEVICE", "cuda")
    private.use_device("cpu")
    assert mmengine.device.get_device() == mmengine.runner.runner.get_device() == "cpu"


@pytest.mark.parametrize(
    ("text", "value"), [("0.2", 0.2), ("(96,64)", (96, 64)), ("[1,2]", [1, 2]), ("False", False), ("a", "a")]
)
def test_values_of_cfg_options(text, value):
    assert private.parse_option_value(text) == value


def test_downloads_of_checkpoints_unpickle_nothing():
    loading: Any = importlib.import_module("mmengine.runner.checkpoint")

    private.download_safely()
    assert loading.load_url.func is torch.hub.load_state_dict_from_url
    assert loading.load_url.keywords == {"weights_only": True}
    assert "load_url(" in inspect.getsource(loading)  # what mmengine calls for every address


def test_numpy_arrays_are_pickled_by_the_allowed_functions():
    arrays: Any = (np.zeros(2), np.float64(1))
    names = {function.__name__ for function in private.numpy_constructors()}
    used = {each.__reduce__()[0].__name__ for each in arrays}
    assert names == used == {"_reconstruct", "scalar"}


def test_masks_are_pasted_as_mmdet_pastes_them():
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmengine.config import ConfigDict

    head = FCNMaskHead(num_convs=1, in_channels=4, conv_out_channels=4, num_classes=1)
    masks, size = torch.randn(3, 28, 28), (40, 60)
    boxes = torch.tensor([[2.5, 3.0, 30.2, 20.0], [0.0, 0.0, 60.0, 40.0], [50.0, 30.0, 59.5, 39.0]])
    theirs = head._predict_by_feat_single(
        masks[:, None],
        boxes,
        torch.zeros(3, dtype=torch.long),
        {"scale_factor": (1.0, 1.0), "ori_shape": size},
        ConfigDict(mask_thr_binary=0.5),
        rescale=True,
        activate_map=False,
    )
    assert torch.equal(private.paste_masks(masks.sigmoid(), boxes, size, 0.5), theirs)


@pytest.mark.parametrize("beside", [(70, 5, 90, 20), (5, 50, 20, 60), (-30, 5, -9, 20), (5, -30, 20, -9)])
def test_masks_of_boxes_beside_the_image_are_pasted_as_nothing(beside, monkeypatch):
    from mmdet.models.roi_heads.mask_heads import fcn_mask_head

    theirs = getattr(fcn_mask_head._do_paste_mask, "__wrapped__", fcn_mask_head._do_paste_mask)
    monkeypatch.setattr(fcn_mask_head, "_do_paste_mask", theirs)
    mask, (height, width) = torch.ones(1, 1, 28, 28), (40, 60)
    with pytest.raises(RuntimeError, match="inconsistent"):
        theirs(mask, torch.tensor([beside], dtype=torch.float), height, width)
    private.paste_masks_beyond_edges()
    private.paste_masks_beyond_edges()  # a second time changes nothing
    for box in (beside, (2.5, 3.0, 30.2, 20.0), (50.0, 30.0, 70.0, 60.0)):
        boxes = torch.tensor([box], dtype=torch.float)
        pasted = torch.zeros(1, height, width)
        part, place = fcn_mask_head._do_paste_mask(mask, boxes, height, width)
        pasted[(slice(None), *place)] = part
        whole, _ = theirs(mask, boxes, height, width, skip_empty=False)
        assert torch.equal(pasted, whole)
        assert bool(whole.any()) == (box != beside)


def test_a_process_that_cannot_send_ends(monkeypatch, capfd):
    monkeypatch.setattr(Queue, "_on_queue_feeder_error", vars(Queue)["_on_queue_feeder_error"])
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    private.exit_on_send_error("cannot send")
    queue = multiprocessing.get_context("spawn").Queue()
    queue.put(lambda: None)  # cannot be pickled
    queue.close()
    queue.join_thread()
    assert ended == [1] and "cannot send: " in capfd.readouterr().err


INFERENCERS = [("mmdet.apis", "DetInferencer"), ("mmseg.apis", "MMSegInferencer")]


@pytest.mark.parametrize(("module", "name"), INFERENCERS)
def test_inferencers_read_images_as_the_configuration_does(module, name):
    from mmengine.config import ConfigDict
    from mmengine.infer import BaseInferencer
    from mmengine.registry import DefaultScope

    kind = getattr(importlib.import_module(module), name)
    inferencer = kind.__new__(kind)
    steps = [{"type": "ReadImage", "channels": 4}, {"type": "LoadAnnotations"}]
    config = ConfigDict(test_dataloader={"dataset": {"pipeline": steps}})
    with pytest.raises(ValueError, match="LoadImageFromFile is not found"):  # what they say by themselves
        kind._init_pipeline(inferencer, copy.deepcopy(config))
    private.read_images_in_inferencers()  # a second time changes nothing
    assert not hasattr(vars(BaseInferencer.__init__)["__wrapped__"], "__wrapped__")
    with DefaultScope.overwrite_default_scope(module.partition(".")[0]):
        pipeline = private._init_pipeline(partial(kind._init_pipeline, inferencer), config)
        stock = [{"type": "LoadImageFromFile"}]
        theirs = private._init_pipeline(
            partial(kind._init_pipeline, inferencer),
            ConfigDict(test_dataloader={"dataset": {"pipeline": stock}}),
        )
    assert type(pipeline.transforms[0]).__name__ == "ReadImage" and pipeline.transforms[0].channels == 4
    assert type(theirs.transforms[0]).__name__ == "InferencerLoader"
    assert pipeline.transforms[0](np.zeros((2, 3, 4), np.uint8))["img_shape"] == (2, 3)
