"""Comparison of a preprocessing graph with the preprocessing of this project, on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from coma.errors import BadInput, CheckFailed
from coma.runtimes.model_spec import Preprocessing
from coma.runtimes.open import open_onnx
from coma.runtimes.preprocessing import resize_image, to_input
from export.graphs.load import named_examples
from export.verify.errors import relative_error

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

_MOST_LEVELS, _MEAN_LEVELS, _MOST_RELATIVE = 2.5, 0.1, 0.02
"""Measured with ONNX Runtime 1.31 on the bundled photographs, at 48 to 600 px: at most 2 of 255 levels, where
the graph rounds another way, and 0.03 on average."""
_MOST_IMAGES = 8


@dataclass
class PreprocessingErrors:
    """Errors of images in levels of 255, and the relative error of the model's outputs that follows."""

    largest: float = 0
    mean: float = 0
    relative: float = 0
    images: int = 0

    def __str__(self) -> str:
        return (
            f"preprocessing differs by at most {self.largest:.0f} of 255 levels, {self.mean:.1g} on average, "
            f"outputs by {self.relative:.2g}"
        )


def compare_preprocessing(
    graph: ModelProto, path: Path, pictures: Sequence[np.ndarray]
) -> PreprocessingErrors:
    """Compares both on uint8 images `[H, W, c]`, and the outputs of a model that follow, but for detections.

    Args:
        graph: The preprocessing graph.
        path: ONNX file of the model, which ONNX Runtime runs on the CPU.
        pictures: Images; the first few are used.

    Raises:
        BadInput: no image has 8 bits per channel.
        CheckFailed: the errors are larger than those of another way to round.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    runtime = open_onnx(path)
    rule, batch = runtime.spec.preprocessing, runtime.spec.inputs[0].axes[0]
    count = batch if isinstance(batch, int) else 1
    errors = PreprocessingErrors()
    for picture in [each for each in pictures if each.dtype == np.uint8][:_MOST_IMAGES]:
        ours = to_input([resize_image(picture, rule)] * count, rule)
        theirs = torch.from_numpy(session.run(None, {"image": np.stack([picture] * count)})[0])
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise CheckFailed(
                f"preprocessing gives {theirs.dtype} {list(theirs.shape)}, "
                f"not {ours.dtype} {list(ours.shape)}"
            )
        off = _levels(ours, theirs, rule)
        errors.largest = max(errors.largest, off.max().item())
        errors.mean += off.mean().item()
        errors.images += 1
        if runtime.spec.graph != "detector":
            others = named_examples(runtime.spec, count, *ours.shape[2:])
            wanted, found = (runtime(**(others | {"images": images})) for images in (ours, theirs))
            for name, values in wanted.items():
                if values.is_floating_point():
                    relative = relative_error(values, values - found[name])
                    errors.relative = max(errors.relative, relative)
    if not errors.images:
        raise BadInput(
            "--triton-preprocess: takes images of 8 bits; none of the verification images has them"
        )
    errors.mean /= errors.images
    if errors.largest > _MOST_LEVELS or errors.mean > _MEAN_LEVELS or errors.relative > _MOST_RELATIVE:
        raise CheckFailed(
            f"{errors}; at most {_MOST_LEVELS}, {_MEAN_LEVELS} and {_MOST_RELATIVE} are allowed"
        )
    return errors


def _levels(ours: Tensor, theirs: Tensor, rule: Preprocessing) -> Tensor:
    off = (ours.float() - theirs.float()).abs()
    return off if rule.normalize_in_graph else off * torch.tensor(rule.std).view(-1, 1, 1) * 255
