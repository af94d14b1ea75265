"""Which models of MMDetection and MMSegmentation take our encoder: the base model of every family, once.

    python benchmarks/zoo.py --out benchmarks/results/zoo_cpu.json
    python benchmarks/zoo.py --only mmdet/rtmdet mmseg/mask2former

A family is a folder of `configs/`; its base model is the first one of its metafile (`BASE` names others). The
configuration is fitted to DyViT-tiny with random weights, built at its own size, trained for a step on two
drawn images, and predicts one. It works if the loss is finite, every parameter gets a gradient, and there is
a prediction. Every model has a process of its own and a time limit. With --out, what is in the file is not
run again, except what failed.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import re
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from machine import report

LEFT_OUT = {
    "another task": ("reid",),
    "self-supervised": ("selfsup_pretrain",),
    "text prompts": ("glip", "grounding_dino", "mm_grounding_dino", "san", "vpd"),
    "video": ("bytetrack", "deepsort", "mask2former_vis", "masktrack_rcnn", "ocsort", "qdtrack", "sort",
              "strongsort"),
    "no models of their own": ("_base_", "common", "dsdl"),
    "models of Detectron2": ("misc",),
}  # fmt: skip
BASE = {
    "mmdet/guided_anchoring": ("ga-retinanet_r50-caffe_fpn_1x_coco", "ga-faster-rcnn_r50-caffe_fpn_1x_coco"),
    "mmdet/cascade_rpn": ("cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco",),
    "mmdet/faster_rcnn": ("faster-rcnn_r50_fpn_1x_coco", "faster-rcnn_r50-caffe-c4_ms-1x_coco",
                          "faster-rcnn_r50-caffe-dc5_1x_coco"),
    "mmdet/detectors": ("detectors_cascade-rcnn_r50_1x_coco",),
    "mmdet/rtmdet": ("rtmdet_tiny_8xb32-300e_coco", "rtmdet-ins_tiny_8xb32-300e_coco"),
    "mmdet/mask2former": ("mask2former_r50_8xb2-lsj-50e_coco", "mask2former_r50_8xb2-lsj-50e_coco-panoptic"),
    "mmdet/libra_rcnn": ("libra-faster-rcnn_r50_fpn_1x_coco", "libra-retinanet_r50_fpn_1x_coco"),
    "mmdet/ssd": ("ssd300_coco", "ssdlite_mobilenetv2-scratch_8xb24-600e_coco"),
    "mmdet/yolo": ("yolov3_d53_8xb8-ms-608-273e_coco",),
    "mmseg/unet": ("unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024",),
}  # fmt: skip
"""Models of families that are not, or not only, the first one of the metafile."""
SIDES = {f"mmdet/{name}": 320 for name in ("ssd", "legacy_1.x", "wider_face", "pascal_voc", "dino", "ddq")}
SIDES["mmseg/mobilenet_v3"] = 512
"""Side of the images of families whose models need more than `SIDE`, in pixels."""
SIDE = 128


def families() -> dict[str, list[Path]]:
    """Returns the files of the base models by family."""
    left_out = {name for names in LEFT_OUT.values() for name in names}
    found: dict[str, list[Path]] = {}
    for library in ("mmdet", "mmseg"):
        root = stock_configs(library)
        for folder in sorted(each for each in root.iterdir() if each.is_dir() and each.name not in left_out):
            family = f"{library}/{folder.name}"
            named = [folder / f"{name}.py" for name in BASE.get(family, ())]
            found[family] = named or [_first(folder)]
    return found


def stock_configs(library: str) -> Path:
    """Returns the folder of the configurations that come with mmdet or mmseg."""
    from importlib.util import find_spec

    spec = find_spec(library)
    assert spec and spec.origin
    return Path(spec.origin).parent / ".mim" / "configs"


def _first(folder: Path) -> Path:
    """Returns the first configuration that the metafile of a family lists, or else the first file."""
    for metafile in folder.glob("metafile.y*ml"):
        for name in re.findall(r"Config:\s*(\S+)", metafile.read_text()):
            if (folder / Path(name).name).is_file():
                return folder / Path(name).name
    return next(iter(sorted(folder.glob("*.py"))))


def run_model(path: Path, side: int, artifact: Path | None = None) -> dict[str, Any]:
    """Fits the encoder of an artifact, or one with random weights, builds, trains for a step and predicts.

    Raises:
        Exception: whatever the model raises.
    """
    import torch
    from mmengine.logging import MessageHub
    from mmengine.registry import MODELS, init_default_scope

    import coma
    from downstream.openmmlab.runner import prepare_config

    torch.manual_seed(0)
    config: Any = coma.fit_backbone(path, artifact, preset=None if artifact else "tiny")
    library = config.default_scope
    prepare_config(config, Path("unused"), "cpu")
    for name in (f"{library}.models", *config.custom_imports["imports"]):
        import_module(name)
    init_default_scope(library)
    for name in ("iter", "epoch"):  # some losses change with the steps of the runner
        MessageHub.get_current_instance().update_info(name, 0)
    for setting, small in (("batch_augments", None), ("size", (side, side))):  # they pad to a full size
        if setting in config.model.data_preprocessor:
            config.model.data_preprocessor[setting] = small
    _set_small(config.model)
    model: Any = MODELS.build(config.model)
    model.init_weights()
    data = _objects(config, side) if library == "mmdet" else _label_maps(config, side)
    model.train()
    losses = model(**model.data_preprocessor(data, True), mode="loss")
    total, _ = model.parse_losses(losses)
    total.backward()
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    unused = [name for name, each in trained if each.grad is None]
    torch.optim.SGD([each for _, each in trained], lr=1e-4).step()
    with torch.no_grad():
        one = {name: values[:1] for name, values in data.items()}
        predicted = model.eval().test_step(one)
    if not torch.isfinite(total):
        raise ValueError(f"the loss is {float(total.detach())}")
    if unused:
        raise ValueError(f"{len(unused)} parameters without a gradient: {', '.join(unused[:3])}")
    assert len(predicted) == 1
    return {"parameters": f"{sum(each.numel() for each in model.parameters()) / 1e6:.1f} M"}


def _set_small(node: Any) -> None:
    """Limits the boxes that heads of the second stage get, in training and testing."""
    limits = {"nms_pre": 100, "num": 16} | ({"max_per_img": 20} if "nms" in node else {})
    for key, child in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(node, dict) and key in limits and isinstance(child, int):
            node[key] = min(child, limits[key])
        if isinstance(child, dict | list):
            _set_small(child)


def _objects(config: Any, side: int) -> dict[str, Any]:
    from mmdet.testing import demo_mm_inputs

    classes = min(_numbers(config.model, ("num_classes", "num_things_classes")) or [2])
    shapes = [(3, side, side), (3, side, side)]
    masks = re.search(r"with_mask['\"]?[:=] ?True|LoadPanoptic", config.pretty_text) is not None
    data = demo_mm_inputs(2, shapes, [3, 4], min(max(classes, 2), 100), with_mask=masks, with_semantic=True)
    for sample in data["data_samples"]:
        sample.gt_instances.labels %= classes
    if config.model.type == "FastRCNN":
        import torch
        from mmengine.structures import InstanceData

        for sample in data["data_samples"]:
            boxes = sample.gt_instances.bboxes
            sample.proposals = InstanceData(bboxes=boxes, scores=torch.ones(len(boxes)))
    return data


def _label_maps(config: Any, side: int) -> dict[str, Any]:
    import torch
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    channels = len(config.model.data_preprocessor.mean)
    classes = min(_numbers(config.model, ("num_classes",)) or [2])
    images = [torch.randint(0, 255, (channels, side, side), dtype=torch.uint8) for _ in range(2)]
    samples = []
    for _ in images:
        labels = PixelData(data=torch.randint(0, max(classes, 2), (1, side, side)))
        edges = PixelData(data=torch.randint(0, 2, (1, side, side)))
        meta = {"img_shape": (side, side), "ori_shape": (side, side), "pad_shape": (side, side)}
        samples.append(SegDataSample(gt_sem_seg=labels, gt_edge_map=edges, metainfo=meta))
    return {"inputs": images, "data_samples": samples}


def _numbers(node: Any, names: tuple[str, ...]) -> list[int]:
    if isinstance(node, list | tuple):
        return [number for child in node for number in _numbers(child, names)]
    if not isinstance(node, dict):
        return []
    own = [value for name, value in node.items() if name in names and isinstance(value, int) and value > 0]
    return own + [number for child in node.values() for number in _numbers(child, names)]


def import_libraries() -> None:
    """Imports what all models need, before processes are forked."""
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    for name in ("downstream.openmmlab.runner", "downstream.configs.contract", "mmdet.models",
                 "mmdet.testing", "mmseg.models", "coma", "downstream.configs.adapt"):  # fmt: skip
        import_module(name)


def run_child(path: Path, side: int, results: Any) -> None:
    """Runs one model in a process of its own and sends the result."""
    import warnings

    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = io.StringIO()  # the libraries print a lot
    try:
        results.send({"works": "yes", **run_model(path, side)})
    except Exception as error:
        said = " ".join(str(error).split()) or traceback.format_exc().strip().splitlines()[-3].strip()
        results.send({"works": "no", "why": f"{type(error).__name__}: {said.replace(f'{path}: ', '')}"[:240]})


def run_family(family: str, path: Path, seconds: float) -> dict[str, Any]:
    """Returns the row of a model, from a forked process, which has the libraries already."""
    started = time.perf_counter()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=run_child, args=(path, SIDES.get(family, SIDE), sender))
    child.start()
    sender.close()
    row: dict[str, Any] = {"family": family, "model": path.stem}
    try:
        row |= receiver.recv() if receiver.poll(seconds) else {"works": "no", "why": f"over {seconds:g} s"}
    except EOFError:
        child.join()
        row |= {"works": "no", "why": f"the process died with exit code {child.exitcode}"}
    child.kill()
    child.join()
    return row | {"seconds": round(time.perf_counter() - started)}


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="families, such as mmdet/rtmdet")
    parser.add_argument("--seconds", type=float, default=600.0, help="time limit of a model")
    parser.add_argument("--out", type=Path, help="keep the results in this file, as JSON")
    args = parser.parse_args()
    import_libraries()
    kept = json.loads(args.out.read_text())["rows"] if args.out and args.out.is_file() else []
    found = {(row["family"], row["model"]): row for row in kept}
    wanted = [(family, path) for family, paths in families().items() for path in paths]
    for family, path in wanted:
        key = (family, path.stem)
        if found.get(key, {}).get("works") == "yes" or (args.only and family not in args.only):
            continue
        found[key] = run_family(family, path, args.seconds)
        print(found[key], flush=True)
        if args.out:
            args.out.write_text(json.dumps({"rows": list(found.values())}))
    rows = [found[key] for family, path in wanted if (key := (family, path.stem)) in found]
    works = sum(row["works"] == "yes" for row in rows)
    report(f"DyViT-tiny, images of {SIDE} px; {works} of {len(rows)} models work", rows, args.out)


if __name__ == "__main__":
    main()
