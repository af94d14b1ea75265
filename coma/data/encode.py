"""Pictures back to files, for packs: what loses nothing that training could see, chosen per picture.

8-bit grey and colour become JPEG, transparency and 16 bits PNG, more channels and floats TIFF; the last
two without any loss.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from coma.data.image import DecodedImage
from coma.data.transforms import resize


def reduce_to_short_side(picture: DecodedImage, size: int) -> DecodedImage:
    """The picture with a short side of at most `size` pixels; its dtype stays."""
    pixels = picture.pixels
    height, width, _ = pixels.shape
    short = min(height, width)
    if short <= size:
        return picture
    h, w = (round(side * size / short) for side in (height, width))
    small = resize(pixels, (0, 0, height, width), h, w).permute(1, 2, 0).contiguous().numpy()
    if pixels.dtype == np.uint16:
        small = (small * np.float32(65535)).round().astype(np.uint16)
    return picture._replace(pixels=small)


def encode(picture: DecodedImage, quality: int) -> tuple[str, bytes]:
    """Extension and file content: JPEG where nothing but its own loss is lost, else PNG or TIFF."""
    buffer, channels = io.BytesIO(), picture.pixels.shape[2]
    pixels = np.ascontiguousarray(picture.pixels[:, :, 0] if channels == 1 else picture.pixels)
    if pixels.dtype == np.uint8 and channels in (1, 3):
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        return ".jpg", buffer.getvalue()
    if pixels.dtype != np.float32 and (channels in (1, 3) or picture.alpha):
        import imagecodecs

        return ".png", bytes(imagecodecs.png_encode(pixels))
    import tifffile

    layout = {"photometric": "minisblack", "compression": "zlib", "metadata": None}
    if channels > 1:
        layout |= {"planarconfig": "contig", "extrasamples": ["unspecified"] * (channels - 1)}
    tifffile.imwrite(buffer, pixels, **layout)
    return ".tif", buffer.getvalue()
