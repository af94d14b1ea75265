"""Loads images for OpenMMLab's pipelines as in pre-training: any format, bit depth and number of channels.

OpenMMLab's own `LoadImageFromFile` loads 8-bit colour with OpenCV.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from coma.data.channels import convert_channels, scale_to_unit
from coma.data.decode import decode
from coma.errors import BadImage


@TRANSFORMS.register_module()
class ReadImage(BaseTransform):
    """Loads the file at `img_path` to `img`, `[H, W, channels]`: uint8, or float32 scaled to 0..255.

    Three channels are in BGR order and always uint8, as OpenMMLab's colour distortions expect.

    Args:
        channels: Channels of the model's input.
    """

    def __init__(self, channels: int = 3) -> None:
        self.channels = channels

    def transform(self, results: dict[str, Any] | str | np.ndarray) -> dict[str, Any]:
        """Adds `img`, `img_shape` and `ori_shape`.

        Args:
            results: Dictionary with `img_path`, or with `img`, an array that is used as it is. OpenMMLab's
                inferencers hand over the path or the array alone.

        Raises:
            BadImage: a file that does not decode, or whose channels do not fit.
        """
        if not isinstance(results, dict):
            results = {"img" if isinstance(results, np.ndarray) else "img_path": results}
        pixels = self._given(results["img"]) if "img" in results else self._read(results["img_path"])
        results["img"] = np.ascontiguousarray(pixels)
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        results.setdefault("img_path", None)
        return results

    def _given(self, pixels: np.ndarray) -> np.ndarray:
        found = pixels.shape[2] if pixels.ndim == 3 else 1
        if found != self.channels:
            raise BadImage(f"an array of shape {pixels.shape} has {found} channels, not {self.channels}")
        return pixels

    def _read(self, path: str | Path) -> np.ndarray:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BadImage(f"{path}: {error.strerror or error}") from None
        pixels = convert_channels(decode(data, str(path)), self.channels, str(path))
        if self.channels == 3 and pixels.dtype == np.float32 and pixels.max() > 2:
            raise BadImage(
                f"{path}: float values up to {pixels.max():.4g}; colour images are read as 8 or 16 bits or "
                "as floats of 0..1, so save it as one of these"
            )
        if pixels.dtype != np.uint8:
            pixels = scale_to_unit(pixels) * np.float32(255)
        if self.channels == 3:
            pixels = pixels.round().clip(0, 255).astype(np.uint8)[..., ::-1]
        return pixels
