"""Types of 8 bits: what their numbers are, and the scale that makes values fit them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Codes:
    """A type of 8 bits, used symmetrically around zero."""

    name: str
    dtype: np.dtype
    largest: float
    """The number that the largest magnitude becomes."""

    def scale(self, amax: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """What the number 1 stands for, in `dtype`: 1 where all is zero, and never zero itself."""
        least = float(np.finfo(dtype).tiny)
        scale = np.asarray(amax, np.float64) / self.largest
        return np.where(scale > 0, np.maximum(scale, least), 1.0).astype(dtype)

    def encode(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The nearest numbers, ties to even; what lies beyond the largest becomes the largest."""
        scaled = values.astype(np.float32) / scale.astype(np.float32)
        if np.issubdtype(self.dtype, np.integer):
            scaled = np.rint(scaled)
        return np.clip(scaled, -self.largest, self.largest).astype(self.dtype)


INT8 = Codes("int8", np.dtype(np.int8), 127.0)


def fp8_codes() -> Codes:
    """E4M3FN: -448 to 448, three bits of mantissa, no infinity (Micikevicius et al. 2022, table 1)."""
    import ml_dtypes  # onnx brings it

    return Codes("fp8", np.dtype(ml_dtypes.float8_e4m3fn), 448.0)
