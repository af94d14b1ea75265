"""Faults in files of every kind, all of which the gate of `coma export` must refuse."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import export_files
import graph_faults as plant
import numpy as np
from gate_cases import CASCADE, CLASSIFIER, ENCODER, FASTER, MASK, RECONSTRUCTOR, RETINANET, SEGMENTOR, Case
from graph_faults import Change, f32, weight
from onnx import ModelProto, helper, numpy_helper

from coma.runtimes.base import Runtime


@dataclass(frozen=True)
class Fault:
    """A fault that is planted in a correct file.

    Attributes:
        case: The file.
        about: What is wrong.
        change: Changes the graph.
        wrap: Changes the runtime instead.
    """

    case: Case
    about: str
    change: Change = lambda model: None
    wrap: Callable[[Runtime], Runtime] | None = None


def _without_bias(values: np.ndarray) -> np.ndarray:
    return values * 0


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.int32) & ~0xFFFF).view(np.float32)


def _with_nan(values: np.ndarray) -> np.ndarray:
    values.flat[0] = np.nan
    return values


def _first_pixel(model: ModelProto) -> None:
    patch = plant.Patch(model, "classes")
    inner = patch.add("Slice", patch.source, np.array([1]), np.array([2**31]), np.array([1]))
    first = patch.add("Slice", patch.source, np.array([0]), np.array([1]), np.array([1]))
    patch.close(
        patch.add(
            "Concat", patch.add("Mod", patch.add("Add", first, np.int64(1)), np.int64(3)), inner, axis=1
        )
    )


def _last_emptied(model: ModelProto) -> None:
    for name, empty in (("scores", f32(0)), ("labels", np.int64(-1))):
        patch = plant.Patch(model, name)
        kept = patch.add("Slice", patch.source, np.array([0]), np.array([-1]), np.array([1]))
        none = patch.add("Slice", patch.source, np.array([-1]), np.array([2**31]), np.array([1]))
        nothing = patch.add("Add", patch.add("Mul", none, np.zeros_like(empty)), empty)
        patch.close(patch.add("Concat", kept, nothing, axis=1))


def _mask_inverted(model: ModelProto) -> None:
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "visible" and node.op_type != "Shape":
                node.input[place] = "visible/inverted"
    model.graph.node.insert(0, helper.make_node("Not", ["visible"], ["visible/inverted"]))


def _truth_mixed_in(model: ModelProto) -> None:
    patch = plant.Patch(model, "reconstruction")
    patch.close(patch.add("Add", patch.source, patch.add("Mul", "images", f32(1e-3))))


def _stored(name: str, add: float) -> Change:
    def change(model: ModelProto) -> None:
        tensor = next(each for each in model.graph.initializer if each.name.endswith(name))
        values = numpy_helper.to_array(tensor) + np.float32(add)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))

    return change


def _int8_scale(model: ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    stored = {each.name: each for each in model.graph.initializer}
    node = next(node for node in nodes if node.input[0] not in stored)
    node.input[1] = plant.constant(model, numpy_helper.to_array(stored[node.input[1]]) * np.float32(1.5))


BLOCK, GELU = "encoder.stages.2.blocks.0", "tanh approximation of GELU"
DESCRIPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("channel order BGR", {"channel_order": "BGR"}),
    ("another size", {"size": (56, 56)}),
    ("mean off by 0.001", {"mean": (0.451, 0.42, 0.39)}),
    ("standard deviations in another order", {"std": (0.25, 0.23, 0.24)}),
    ("another resize rule", {"resize": "none"}),
    ("two class names exchanged", {"class_names": ("cup", "cat", "face")}),
    ("a class renamed", {"class_names": ("cat", "cup", "Face")}),
    ("a class too many", {"class_names": (*export_files.CLASSES, "dog")}),
    ("labels for a sigmoid", {"multi_label": True}),
    ("another unit", {"unit": 8}),
    ("another artifact", {"source": "0" * 64}),
    ("another precision", {"precision": "fp16"}),
    ("pixels for normalised images", {"normalize_in_graph": True}),
]
FAULTS = [
    *(
        Fault(CLASSIFIER, f"description: {about}", plant.described(**changes))
        for about, changes in DESCRIPTIONS
    ),
    Fault(ENCODER, "LayerNorm with eps 1e-3, all", plant.attribute("LayerNormalization", "epsilon", 1e-3)),
    Fault(
        ENCODER,
        "LayerNorm with eps 1e-3, one",
        plant.attribute("LayerNormalization", "epsilon", 1e-3, only=5),
    ),
    Fault(ENCODER, f"{GELU}, all", plant.tanh_gelu()),
    Fault(ENCODER, f"{GELU}, one", plant.tanh_gelu(only=1)),
    Fault(ENCODER, "inputs clipped to -1.5 and 1.5", plant.clipped_inputs(-1.5, 1.5)),
    Fault(ENCODER, "inputs clipped to -1.8 and 2.2", plant.clipped_inputs(-1.8, 2.2)),
    Fault(ENCODER, "red and blue exchanged", plant.swapped_channels()),
    Fault(ENCODER, "one output times 1.0001", plant.scaled("stride8", 1.0001)),
    Fault(ENCODER, "a weight rounded to bfloat16", weight(f"{BLOCK}.mlp.fc1", _bfloat16)),
    Fault(ENCODER, "a third of a weight 1 % larger", weight(f"{BLOCK}.attn.qkv", plant.some_percent)),
    Fault(ENCODER, "attention scores times 1.01", plant.scaled("softmax_5", 1.01)),
    *(
        Fault(ENCODER, f"0.1 % too large at {where}", plant.scaled("pooled", 1.001, where))
        for where in ("odd-batch", "wide", "tall", "smallest", "largest", "odd-size")
    ),
    Fault(ENCODER, "noise of 1e-6", plant.noise("pooled", 1e-6)),
    Fault(ENCODER, "state of the shape before, 1e-6", wrap=plant.Stateful),
    Fault(
        CLASSIFIER, "two logits exchanged", plant.replaced("logits", "Gather", np.array([1, 0, 2]), axis=1)
    ),
    Fault(CLASSIFIER, "a weight that is NaN", weight("classifier.head", _with_nan)),
    Fault(CLASSIFIER, "a bias left out", weight("classifier.head", _without_bias, place=1)),
    Fault(CLASSIFIER, "logits times 1.0001", plant.scaled("logits", 1.0001)),
    Fault(
        replace(CLASSIFIER, pixels=True), "mean in the graph off by half a grey value", _stored("mean", 0.5)
    ),
    Fault(
        replace(CLASSIFIER, precision="fp16"),
        "a third of a weight 30 % larger",
        weight("classifier.head", lambda values: values * 1.3),
    ),
    Fault(replace(CLASSIFIER, precision="int8"), "scale of an activation times 1.5", _int8_scale),
    Fault(RECONSTRUCTOR, "mask inverted", _mask_inverted),
    Fault(RECONSTRUCTOR, "0.1 % of the truth mixed in", _truth_mixed_in),
    Fault(
        SEGMENTOR, "two classes exchanged", plant.replaced("logits", "Gather", np.array([1, 0, 2]), axis=1)
    ),
    Fault(SEGMENTOR, "classes of the first row wrong", _first_pixel),
    Fault(
        SEGMENTOR,
        "nearest pixels in place of bilinear",
        plant.attribute("Resize", "mode", "nearest", only=-1),
    ),
    Fault(
        SEGMENTOR,
        "corners aligned",
        plant.attribute("Resize", "coordinate_transformation_mode", "align_corners", only=-1),
    ),
    Fault(FASTER, "scores times 0.99", plant.scaled("scores", 0.99)),
    Fault(FASTER, "score threshold 0.06, not 0.05", plant.suppression(1, 4, 0.06)),
    Fault(FASTER, "score threshold 0.3", plant.suppression(1, 4, 0.3)),
    Fault(FASTER, "labels permuted below 0.3", plant.labels_permuted(0.3)),
    Fault(FASTER, "labels permuted below 0.1", plant.labels_permuted(0.1)),
    Fault(FASTER, "overlap of detections 0.55, not 0.5", plant.suppression(1, 3, 0.55)),
    Fault(FASTER, "overlap of proposals 0.65, not 0.7", plant.suppression(0, 3, 0.65)),
    Fault(FASTER, "boxes shifted by 0.1 px", plant.replaced("boxes", "Add", f32(0.1))),
    Fault(
        FASTER,
        "regions not aligned",
        plant.attribute("RoiAlign", "coordinate_transformation_mode", "output_half_pixel"),
    ),
    Fault(FASTER, "two samples a bin", plant.attribute("RoiAlign", "sampling_ratio", 2)),
    Fault(FASTER, "a third of the proposal weights 1 % larger", weight("rpn.rpn_cls", plant.some_percent)),
    Fault(FASTER, "a third of the box weights 1 % larger", weight("box_heads.0.fc_reg", plant.some_percent)),
    Fault(replace(FASTER, precision="fp16"), "scores times 0.99", plant.scaled("scores", 0.99)),
    Fault(replace(FASTER, precision="int8"), "score threshold 0.06, not 0.05", plant.suppression(1, 4, 0.06)),
    Fault(replace(FASTER, precision="int8"), "labels permuted below 0.3", plant.labels_permuted(0.3)),
    Fault(RETINANET, "scores times 0.99", plant.scaled("scores", 0.99)),
    Fault(RETINANET, "overlap 0.55, not 0.5", plant.suppression(0, 3, 0.55)),
    Fault(RETINANET, "labels permuted below 0.6", plant.labels_permuted(0.6)),
    Fault(MASK, "masks times 0.999", plant.scaled("masks", 0.999)),
    Fault(
        MASK, "a third of the mask weights 1 % larger", weight("mask_heads.0.conv_logits", plant.some_percent)
    ),
    Fault(CASCADE, "second stage 1 % off", weight("box_heads.1.fc_cls", plant.some_percent)),
]
"""Faults that the gate must find."""
