"""Files of every kind and precision, as the gate of `coma export` gets them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import export_files
import graph_faults as plant
import numpy as np
from detectors import SMALL, build
from downstream_data import VIT
from graph_faults import Change, weight

from coma.config import EncoderConfig
from coma.runtimes.base import Runtime
from coma.runtimes.model_spec import (
    GraphKind,
    Precision,
    eight_bit_part,
    float_part,
    read_model_spec,
    to_json,
)
from coma.runtimes.preprocessing import resize_image, to_input
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shape, Shapes
from downstream.tasks.detection import Detector
from export.graphs.detector import AFTER_BACKBONE
from export.graphs.load import load_exportable, named_examples
from export.onnx_export import cast_weights, load_onnx, normalized, save_onnx, with_normalization, with_sizes
from export.onnx_export import write_onnx as write
from export.preprocessing import evenly_spaced
from export.quantization import quantize_fp8, quantize_int8
from export.verify.bisect import locate, module_outputs
from export.verify.opened_file import OpenedFile, open_file
from export.verify.parity import batch_inputs, verify
from export.verify.verdict import ParityResult

FREE = Shapes(Shape(1, 16, 16), Shape(2, 64, 48), Shape(4, 128, 128))
FIXED = Shapes(*[Shape(2, 64, 64)] * 3)
BATCHES = Shapes(Shape(1, 64, 64), Shape(2, 64, 64), Shape(5, 64, 64))
OF_DETECTORS = Shapes(Shape(1, 64, 64), Shape(1, 96, 128), Shape(3, 160, 160))
FEW_LEVELS: dict[str, Any] = {
    "rpn_head.anchor_generator.scales": [2],
    "rpn_head.anchor_generator.strides": [16, 32, 64],
    "roi_head.bbox_roi_extractor.featmap_strides": [16, 32],
    "roi_head.bbox_roi_extractor.finest_scale": 20,
    "test_cfg.rpn.max_per_img": 80,
    "test_cfg.rcnn.max_per_img": 200,
    "test_cfg.rpn.nms_pre": 100,
}
OF_MASKS: dict[str, Any] = {
    "roi_head.mask_roi_extractor.featmap_strides": [16, 32],
    "roi_head.mask_roi_extractor.finest_scale": 20,
    "roi_head.mask_head.num_convs": 1,
    "test_cfg.rcnn.max_per_img": 40,
}
OF_VIT: dict[str, Any] = {"neck.start_level": 2, "neck.num_outs": 3}
OF_DYVIT: dict[str, Any] = {
    "backbone.out_indices": (2, 3),
    "neck.in_channels": [32, 64],
    "neck.num_outs": 3,
}
TWO_STAGES: dict[str, Any] = {"roi_head.num_stages": 2}
RETINA: dict[str, Any] = {
    "bbox_head.anchor_generator.strides": [16, 32, 64],
    "bbox_head.stacked_convs": 1,
    "test_cfg.max_per_img": 200,
    "test_cfg.nms_pre": 100,
}
SHALLOW = replace(VIT, depth=1)


DETECTORS: dict[str, tuple[Detector, EncoderConfig, dict[str, Any]]] = {
    "Faster R-CNN": ("faster-rcnn", SHALLOW, FEW_LEVELS | OF_VIT),
    "Mask R-CNN": ("mask-rcnn", SHALLOW, FEW_LEVELS | OF_MASKS | OF_VIT),
    "Cascade R-CNN": ("cascade-mask-rcnn", SMALL, FEW_LEVELS | OF_MASKS | OF_DYVIT | TWO_STAGES),
    "RetinaNet": ("retinanet", SHALLOW, RETINA | OF_VIT),
}


def _detector(folder: Path, name: str) -> Path:
    build(folder, *DETECTORS[name])
    return folder


MAKERS: dict[str, tuple[GraphKind, Callable[[Path], Path]]] = {
    "encoder": ("encoder", export_files.backbone),
    "encoder, ViT": ("encoder", partial(export_files.backbone, model=export_files.VIT)),
    "encoder, grey ViT": (
        "encoder",
        partial(export_files.backbone, model=replace(export_files.VIT, channels=1)),
    ),
    "reconstructor": ("reconstructor", export_files.pretrained),
    "reconstructor, ViT": ("reconstructor", partial(export_files.pretrained, model=export_files.VIT)),
    "classifier": ("classifier", export_files.classifier),
    "classifier, ViT": ("classifier", partial(export_files.classifier, model=export_files.VIT)),
    "segmentor": ("segmentor", export_files.segmentor),
    "segmentor, ViT": ("segmentor", partial(export_files.segmentor, model=export_files.VIT)),
    **{name: ("detector", partial(_detector, name=name)) for name in DETECTORS},
}


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        model: Name in `MAKERS`.
        precision: Its precision.
        shapes: Shapes that it takes.
        pixels: Whether it normalises in its graph.
        visible: Number of units that it takes a list of; None for files that take none.
        plugin_free: Whether a detector has loops in place of TensorRT's plug-ins.
    """

    model: str
    precision: Precision = "fp32"
    shapes: Shapes = FREE
    pixels: bool = False
    visible: int | None = None
    plugin_free: bool = False

    @property
    def graph(self) -> GraphKind:
        """Kind of graph."""
        return MAKERS[self.model][0]

    @property
    def name(self) -> str:
        """Name for tables and files."""
        sizes = {id(FREE): "any size", id(FIXED): "one shape", id(BATCHES): "any batch"}
        shapes = sizes.get(id(self.shapes), "any size")
        listed = f", {self.visible} units" if self.visible else ""
        listed += ", plug-in-free" * self.plugin_free + ", pixels in" * self.pixels
        return f"{self.model}, {self.precision}, {shapes}{listed}"


