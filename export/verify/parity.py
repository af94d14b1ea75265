"""The gate: a runtime against PyTorch, on images, at several sizes and batches.

Both sides start from the same decoded images. PyTorch sees them prepared as its artifact says, the file as
the file says: what is compared is the whole way from pixels to outputs, mean and deviation included.
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
from coma.runtimes.shape_ranges import Shape, Shapes
from export.preprocessing import as_input, resized
from export.verify.errors import Difference, Differences, split_pixels
from export.verify.tolerances import TOLERANCES

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ParityResult:
    """What the gate found.

    Attributes:
        shapes: At which the file was run.
        images: How many different ones.
        outputs: How far apart the outputs were, by name.
        failures: Why the file is refused; empty where it passed.
    """

    shapes: tuple[Shape, ...]
    images: int
    outputs: dict[str, Difference]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Nothing failed."""
        return not self.failures

    def plain(self) -> dict[str, Any]:
        """For JSON."""
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
    """Batches of 1, 2, the usual and the most; least, opt, largest and odd sizes: all that are allowed."""
    opt = shapes.opt
    odd = (opt.height + unit // 2 + 1, max(opt.width - 5, unit))
    sizes = [(s.height, s.width) for s in (opt, shapes.min, shapes.max)]
    wanted = [Shape(batch, *sizes[0]) for batch in (1, 2, opt.batch, shapes.max.batch)]
    odds = [odd, (odd[1], odd[0])]
    if not any(shapes.allows(Shape(shapes.min.batch, *size)) for size in odds):  # nothing beyond the usual
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
    """Run both and compare, image by image.

    Args:
        reference: PyTorch, fp32.
        runtime: What was exported.
        shapes: What it was exported for.
        pictures: Decoded images `[H, W, c]`.
        progress: Told how many shapes of how many are done.
    """
    spec = runtime.spec
    differences = Differences()
    failures: list[str] = []
    seen: set[int] = set()
    run = shapes_to_run(shapes, spec.unit)
    wanted = _Reference(reference, pictures, max(shape.batch for shape in run))
    for number, shape in enumerate(run):
        numbers = [i % len(pictures) for i in range(max(shape.batch, 1))]
        batches = [numbers]
        if shape.batch < len(pictures) and number == 0:  # once, at the usual size: all images
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
    failures += judge(differences.outputs, spec)
    return ParityResult(run, len(seen), differences.outputs, tuple(failures))


def judge(outputs: dict[str, Difference], spec: ModelSpec) -> list[str]:
    """What is beyond the limits of the file's precision; NaN always is."""
    gate = TOLERANCES[spec.precision]
    failures = []
    for name, each in outputs.items():
        if not each.finite:
            failures.append(f"{name} holds NaN or infinite values")
        elif not (each.compared or each.counted) and spec.graph != "detector":
            failures.append(f"{name}: there was nothing to compare; give larger or more images")
        elif each.compared and not each.largest:
            failures.append(f"{name} is zero everywhere, in PyTorch too: that compares nothing")
        elif each.compared and each.cosine < gate.cosine:
            failures.append(f"{name}: cosine {each.cosine:.6f} is below {gate.cosine}")
        elif each.compared and each.relative > gate.relative:
            failures.append(f"{name}: relative error {each.relative:.4f} is above {gate.relative:.4f}")
        agreement, least = each.agreement, gate.found if name == "labels" else gate.agreement
        if agreement is not None and agreement < least:
            failures.append(f"{name}: {agreement:.2%} agree, fewer than {least:.2%}")
    if spec.graph == "detector" and not outputs["labels"].counted:
        failures.append("nothing was detected by PyTorch: give images with something to detect")
    return failures


class _Reference:
    """PyTorch's outputs for each image and size, computed once.

    Kept are those of the size that is being run, of the first `again` images: later batches hold no others.
    """

    def __init__(self, runtime: Runtime, pictures: Sequence[np.ndarray], again: int) -> None:
        self.runtime = runtime
        self.pictures = pictures
        self.again = again
        self._size = (0, 0)
        self._known: dict[int, dict[str, Tensor]] = {}

    def __call__(self, number: int, height: int, width: int) -> dict[str, Tensor]:
        """Outputs of one image, without a batch axis, on the CPU."""
        if self._size != (height, width):
            self._size, self._known = (height, width), {}
        if number in self._known:
            return self._known[number]
        rule = self.runtime.spec.preprocessing
        images = as_input([resized(self.pictures[number], rule, (height, width))], rule)
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
    differences: Differences,
) -> None:
    spec = runtime.spec
    height, width = shape.height, shape.width
    rule = spec.preprocessing
    images = as_input([resized(pictures[i], rule, (height, width)) for i in numbers], rule)
    others = _others(spec, numbers, height, width)
    found = {k: v.cpu() for k, v in runtime(images, **others).items()}
    for place, number in enumerate(numbers):
        ours = wanted(number, height, width)
        _check_outputs(ours, found, len(numbers))
        theirs = {name: found[name][place] for name in ours}
        if spec.graph == "reconstructor":
            if rule.normalize_in_graph:  # normalised again: of pixels, their mean is most
                mean, std = (255 * torch.tensor(v).view(-1, 1, 1) for v in (rule.mean, rule.std))
                theirs = {name: (values - mean) / std for name, values in theirs.items()}
            visible = others["visible"][place]
            ours, theirs = (_hidden_and_visible(each, visible, spec.unit) for each in (ours, theirs))
        differences.add(ours, theirs)


def _check_outputs(wanted: dict[str, Tensor], found: dict[str, Tensor], batch: int) -> None:
    """Refuse outputs that are not there, or of another size or type than PyTorch's of one image."""
    for name, values in wanted.items():
        if name not in found:
            raise BadInput(f"it gives no {name}")
        expected = ((batch, *values.shape), values.dtype)
        if (tuple(found[name].shape), found[name].dtype) != expected:
            raise BadInput(
                f"{name} is {found[name].dtype} {list(found[name].shape)}, PyTorch's {expected[1]} "
                f"{list(expected[0])}"
            )


def _hidden_and_visible(outputs: dict[str, Tensor], visible: Tensor, unit: int) -> dict[str, Tensor]:
    """A reconstruction in two: what was hidden, and the rest, which would drown its errors."""
    parts = {}
    for name, values in outputs.items():
        parts[name], parts[f"{name} of visible units"] = split_pixels(values, visible, unit)
    return parts


def _others(spec: ModelSpec, numbers: Sequence[int], height: int, width: int) -> dict[str, Tensor]:
    """What a reconstructor needs beside images: which units are visible, half of them, by the number."""
    if spec.graph != "reconstructor":
        return {}
    rows, cols = unit_grid(height, width, spec.unit)
    maps = []
    for number in numbers:
        order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(number))
        maps.append((order < max(rows * cols // 2, 1)).view(rows, cols))
    return {"visible": torch.stack(maps)}
