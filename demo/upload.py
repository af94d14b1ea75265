"""Decodes uploaded pictures and refuses those that are too large, damaged or not pictures.

A file is read once, through `demo.storage`. Its size is read from the header before it is decoded, and only
`AT_ONCE` files are decoded at a time, so that the cost of a request is bounded: at most `MAX_PIXELS` pixels
of at most 8 bytes each. Files whose cost the header does not bound are refused: TIFFs of several pages,
JPEGs with many scans, and TIFFs that hold another format. Of animations the first frame is decoded.
"""

from __future__ import annotations

import importlib.util
import io
import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from coma.data.channels import convert_channels, scale_to_unit
from coma.data.decode import HEAD, decode, is_dicom, is_heif, is_npy, looks_like_image
from coma.data.image import DecodedImage
from coma.data.transforms import resize
from coma.errors import BadImage
from demo.storage import Storage

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
LONGEST_SIDE = 65_535
"""Longest side in pixels, as in JPEG: a BMP can skip 255 lines with one escape code."""
MAX_SCANNED = 100 * MAX_PIXELS
"""Pixels over all scans of a JPEG: encoders write about 10 scans, hostile files a million."""
MAX_SIDE = 1600
"""Longer side that pictures are reduced to; no model needs more."""
AT_ONCE = 2
WAIT_SECONDS = 60
"""Seconds to wait for a turn to decode."""
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")
HEIC = importlib.util.find_spec("pillow_heif") is not None
"""Whether HEIC pictures are read, which needs the extra `heic`."""
ACCEPTED = f"JPEG, PNG, WebP, AVIF, {'HEIC, ' * HEIC}GIF, TIFF or BMP"
_NAMES = {"MPO": "JPEG", "HEIF": "HEIC", "WEBP": "WebP"}
_NAMED = (*FORMATS, "ICO", "PPM")  # formats that the error names
_TIFF_CODES = {1: "none", 2: "CCITT", 3: "CCITT", 4: "CCITT", 5: "LZW", 8: "deflate", 32773: "PackBits",
               32946: "deflate", 50000: "Zstandard"}  # fmt: skip


class Upload(NamedTuple):
    """A decoded file, at most `MAX_SIDE` pixels a side, and what it was before.

    Attributes:
        pixels: `[H, W, c]`, uint8, or float32 in 0..1.
        alpha: Whether the last channel is opacity.
        width: Width of the picture in the file, upright, in pixels.
        height: Its height.
        format: Format of the file, as Pillow names it.
        size: Size of the file in bytes.
        animated: Whether the file has several frames, of which this is the first.
    """

    pixels: np.ndarray
    alpha: bool
    width: int
    height: int
    format: str
    size: int
    animated: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """Returns width and height of the picture in the file, divided by those of `pixels`."""
        return self.width / self.pixels.shape[1], self.height / self.pixels.shape[0]

    def describe(self, channels: int) -> str:
        """Returns size and format of the file, which frame it is, and how transparent parts are shown."""
        text = f"{self.width} x {self.height} px, {self.format}, {_bytes(self.size)}"
        if self.animated:
            text += "; animated: this is the first frame"
        whole = 255 if self.pixels.dtype == np.uint8 else 1
        if self.alpha and channels in (1, 3) and self.pixels[..., -1].min() < whole:
            text += "; transparent parts are shown on white"
        return text


class Uploads:
    """Reads uploaded files and caches the last ones, since the page asks for the same file repeatedly.

    Args:
        storage: Folder of the files.
        most: Number of cached pictures.
    """

    def __init__(self, storage: Storage, most: int = 16) -> None:
        self._storage = storage
        self._kept: OrderedDict[tuple[str, int, int], Upload] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(AT_ONCE)

    def read(self, path: str, channels: int) -> np.ndarray:
        """Returns the upright pixels, `[H, W, channels]`: uint8, or float32 in 0..1 for higher bit depths.

        Raises:
            BadImage: anything wrong with the file, in words for the visitor.
        """
        picture = self.open(path)
        return to_channels(picture.pixels, channels, picture.alpha)

    def open(self, path: str) -> Upload:
        """Returns a picture with the facts of its file.

        Raises:
            BadImage: anything wrong with the file, in words for the visitor.
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
        return picture

    def strokes(self, layers: Sequence[str | bytes]) -> np.ndarray | None:
        """Returns the painted pixels of all layers, bool `[H, W]`: those with alpha, or that are not black.

        Args:
            layers: Paths of uploaded files, or their contents.

        Raises:
            BadImage: anything wrong with a file, or layers of different sizes.
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
        """Drops cached pictures of files that were written longer ago."""
        limit = (time.time() - seconds) * 1e9
        with self._lock:
            for key in [key for key in self._kept if key[1] < limit]:
                del self._kept[key]

    def _decode(self, data: bytes) -> Upload:
        if not self._turns.acquire(timeout=WAIT_SECONDS):
            raise BadImage("The server is decoding too many pictures; please try again in a minute.")
        try:
            return read_picture(data)
        finally:
            self._turns.release()