class Made:
    """A case with its artifact and its file, which are made once in a folder."""

    def __init__(self, case: Case, work: Path, pictures: list[np.ndarray]) -> None:
        self.case = case
        channels = 1 if "grey" in case.model else 3
        self.pictures = [picture[..., :channels] for picture in pictures]
        graph, make = MAKERS[case.model]
        self.artifact = work / case.model.replace(" ", "-")
        if not self.artifact.exists():
            make(self.artifact)
        self.load = partial(load_exportable, self.artifact, graph, case.visible)
        self.reference = TorchRuntime(self.load())
        self.file = work / f"{case.name.replace(' ', '-')}.onnx"
        if not self.file.exists():
            self._write(work)

    def _write(self, work: Path) -> None:
        case = self.case
        if kind := eight_bit_part(case.precision):
            base = Made(replace(case, precision=float_part(case.precision)), work, self.pictures)
            spec = replace(read_model_spec(load_onnx(base.file), "base"), precision=case.precision)
            metadata = {"coma": to_json(spec)}
            batches = [self._batch(number) for number in range(len(self.pictures))]
            exclude = AFTER_BACKBONE if case.graph == "detector" else ()
            if kind == "int8":
                quantize_int8(base.file, self.file, batches, "percentile", exclude=exclude, metadata=metadata)
            else:
                quantize_fp8(base.file, self.file, batches, exclude=exclude, metadata=metadata)
            return
        exportable = with_normalization(self.load()) if case.pixels else self.load()
        exportable = cast_weights(exportable, case.precision)
        write(exportable, case.shapes, self.file, plugin_free=case.plugin_free)

    def _batch(self, number: int) -> dict[str, np.ndarray]:
        opt, spec = self.case.shapes.opt, self.reference.spec
        inputs = named_examples(spec, 1, opt.height, opt.width)
        image = resize_image(self.pictures[number], spec.preprocessing, (opt.height, opt.width))
        inputs["images"] = to_input([image], spec.preprocessing)
        return {name: each.numpy() for name, each in inputs.items()}

    def planted(self, change: Change, folder: Path) -> Path:
        """Writes a copy of the file with a fault."""
        model = load_onnx(self.file)
        change(model)
        save_onnx(model, folder / "planted.onnx")
        return folder / "planted.onnx"

    def open(self, path: Path) -> OpenedFile:
        """Opens a file of this case."""
        return open_file(path, load_onnx(path), self.case.graph, self.case.precision)

    def judge(self, path: Path, wrap: Callable[[Runtime], Runtime] | None = None) -> ParityResult:
        """Verifies a file of this case as the gate does."""
        opened, spec = self.open(path), self.reference.spec
        spec = with_sizes(normalized(spec) if self.case.pixels else spec, self.case.shapes)
        return verify(
            self.reference,
            wrap(opened.runtime) if wrap else opened.runtime,
            self.case.shapes,
            self.pictures,
            expected=replace(spec, precision=self.case.precision),
            steps=opened.steps,
            tolerance=opened.tolerance,
        )


