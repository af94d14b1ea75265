"""Pictures that strangers send, to pixels: what is too large, damaged or no picture is refused kindly.

A file is read once, through `demo.storage`; everything else is done with its bytes. Size is read from the
header before anything is decoded, and only a few are decoded at a time, so that what a request may cost is
known: at most `MAX_PIXELS` pixels of at most 8 bytes, `AT_ONCE` times. What a header does not bound is
refused: pages are not counted, a JPEG passes over its pixels a bounded number of times, and a TIFF holds no
picture of another format, whose own header may say another size.
"""

from __future__ import annotations

import io
import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from coma.data.channels import convert_channels, scale_to_unit
from coma.data.decode import decode
from coma.data.image import DecodedImage
from coma.data.transforms import resize
from coma.errors import BadImage
from demo.storage import Storage

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
LONGEST_SIDE = 65_535
"""Pixels along the longer side of a file, as in JPEG: a BMP can skip 255 lines by one escape code."""
MAX_SCANNED = 100 * MAX_PIXELS
"""Pixels that the scans of a JPEG may pass over: encoders write about 10 scans, hostile files a million."""
MAX_SIDE = 1600
"""Pixels of the longer side that is kept: no model here sees more."""
AT_ONCE = 2
WAIT_SECONDS = 60
"""Who waits longer than that for others' pictures to be decoded is told so."""
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
TAKES = "JPEG, PNG, WebP, TIFF or BMP"
_NAMED = (*FORMATS, "GIF", "AVIF", "ICO", "PPM")  # those that a refusal calls by name
_TIFF_CODES = {1: "none", 2: "CCITT", 3: "CCITT", 4: "CCITT", 5: "LZW", 8: "deflate", 32773: "PackBits",
               32946: "deflate", 50000: "Zstandard"}  # fmt: skip


class Uploads:
    """Reads uploaded files, remembering the last few: a page asks for the same one again and again.

    Args:
        storage: Where they lie.
        most: How many pictures are remembered.
    """

    def __init__(self, storage: Storage, most: int = 16) -> None:
        self._storage = storage
        self._kept: OrderedDict[tuple[str, int, int], DecodedImage] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(AT_ONCE)

    def read(self, path: str, channels: int) -> np.ndarray:
        """Pixels of the file, upright, `[H, W, channels]` in uint8, or float32 in 0..1 of more bits.

        Raises:
            BadImage: anything wrong with it, in words for the person who sent it.
        """
        with self._storage.open(path) as file:
            status = os.fstat(file.fileno())
            key = (path, status.st_mtime_ns, status.st_size)
            with self._lock:
                picture = self._kept.get(key)
            if picture is None:
                picture = self._decode(file.read(MAX_BYTES + 1))
                with self._lock:
                    self._kept[key] = picture
                    while len(self._kept) > self._most:
                        self._kept.popitem(last=False)
        try:
            return convert_channels(picture, channels, "picture")
        except BadImage:
            have = picture.pixels.shape[2]
            raise BadImage(f"The model takes pictures of {channels} channels; this one has {have}.") from None

    def strokes(self, layers: Sequence[str | bytes]) -> np.ndarray | None:
        """Painted pixels of all layers, bool `[H, W]`: not transparent or, without transparency, not black.

        Args:
            layers: Paths of uploaded files, or the files themselves.

        Raises:
            BadImage: as for pictures, or layers that differ in size.
        """
        painted: np.ndarray | None = None
        for layer in layers:
            if isinstance(layer, str):
                with self._storage.open(layer) as file:
                    layer = file.read(MAX_BYTES + 1)
            drawn = self._decode(layer)
            strokes = drawn.pixels[..., -1] > 0 if drawn.alpha else drawn.pixels.max(axis=-1) > 0
            if painted is not None and painted.shape != strokes.shape:
                raise BadImage("The painted layers differ in size.")
            painted = strokes if painted is None else painted | strokes
        return painted

    def forget_older(self, seconds: float) -> None:
        """Forget pictures of files that were written longer ago."""
        limit = (time.time() - seconds) * 1e9
        with self._lock:
            for key in [key for key in self._kept if key[1] < limit]:
                del self._kept[key]

    def _decode(self, data: bytes) -> DecodedImage:
        if not self._turns.acquire(timeout=WAIT_SECONDS):
            raise BadImage("Too many pictures are being read at the moment; please try again in a minute.")
        try:
            return read_picture(data)
        finally:
            self._turns.release()


def read_picture(data: bytes) -> DecodedImage:
    """Decode a file, its longer side reduced to at most `MAX_SIDE` pixels.

    Returns:
        Pixels uint8, or float32 in 0..1.

    Raises:
        BadImage: too large, animated, damaged or no picture.
    """
    if len(data) > MAX_BYTES:
        raise BadImage(f"This file is larger than {MAX_BYTES >> 20} MB; please send a smaller one.")
    _check_header(data)
    try:
        picture = decode(data, "picture", min_side=MAX_SIDE)
    except BadImage:
        raise BadImage("This picture is damaged or cut short: it does not decode.") from None
    pixels, alpha = picture.pixels, picture.alpha
    scale = MAX_SIDE / max(pixels.shape[:2])
    if scale < 1:
        height, width = (max(round(side * scale), 1) for side in pixels.shape[:2])
        whole = (0, 0, *pixels.shape[:2])
        pixels = resize(pixels, whole, height, width).permute(1, 2, 0).contiguous().numpy()
    elif pixels.dtype != np.uint8:
        pixels = scale_to_unit(pixels)
    return DecodedImage(pixels.clip(0, 1) if pixels.dtype != np.uint8 else pixels, alpha)


def _check_header(data: bytes) -> None:
    """Refuse by what the file says of itself, without decoding it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_NAMED) as header:
                kind, (width, height) = header.format, header.size
                several = kind in (*FORMATS, "GIF") and getattr(header, "is_animated", False)
    except Image.DecompressionBombError:
        raise BadImage(_too_large()) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError):
        raise BadImage(f"This file is not a picture; please send a {TAKES} file.") from None
    except Exception:  # decoders raise whatever they like on hostile headers
        raise BadImage("This picture is damaged: its header cannot be read.") from None
    if width * height > MAX_PIXELS:
        raise BadImage(_too_large(width, height))
    if max(width, height) > LONGEST_SIDE:
        raise BadImage(f"This picture is too long: at most {LONGEST_SIDE} pixels a side, please.")
    if several:  # not of an MPO, whose other frames are views of the same photograph
        raise BadImage("This picture is animated or has several pages; please send a still one.")
    if kind not in (*FORMATS, "MPO"):
        raise BadImage(f"{kind} pictures are not taken; please send a {TAKES} file.")
    if kind in ("JPEG", "MPO") and data.count(b"\xff\xda") * width * height > MAX_SCANNED:  # start of scan
        raise BadImage("This JPEG has too many scans; please save it anew.")
    if kind == "TIFF" and _tiff_compression(data) not in _TIFF_CODES:
        codes = ", ".join(dict.fromkeys(_TIFF_CODES.values()))
        raise BadImage(f"Of TIFF pictures these compressions are taken: {codes}; please save it anew.")


def _tiff_compression(data: bytes) -> int:
    """As its reader finds it; Pillow may find another tag of the same number."""
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return int(file.pages.first.compression)
    except Exception:  # as above
        raise BadImage("This picture is damaged: its header cannot be read.") from None


def _too_large(width: int = 0, height: int = 0) -> str:
    size = f" ({width} x {height} pixels)" if width else ""
    return f"This picture is too large{size}: at most {MAX_PIXELS // 10**6} megapixels, please."
