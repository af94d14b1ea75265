"""Parity of an exported file with PyTorch on images, at several batch sizes and image sizes.

Both sides start from the same decoded images. PyTorch gets them preprocessed as the artifact specifies, the
file as the file specifies, so the comparison covers the whole way from pixels to outputs, normalisation
included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coma.errors import BadInput, ComaError
from coma.library_errors import library_errors
from coma.masking.patchify import unit_grid
from coma.runtimes.base import Runtime
from coma.runtimes.model_spec import ModelSpec
from coma.runtimes.preprocessing import resize_image, to_input
from coma.runtimes.shape_ranges import Shape, Shapes
from export.verify.errors import OutputError, OutputErrors, split_pixels
from export.verify.tolerances import TOLERANCES

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ParityResult:
    """Result of a verification.

    Attributes:
        shapes: Shapes at which the file ran.
        images: Number of different images.
        outputs: Errors of the outputs by name.
        failures: Reasons for which the file is rejected; empty if it passed.
    """

    shapes: tuple[Shape, ...]
    images: int
    outputs: dict[str, OutputError]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the file passed."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Returns the values for JSON."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "images": self.images,
            "shapes": [str(shape) for shape in self.shapes],
            "outputs": {
                name: {
                    "cosine": each.cosine if each.compared or not each.finite else None,
                    "relative": each.relative if each.finite else None,
                    "max": each.max if each.finite else None,
                    "mean": each.mean if each.finite else None,
                    "p99.9": each.p99_9 if each.finite else None,
                    "agreement": each.agreement,
                }
                for name, each in self.outputs.items()
            },
        }


def shapes_to_run(shapes: Shapes, unit: int) -> tuple[Shape, ...]:
    """Returns the shapes to verify: small, optimal and maximum batches; minimum, maximum and odd sizes."""
    opt = shapes.opt
    odd = (opt.height + unit // 2 + 1, max(opt.width - 5, unit))
    sizes = [(s.height, s.width) for s in (opt, shapes.min, shapes.max)]
    wanted = [Shape(batch, *sizes[0]) for batch in (1, 2, opt.batch, shapes.max.batch)]
    odds = [odd, (odd[1], odd[0])]
    if not any(shapes.allows(Shape(shapes.min.batch, *size)) for size in odds):  # none is larger
        below = (max(opt.height - unit // 2 - 1, unit), max(opt.width - 5, unit))
        odds = [below, (below[1], below[0])]
    wanted += [Shape(shapes.min.batch, *size) for size in (*sizes, *odds)]
    return tuple(shape for shape in dict.fromkeys(wanted) if shapes.allows(shape))


def verify(
    reference: Runtime,
    runtime: Runtime,
    shapes: Shapes,
    pictures: Sequence[np.ndarray],
    progress: Progress | None = None,
) -> ParityResult:
    """Runs both and compares their outputs image by image.

    Args:
        reference: PyTorch in fp32.
        runtime: Runtime of the exported file.
        shapes: Shapes that the file takes.
        pictures: Decoded images `[H, W, c]`.
        progress: Receives the number of finished shapes and their total.
    """
    spec = runtime.spec
    differences = OutputErrors()
    failures: list[str] = []
    seen: set[int] = set()
    run = shapes_to_run(shapes, spec.unit)
    wanted = _Reference(reference, pictures, max(shape.batch for shape in run))
    for number, shape in enumerate(run):
        numbers = [i % len(pictures) for i in range(max(shape.batch, 1))]
        batches = [numbers]
        if shape.batch < len(pictures) and number == 0:  # all images once, at the optimal size
            starts = range(0, len(pictures), shape.batch)
            batches = [[i % len(pictures) for i in range(start, start + shape.batch)] for start in starts]
        for batch in batches:
            seen.update(batch)
            try:
                with library_errors(runtime.title):
                    _compare(runtime, wanted, batch, shape, pictures, differences)
            except ComaError as error:
                failures.append(f"cannot be run at {shape}: {error}")
                break
        if progress:
            progress(number + 1, len(run))
    failures += find_failures(differences.outputs, spec)
    return ParityResult(run, len(seen), differences.outputs, tuple(failures))


def find_failures(outputs: dict[str, OutputError], spec: ModelSpec) -> list[str]:
    """Returns the errors that exceed the tolerances of the precision; NaN always does."""
    limits = TOLERANCES[spec.precision]
    failures = []
    for name, each in outputs.items():
        if not each.finite:
            failures.append(f"{name} holds NaN or infinite values")
        elif not (each.compared or each.counted) and spec.graph != "detector":
            failures.append(f"{name}: no values to compare; give larger or more images")
        elif each.compared and not each.largest:
            failures.append(f"{name} is zero everywhere, in PyTorch too, so the comparison is empty")
        elif each.compared and each.cosine < limits.cosine:
            failures.append(f"{name}: cosine {each.cosine:.6f} is below {limits.cosine}")
        elif each.compared and each.relative > limits.relative:
            failures.append(f"{name}: relative error {each.relative:.4f} is above {limits.relative:.4f}")
        agreement, least = each.agreement, limits.found if name == "labels" else limits.agreement
        if agreement is not None and agreement < least:
            failures.append(f"{name}: {agreement:.2%} agree, fewer than {least:.2%}")
    if spec.graph == "detector" and not outputs["labels"].counted:
        failures.append("PyTorch detected nothing; give images that show objects")
    return failures


class _Reference:
    """PyTorch's outputs for each image and size, computed once.

    It caches the outputs of the first `again` images at the current size; later batches use no others.
    """

    def __init__(self, runtime: Runtime, pictures: Sequence[np.ndarray], again: int) -> None:
        self.runtime = runtime
        self.pictures = pictures
        self.again = again
        self._size = (0, 0)
        self._known: dict[int, dict[str, Tensor]] = {}

    def __call__(self, number: int, height: int, width: int) -> dict[str, Tensor]:
        """Returns the outputs of one image, without a batch axis, on the CPU."""
        if self._size != (height, width):
            self._size, self._known = (height, width), {}
        if number in self._known:
            return self._known[number]
        rule = self.runtime.spec.preprocessing
        images = to_input([resize_image(self.pictures[number], rule, (height, width))], rule)
        others = _others(self.runtime.spec, [number], height, width)
        outputs = {name: each[0].cpu() for name, each in self.runtime(images, **others).items()}
        if number < self.again:
            self._known[number] = outputs
        return outputs


def _compare(
    runtime: Runtime,
    wanted: _Reference,
    numbers: Sequence[int],
    shape: Shape,
    pictures: Sequence[np.ndarray],
    differences: OutputErrors,
) -> None:
    spec = runtime.spec
    height, width = shape.height, shape.width
    rule = spec.preprocessing
    images = to_input([resize_image(pictures[i], rule, (height, width)) for i in numbers], rule)
    others = _others(spec, numbers, height, width)
    found = {k: v.cpu() for k, v in runtime(images, **others).items()}
    for place, number in enumerate(numbers):
        ours = wanted(number, height, width)
        _check_outputs(ours, found, len(numbers))
        theirs = {name: found[name][place] for name in ours}
        if spec.graph == "reconstructor":
            if rule.normalize_in_graph:  # normalises again, because the mean dominates pixel values
                mean, std = (255 * torch.tensor(v).view(-1, 1, 1) for v in (rule.mean, rule.std))
                theirs = {name: (values - mean) / std for name, values in theirs.items()}
            visible = others["visible"][place]
            ours, theirs = (_hidden_and_visible(each, visible, spec.unit) for each in (ours, theirs))
        differences.add(ours, theirs)


def _check_outputs(wanted: dict[str, Tensor], found: dict[str, Tensor], batch: int) -> None:
    """Refuses outputs that are missing, or whose shape or type differs from PyTorch's."""
    for name, values in wanted.items():
        if name not in found:
            raise BadInput(f"output {name} is missing")
        expected = ((batch, *values.shape), values.dtype)
        if (tuple(found[name].shape), found[name].dtype) != expected:
            raise BadInput(
                f"{name} is {found[name].dtype} {list(found[name].shape)}, PyTorch's {expected[1]} "
                f"{list(expected[0])}"
            )


def _hidden_and_visible(outputs: dict[str, Tensor], visible: Tensor, unit: int) -> dict[str, Tensor]:
    """Splits a reconstruction into hidden units and visible ones, which would mask errors of the former."""
    parts = {}
    for name, values in outputs.items():
        parts[name], parts[f"{name} of visible units"] = split_pixels(values, visible, unit)
    return parts


def _others(spec: ModelSpec, numbers: Sequence[int], height: int, width: int) -> dict[str, Tensor]:
    """Returns the mask of a reconstructor, with half of the units visible; the image number is the seed."""
    if spec.graph != "reconstructor":
        return {}
    rows, cols = unit_grid(height, width, spec.unit)
    maps = []
    for number in numbers:
        order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(number))
        maps.append((order < max(rows * cols // 2, 1)).view(rows, cols))
    return {"visible": torch.stack(maps)}