CORRECT = [
    *(Case("encoder", precision) for precision in ("fp32", "fp16", "int8")),
    *(Case(f"encoder, {name}", "fp32", BATCHES) for name in ("ViT", "grey ViT")),
    *(Case("reconstructor", precision) for precision in ("fp32", "int8")),
    *(Case("reconstructor, ViT", "fp32", FIXED, visible=listed) for listed in (None, 5)),
    Case("encoder, ViT", "fp32", BATCHES, visible=5),
    *(Case("classifier", precision, BATCHES) for precision in ("fp32", "fp16", "bf16", "int8")),
    Case("classifier", "fp32", BATCHES, pixels=True),
    Case("classifier, ViT", "fp32", FIXED),
    *(Case("classifier, ViT", precision, BATCHES) for precision in ("int8+fp16", "fp8+fp16")),
    *(Case("segmentor", precision) for precision in ("fp32", "int8", "fp16", "int8+fp16")),
    *(Case("Faster R-CNN", precision, OF_DETECTORS) for precision in ("fp32", "int8", "fp16", "int8+fp16")),
    *(Case(name, "fp32", OF_DETECTORS) for name in ("RetinaNet", "Mask R-CNN", "Cascade R-CNN")),
]
"""Files without a fault."""

KINDS = ("encoder", "reconstructor", "classifier", "segmentor")
MODELS = [f"{kind}{vit}" for kind in KINDS for vit in ("", ", ViT")]
OF_ANY_SIZE = [
    *(Case(model, precision) for model in MODELS for precision in ("fp32", "int8")),
    *(Case(model, "fp16") for model in ("encoder", "segmentor")),
]
"""Files without a fault that take images of any size."""

ENCODER, CLASSIFIER = Case("encoder"), Case("classifier", "fp32", BATCHES)
RECONSTRUCTOR, SEGMENTOR = Case("reconstructor"), Case("segmentor")
FASTER, MASK, CASCADE, RETINANET = (
    Case(name, "fp32", OF_DETECTORS) for name in ("Faster R-CNN", "Mask R-CNN", "Cascade R-CNN", "RetinaNet")
)


LOCATED = (ENCODER, RECONSTRUCTOR, CLASSIFIER, SEGMENTOR, FASTER, MASK, CASCADE, RETINANET)
"""Files in whose modules errors are planted to be located."""


@dataclass(frozen=True)
class Location:
    """Where an error was planted, and where it was found.

    Attributes:
        planted: Path of the module.
        found: Path of the module that was named, or None.
        distance: Modules between the two in the order of computation, plus one; 0 if they are the same.
    """

    planted: str
    found: str | None
    distance: int | None


def locations(made: Made, count: int) -> list[Location]:
    """Plants an error in one module after another, evenly spaced over the model, and locates it."""
    module, opt = made.reference.module, made.case.shapes.opt
    numbers = list(range(opt.batch))
    inputs = tuple(batch_inputs(made.reference.spec, made.pictures, numbers, opt.height, opt.width).values())
    model, limit = load_onnx(made.file), made.open(made.file).tolerance.relative
    leaves = list(plant.all_leaves(module))
    order = list(dict.fromkeys(name for name, _ in module_outputs(module, leaves, inputs, {})))
    able = [name for name in order if plant.weights_of(model, name)]
    assert locate(module, model, inputs, limit) is None  # a correct file
    found = []
    for number in evenly_spaced(len(able), count):
        changed = load_onnx(made.file)
        weight(able[number], plant.some_percent)(changed)
        finding = locate(module, changed, inputs, limit)
        distance = abs(order.index(finding.module) - order.index(able[number])) if finding else None
        found.append(Location(able[number], finding.module if finding else None, distance))
    return found
