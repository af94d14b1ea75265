"""Optimization profiles: the shape ranges of an engine, chosen at build time and checked at every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coma.errors import BadInput
from coma.runtimes.model_spec import ModelSpec, TensorSpec
from coma.runtimes.shape_ranges import Shapes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeRange:
    """Range of shapes of one input; the engine is fastest at `optimum`."""

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __contains__(self, shape: Shape) -> bool:
        """Whether the engine takes a shape."""
        return len(shape) == len(self.minimum) and all(
            low <= size <= high for low, size, high in zip(self.minimum, shape, self.maximum, strict=True)
        )

    def __str__(self) -> str:
        return f"{written(self.minimum)} to {written(self.maximum)}"


@dataclass(frozen=True)
class Profile:
    """One optimization profile: shape ranges by input. An engine may have several."""

    shapes: dict[str, ShapeRange]

    def __str__(self) -> str:
        return ", ".join(f"{name} {shapes}" for name, shapes in self.shapes.items())


def written(shape: Sequence[int]) -> str:
    """Returns a shape as text, such as 1x3x224x224."""
    return "x".join(map(str, shape))


def profile_of(spec: ModelSpec, shapes: Shapes) -> Profile:
    """Returns the profile of a model for shapes of images and the masks that belong to them.

    Raises:
        BadInput: an input has an axis whose size does not follow from the images.
    """
    axes: dict[str, list[int]] = {}
    for shape in (shapes.min, shapes.opt, shapes.max):
        sizes = {"batch": shape.batch, "height": shape.height, "width": shape.width}
        sizes["rows"] = -(-shape.height // spec.unit)
        sizes["cols"] = -(-shape.width // spec.unit)
        for axis, size in sizes.items():
            axes.setdefault(axis, []).append(size)
    return make_profile(spec.inputs, {axis: (s[0], s[1], s[2]) for axis, s in axes.items()})


def make_profile(inputs: Sequence[TensorSpec], axes: Mapping[str, tuple[int, int, int]]) -> Profile:
    """Returns the profile of inputs for sizes of their dynamic axes.

    Args:
        inputs: Inputs of the model.
        axes: Minimum, optimal and maximum size of every dynamic axis: {"batch": (1, 8, 32)}.

    Raises:
        BadInput: an axis is missing, or its sizes are not in ascending order.
    """
    for axis, sizes in axes.items():
        if not 0 < sizes[0] <= sizes[1] <= sizes[2]:
            raise BadInput(f"axis {axis}: {sizes} must be min, opt and max in ascending order")
    missing = {
        axis
        for tensor_spec in inputs
        for axis in tensor_spec.axes
        if isinstance(axis, str) and axis not in axes
    }
    if missing:
        raise BadInput(f"the engine needs sizes of the axes {', '.join(sorted(missing))}")

    def shape(tensor: TensorSpec, which: int) -> Shape:
        return tuple(axis if isinstance(axis, int) else axes[axis][which] for axis in tensor.axes)

    return Profile(
        {
            tensor_spec.name: ShapeRange(shape(tensor_spec, 0), shape(tensor_spec, 1), shape(tensor_spec, 2))
            for tensor_spec in inputs
        }
    )


def check_profiles(profiles: Sequence[Profile], inputs: Mapping[str, Shape], source: str) -> None:
    """Checks that every profile fits the inputs of the graph, before a build that may take minutes.

    Args:
        profiles: The profiles.
        inputs: Shapes of the graph's inputs by name, with -1 for dynamic axes.
        source: Name of the graph for messages.

    Raises:
        BadInput: a profile does not fit; the message names the input and both shapes.
    """
    if not profiles and any(size < 0 for shape in inputs.values() for size in shape):
        raise BadInput(f"{source}: has dynamic shapes, so the engine needs a profile")
    for profile in profiles:
        if set(profile.shapes) != set(inputs):
            raise BadInput(f"{source}: takes {sorted(inputs)}, but a profile has {sorted(profile.shapes)}")
        for name, shapes in profile.shapes.items():
            for shape in (shapes.minimum, shapes.optimum, shapes.maximum):
                fixed = len(shape) == len(inputs[name]) and all(
                    size == free or free < 0 for size, free in zip(shape, inputs[name], strict=True)
                )
                if not fixed or shape not in shapes:
                    raise BadInput(
                        f"{source}: input {name} {written(inputs[name])} (-1: dynamic) cannot be "
                        f"{written(shape)} in a profile of {shapes}"
                    )


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """Returns the number of the first profile that takes the shapes of these inputs.

    Raises:
        BadInput: no profile takes them; the message lists the profiles.
    """
    for number, profile in enumerate(profiles):
        if all(shapes[name] in allowed for name, allowed in profile.shapes.items()):
            return number
    given = ", ".join(f"{name} {written(shape)}" for name, shape in shapes.items())
    taken = "; or ".join(map(str, profiles))
    raise BadInput(f"{given}: the engine takes {taken}. Resize, or build an engine with a wider profile")
