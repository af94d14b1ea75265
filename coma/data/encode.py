"""Encodes decoded images again, for packs: without any loss that training could notice.

8-bit grey and colour become JPEG; transparency, 16 bits and sides that are too long for JPEG become PNG; more
channels and floats become TIFF. PNG and TIFF are lossless.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from coma.data.image import DecodedImage
from coma.data.transforms import resize

_LONGEST_JPEG = 65_500
"""Maximum pixels of a side of a JPEG (JPEG_MAX_DIMENSION of libjpeg)."""


def reduce_to_short_side(image: DecodedImage, size: int) -> DecodedImage:
    """Returns the image with a short side of at most `size` pixels, in the same dtype."""
    pixels = image.pixels
    height, width, _ = pixels.shape
    short = min(height, width)
    if short <= size:
        return image
    h, w = (round(side * size / short) for side in (height, width))
    small = resize(pixels, (0, 0, height, width), h, w).permute(1, 2, 0).contiguous().numpy()
    if pixels.dtype == np.uint16:
        small = (small * np.float32(65535)).round().astype(np.uint16)
    return image._replace(pixels=small)


def encode(image: DecodedImage, quality: int) -> tuple[str, bytes]:
    """Returns the extension and content of a file: JPEG for 8-bit grey and colour, else PNG or TIFF.

    Raises:
        Exception: The encoder fails; see `decode.naming_errors`.
    """
    buffer, channels = io.BytesIO(), image.pixels.shape[2]
    pixels = np.ascontiguousarray(image.pixels[:, :, 0] if channels == 1 else image.pixels)
    if pixels.dtype == np.uint8 and channels in (1, 3) and max(pixels.shape[:2]) <= _LONGEST_JPEG:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        return ".jpg", buffer.getvalue()
    if pixels.dtype != np.float32 and (channels in (1, 3) or image.alpha):
        import imagecodecs

        return ".png", bytes(imagecodecs.png_encode(pixels))
    import tifffile

    layout = {"photometric": "minisblack", "compression": "zlib", "metadata": None}
    if channels > 1:
        extras = ["unspecified"] * (channels - 1)
        if image.alpha:
            extras[-1] = "unassalpha"
        layout |= {"planarconfig": "contig", "extrasamples": extras}
    tifffile.imwrite(buffer, pixels, **layout)
    return ".tif", buffer.getvalue()
