"""Parity of an exported file with PyTorch on images, at several batch sizes and image sizes.

Both sides start from the same decoded images. PyTorch gets them preprocessed as the artifact specifies, the
file as the file specifies, so the comparison covers the whole way from pixels to outputs, normalisation
included. Rounding decides what a detector selects, so its steps are compared one by one as well, each from
the values that the file itself computed before (see `export.graphs.detector.Steps`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coma.errors import BadInput, ComaError
from coma.library_errors import library_errors
from coma.masking.patchify import mask_of, unit_grid
from coma.runtimes.base import Runtime
from coma.runtimes.model_spec import ModelSpec
from coma.runtimes.preprocessing import resize_image, to_input
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shape, Shapes
from export.graphs.detector import OUTPUTS, Detector
from export.onnx_export import RECORDED
from export.verify.description import description_fault
from export.verify.detections import add_detections
from export.verify.errors import OutputErrors, split_pixels
from export.verify.shapes import shapes_to_run
from export.verify.tolerances import TOLERANCES, Tolerance
from export.verify.verdict import ParityResult, find_failures

Progress = Callable[[int, int], None]
Outputs = dict[str, Tensor]


def verify(
    reference: TorchRuntime,
    runtime: Runtime,
    shapes: Shapes,
    pictures: Sequence[np.ndarray],
    *,
    expected: ModelSpec | None = None,
    steps: Runtime | None = None,
    tolerance: Tolerance | None = None,
    progress: Progress | None = None,
) -> ParityResult:
    """Runs both and compares their outputs image by image.

    The first batch runs three times: twice in a row, which shows outputs that are not deterministic, and
    after all other shapes, which shows a state that stays from one run to the next.

    Args:
        reference: PyTorch in fp32.
        runtime: Runtime of the exported file.
        shapes: Shapes that the file takes.
        pictures: Decoded images `[H, W, c]`.
        expected: Description that the file must hold; None does not check it.
        steps: Runtime of a detector's file that also returns the steps that it records.
        tolerance: Tolerances; by default those of the precision on a CPU.
        progress: Receives the number of finished shapes and their total.
    """
    spec = runtime.spec
    tolerance = tolerance or TOLERANCES[spec.precision]
    fault = description_fault(expected, spec) if expected else None
    if fault:
        return ParityResult(0, {}, (fault,))
    run = shapes_to_run(shapes, spec.unit)
    comparison = _Comparison(reference, runtime, steps, pictures, max(shape.batch for shape in run))
    failures: list[str] = []
    for number, shape in enumerate(run):
        try:
            with library_errors(runtime.title):
                comparison.run(shape, all_pictures=number == 0)
        except ComaError as error:
            failures.append(f"cannot be run at {shape}: {error}")
        if progress:
            progress(number + 1, len(run))
    if not failures:
        with library_errors(runtime.title):
            failures += comparison.repeat(run[0], tolerance)
    failures += find_failures(comparison.errors, spec.graph, tolerance)
    return ParityResult(len(comparison.seen), comparison.errors, tuple(failures))


def batch_inputs(
    spec: ModelSpec, pictures: Sequence[np.ndarray], numbers: Sequence[int], height: int, width: int
) -> Outputs:
    """Returns the inputs of a model for some of the pictures, by name.

    A mask shows half of the units, a list as many as it holds; the number of a picture is the seed.
    """
    rule = spec.preprocessing
    images = to_input([resize_image(pictures[i], rule, (height, width)) for i in numbers], rule)
    if len(spec.inputs) == 1:
        return {"images": images}
    rows, cols = unit_grid(height, width, spec.unit)
    orders = torch.stack(
        [torch.randperm(rows * cols, generator=torch.Generator().manual_seed(number)) for number in numbers]
    )
    if spec.visible_units:
        return {"images": images, "visible": orders[:, : spec.visible_units].contiguous()}
    return {"images": images, "visible": (orders < max(rows * cols // 2, 1)).unflatten(1, (rows, cols))}


@dataclass
class _Comparison:
    """Compares a file with PyTorch shape by shape.

    Attributes:
        again: Number of pictures whose PyTorch outputs stay cached at the current size: later batches use
            no others.
        errors: Errors at every shape so far.
        seen: Numbers of the pictures so far.
    """

    reference: TorchRuntime
    runtime: Runtime
    steps: Runtime | None
    pictures: Sequence[np.ndarray]
    again: int
    errors: dict[Shape, OutputErrors] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    _first: Outputs = field(default_factory=dict)
    _size: tuple[int, int] = (0, 0)
    _known: dict[int, Outputs] = field(default_factory=dict)

    def run(self, shape: Shape, *, all_pictures: bool) -> None:
        """Runs one batch of a shape, or as many as show all pictures."""
        new_size = (shape.height, shape.width) not in [(s.height, s.width) for s in self.errors]
        errors = self.errors.setdefault(shape, OutputErrors())
        for start in range(0, len(self.pictures) if all_pictures else 1, shape.batch):
            numbers = self._numbers(shape, start)
            inputs, found = self._run_file(numbers, shape)
            self._first = self._first or found
            self._compare(numbers, shape, inputs, found, errors)
            self.seen.update(numbers)
        if self.steps and new_size:
            self._compare_steps(self.steps, self._numbers(shape), shape, errors)

    def repeat(self, shape: Shape, tolerance: Tolerance) -> list[str]:
        """Runs the first batch of a shape twice more and returns what differs from one run to another."""
        numbers = self._numbers(shape)
        (inputs, again), (_, twice) = (self._run_file(numbers, shape) for _ in range(2))
        failures = []
        for one, other, when in ((self._first, again, "after other runs"), (again, twice, "in two runs")):
            changed = [name for name in one if not _equal(one[name], other[name])]
            if changed and one[changed[0]].device.type != "cpu":  # a GPU may add up in another order
                errors = OutputErrors()
                for place in range(shape.batch):
                    self._add(inputs, _image(one, place), _image(other, place), place, errors)
                changed = find_failures({shape: errors}, self.runtime.spec.graph, tolerance)
            if changed:
                failures.append(f"the same input gives other results {when}: {', '.join(changed)}")
        return failures

    def _numbers(self, shape: Shape, start: int = 0) -> list[int]:
        return [i % len(self.pictures) for i in range(start, start + shape.batch)]

    def _run_file(self, numbers: Sequence[int], shape: Shape) -> tuple[Outputs, Outputs]:
        """Returns inputs and outputs of the file for a batch."""
        inputs = batch_inputs(self.runtime.spec, self.pictures, numbers, shape.height, shape.width)
        return inputs, self.runtime(**inputs)

    def _run_reference(self, number: int, height: int, width: int) -> Outputs:
        """Returns PyTorch's outputs for one picture, without a batch axis, on the CPU."""
        if self._size != (height, width):
            self._size, self._known = (height, width), {}
        if number in self._known:
            return self._known[number]
        inputs = batch_inputs(self.reference.spec, self.pictures, [number], height, width)
        outputs = {name: each[0].cpu() for name, each in self.reference(**inputs).items()}
        if number < self.again:
            self._known[number] = outputs
        return outputs

    def _compare(
        self, numbers: Sequence[int], shape: Shape, inputs: Outputs, found: Outputs, errors: OutputErrors
    ) -> None:
        on_cpu = {name: value.cpu() for name, value in found.items()}
        for place, number in enumerate(numbers):
            ours = self._run_reference(number, shape.height, shape.width)
            _check_outputs(ours, on_cpu, len(numbers))
            self._add(inputs, ours, {name: on_cpu[name][place] for name in ours}, place, errors)

    def _add(self, inputs: Outputs, ours: Outputs, theirs: Outputs, place: int, errors: OutputErrors) -> None:
        """Adds the outputs of one image at a place of the batch."""
        spec = self.runtime.spec
        if spec.graph == "detector":
            add_detections(errors, ours, theirs, "detections")
            return
        if spec.graph == "reconstructor":
            visible = inputs["visible"][place]
            if spec.visible_units:
                _, _, height, width = inputs["images"].shape
                visible = mask_of(visible, *unit_grid(height, width, spec.unit))
            if spec.preprocessing.normalize_in_graph:  # normalises again: the mean dominates pixel values
                theirs = _normalized(theirs, spec)
            ours, theirs = (_hidden_and_visible(each, visible, spec.unit) for each in (ours, theirs))
        errors.add(ours, theirs)
        if spec.graph == "segmentor":
            chosen = theirs["logits"].gather(0, theirs["classes"].clamp(0, len(theirs["logits"]) - 1)[None])
            best = chosen[0] == theirs["logits"].amax(0)
            errors.of("classes of the file's logits", "selection").count(int(best.sum()), best.numel())

    def _compare_steps(
        self, runtime: Runtime, numbers: Sequence[int], shape: Shape, errors: OutputErrors
    ) -> None:
        """Compares the steps of a detector, each computed by PyTorch from the file's own values."""
        ours, theirs = (
            batch_inputs(spec, self.pictures, numbers, shape.height, shape.width)["images"]
            for spec in (self.reference.spec, runtime.spec)
        )
        given = {name.removeprefix(RECORDED): v.cpu() for name, v in runtime(theirs).items()}
        given = {name: v.float() if v.is_floating_point() else v for name, v in given.items()}
        module = self.reference.module
        if not isinstance(module, Detector) or not set(module.step_names()) <= given.keys():
            raise BadInput("the file records no steps to compare; export it again")
        with torch.inference_mode():
            wanted = module.steps(ours.to(self.reference.device), given)
        for place in range(len(numbers)):
            add_steps(errors, _image(wanted, place), _image(given, place))


