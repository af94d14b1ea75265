"""One interface over PyTorch, ONNX Runtime, OpenVINO and TensorRT; heavy packages are imported on use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coma.runtimes.open import open_runtime

__all__ = ["open_runtime"]


def __getattr__(name: str) -> Any:
    """Imports `open_runtime` when it is first used."""
    if name == "open_runtime":
        from coma.runtimes.open import open_runtime

        return open_runtime
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