def read_picture(data: bytes) -> Upload:
    """Decodes a file and reduces its longer side to at most `MAX_SIDE` pixels.

    Raises:
        BadImage: a file that is too large, damaged or not a picture.
    """
    if len(data) > MAX_BYTES:
        raise BadImage(f"This file is larger than {MAX_BYTES >> 20} MB; please upload a smaller one.")
    kind, width, height, animated = _check_header(data)
    try:
        picture = decode(data, "picture", min_side=MAX_SIDE, first_frame=True)
    except BadImage:
        raise BadImage("This picture is damaged or cut short: it does not decode.") from None
    pixels, alpha = picture.pixels, picture.alpha
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f" and not 0 <= low <= high <= 1:  # in a unit of their own
        raise BadImage(
            f"This picture holds numbers from {low:.4g} to {high:.4g}, and the page takes 0 to 1. On the "
            "command line, coma embed and the predict commands take any."
        )
    if (width > height) != (pixels.shape[1] > pixels.shape[0]):  # the file says to turn it
        width, height = height, width
    scale = MAX_SIDE / max(pixels.shape[:2])
    if scale < 1:
        smaller = [max(round(side * scale), 1) for side in pixels.shape[:2]]
        whole = (0, 0, *pixels.shape[:2])
        pixels = resize(pixels, whole, *smaller).permute(1, 2, 0).contiguous().numpy()
    elif pixels.dtype != np.uint8:
        pixels = scale_to_unit(pixels)
    pixels = pixels.clip(0, 1) if pixels.dtype != np.uint8 else pixels
    return Upload(pixels, alpha, width, height, _NAMES.get(kind, kind), len(data), animated)


def to_channels(pixels: np.ndarray, channels: int, alpha: bool = False) -> np.ndarray:
    """Converts pixels `[H, W, c]` to `[H, W, channels]`; `alpha` says whether the last one is opacity.

    Raises:
        BadImage: there is no such conversion, in words for the visitor.
    """
    try:
        return convert_channels(DecodedImage(pixels, alpha), channels, "picture")
    except BadImage:
        have = pixels.shape[2]
        raise BadImage(f"This model needs pictures with {channels} channels; this one has {have}.") from None


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(size / 1e3, 0.1):.{0 if size >= 1e4 else 1}f} kB"


def _open_header(data: bytes) -> Image.Image:
    if not is_heif(data):
        return Image.open(io.BytesIO(data), formats=_NAMED)
    if not HEIC:
        raise BadImage(f"HEIC pictures are not supported here; please upload a {ACCEPTED} file.")
    from pillow_heif import HeifImageFile

    return HeifImageFile(io.BytesIO(data))


def _check_header(data: bytes) -> tuple[str, int, int, bool]:
    """Refuses a file by its header, without decoding it.

    Returns:
        Format, width, height, and whether there are several frames.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open_header(data) as header:
                kind, (width, height) = header.format, header.size
                several = kind != "MPO" and bool(getattr(header, "is_animated", False))
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(_too_large()) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError):
        head = data[:HEAD]
        if looks_like_image(head) and not is_npy(head) and not is_dicom(head):
            raise BadImage("This picture is damaged: its header cannot be read.") from None
        raise BadImage(f"This file is not a picture; please upload a {ACCEPTED} file.") from None
    except Exception:  # decoders raise any exception on hostile headers
        raise BadImage("This picture is damaged: its header cannot be read.") from None
    if width * height > MAX_PIXELS:
        raise BadImage(_too_large(width, height))
    if max(width, height) > LONGEST_SIDE:
        raise BadImage(f"This picture is too long: at most {LONGEST_SIDE} pixels a side, please.")
    if several and kind == "TIFF":
        raise BadImage("This TIFF has several pages; please upload a single picture.")
    if kind not in (*FORMATS, *_NAMES):
        raise BadImage(f"{kind} pictures are not supported; please upload a {ACCEPTED} file.")
    if kind in ("JPEG", "MPO") and data.count(b"\xff\xda") * width * height > MAX_SCANNED:  # start of scan
        raise BadImage("This JPEG has too many scans; please save it again.")
    if kind == "TIFF" and _tiff_compression(data) not in _TIFF_CODES:
        codes = ", ".join(dict.fromkeys(_TIFF_CODES.values()))
        raise BadImage(
            f"This TIFF compression is not supported; please save the picture with one of: {codes}."
        )
    return kind, width, height, several  # the frames of an MPO are views of one photograph


def _tiff_compression(data: bytes) -> int:
    """Returns the compression that tifffile, which decodes the file, finds; Pillow may find another tag."""
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return int(file.pages.first.compression)
    except Exception:  # see `_check_header`
        raise BadImage("This picture is damaged: its header cannot be read.") from None


def _too_large(width: int = 0, height: int = 0) -> str:
    size = f" ({width} x {height} pixels)" if width else ""
    return f"This picture is too large{size}: at most {MAX_PIXELS // 10**6} megapixels, please."