def add_steps(errors: OutputErrors, wanted: Outputs, found: Outputs) -> None:
    """Adds the steps of a detector on one image; `raw` outputs are continuous, others were selected."""
    add_detections(errors, wanted, found, "selection", "selected ")
    if "proposals" in wanted:
        ours, theirs = (
            {"boxes": x["proposals"], "scores": x["proposal_odds"], "labels": (x["proposal_odds"] > 0).long()}
            for x in (wanted, found)
        )
        add_detections(errors, ours, theirs, "selection", "proposed ")
    for name, values in wanted.items():
        if name not in (*OUTPUTS, "proposals", "proposal_odds"):
            kind, used = name.partition("/")[0], _used(name, found)
            errors.of(f"raw {kind}").add(values[used], found[name][used])


def _used(name: str, found: Outputs) -> Tensor | slice:
    """Returns which rows of a raw output belong to a proposal or a detection; nothing uses the others.

    Pooling an empty region is 0 / 0 for OpenVINO where the number of samples follows from its size.
    """
    of = {
        "logits": "proposal_odds",
        "deltas": "proposal_odds",
        "refined": "proposal_odds",
        "mask_logits": "scores",
    }
    filled = found.get(of.get(name.partition("/")[0], "")) if "proposals" in found else None
    return slice(None) if filled is None else filled > 0


def _image(outputs: Mapping[str, Tensor], place: int) -> Outputs:
    """Returns the outputs of one image of a batch, on the CPU."""
    return {name: values[place].cpu() for name, values in outputs.items()}


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())  # NaN is reported elsewhere


def _normalized(outputs: Outputs, spec: ModelSpec) -> Outputs:
    rule = spec.preprocessing
    mean, std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (rule.mean, rule.std))
    return {name: (values - mean) / std for name, values in outputs.items()}


def _check_outputs(wanted: Outputs, found: Outputs, batch: int) -> None:
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


def _hidden_and_visible(outputs: Outputs, visible: Tensor, unit: int) -> Outputs:
    """Splits a reconstruction into hidden units and visible ones, which would mask errors of the former."""
    parts = {}
    for name, values in outputs.items():
        parts[name], parts[f"{name} of visible units"] = split_pixels(values, visible, unit)
    return parts
