"""Result of a verification: errors at every shape, and what exceeds the tolerances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coma.runtimes.model_spec import GraphKind
from coma.runtimes.shape_ranges import Shape
from export.verify.errors import OutputError, OutputErrors
from export.verify.tolerances import SELECTION, Tolerance


@dataclass(frozen=True)
class ParityResult:
    """Result of a verification.

    Attributes:
        images: Number of different images.
        errors: Errors at every shape that was run.
        failures: Reasons for a rejection.
    """

    images: int
    errors: Mapping[Shape, OutputErrors]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the file passed."""
        return not self.failures

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes that were run."""
        return tuple(self.errors)

    @property
    def outputs(self) -> dict[str, OutputError]:
        """Errors of all outputs over all shapes."""
        return merged(self.errors).outputs

    def to_dict(self) -> dict[str, Any]:
        """Returns the values for JSON."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "images": self.images,
            "shapes": [str(shape) for shape in self.shapes],
            "outputs": {name: _as_plain(each) for name, each in self.outputs.items()},
            "by_shape": {
                str(shape): {name: _as_plain(each) for name, each in errors.outputs.items()}
                for shape, errors in self.errors.items()
            },
        }


def merged(errors: Mapping[Shape, OutputErrors]) -> OutputErrors:
    """Returns the errors over all shapes."""
    total = OutputErrors()
    for each in errors.values():
        total.merge(each)
    return total


def worst_shape(errors: Mapping[Shape, OutputErrors], name: str | None = None) -> Shape:
    """Returns the shape with the largest error of an output, or of any output."""

    def size(shape: Shape) -> tuple[float, float]:
        outputs = errors[shape].outputs
        return max((each.size for key, each in outputs.items() if name in (None, key)), default=(-1.0, 0.0))

    return max(errors, key=size)


def _as_plain(error: OutputError) -> dict[str, float | None]:
    names = {"relative": "relative", "max": "max", "mean": "mean", "p99.9": "p99_9"}
    plain = {
        name: getattr(error, attribute) if error.finite and error.compared else None
        for name, attribute in names.items()
    }
    return {
        "cosine": error.cosine if error.compared or not error.finite else None,
        **plain,
        "agreement": error.agreement,
    }


def find_failures(errors: Mapping[Shape, OutputErrors], graph: GraphKind, tolerance: Tolerance) -> list[str]:
    """Returns the errors that exceed the tolerances, with the shape of the worst; NaN always does."""
    outputs = merged(errors).outputs
    failures = []
    for name, each in outputs.items():
        fault = _fault(name, each, tolerance)
        if not (each.compared or each.counted or not each.finite) and graph != "detector":
            failures.append(f"{name}: no values to compare; give larger or more images")
        elif fault:
            failures.append(f"{name}{fault} (at {worst_shape(errors, name)})")
    if graph == "detector" and errors:
        counted = [each.counted for name, each in outputs.items() if name.startswith("labels")]
        if not any(counted):
            failures.append("PyTorch detected nothing; give images that show objects")
    return failures


def _fault(name: str, error: OutputError, tolerance: Tolerance) -> str | None:
    """Returns what is wrong with one output."""
    limits = SELECTION if error.role == "selection" else tolerance
    relative = limits.relative if error.role == "output" else limits.matched
    least = limits.agreement
    if error.role != "output":
        least = limits.faint if "below" in name else limits.found
    if not error.finite:
        return " holds NaN or infinite values"
    if error.compared and not error.largest:
        return " is zero everywhere, in PyTorch too, so the comparison is empty"
    if error.compared and error.cosine < limits.cosine:
        return f": cosine {error.cosine:.6f} is below {limits.cosine}"
    if error.compared and error.relative > relative:
        return f": relative error {error.relative:.2g} is above {relative:g}"
    if error.agreement is not None and error.agreement < least:
        return f": {error.agreement:.2%} agree, fewer than {least:.2%}"
    return None
