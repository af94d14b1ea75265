"""Decoders of compressed DICOM pixels, as a plugin of pydicom: by imagecodecs, which is installed anyway.

pydicom itself decodes RLE, and with Pillow 8-bit JPEG. This module takes the others: lossless and 12-bit
JPEG, JPEG-LS, JPEG 2000 and its high-throughput form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pydicom.pixels.decoders.base import DecodeRunner
    from pydicom.uid import UID

PLUGIN = "coma"

_JPEG = ("1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))

DECODER_DEPENDENCIES = dict.fromkeys((*_JPEG, *_JPEG_LS, *_JPEG_2000), ("imagecodecs",))
"""Read by pydicom: what every transfer syntax needs."""


def is_available(uid: str) -> bool:
    """Returns whether this module decodes a transfer syntax (PS3.6, table A-1); called by pydicom."""
    return uid in DECODER_DEPENDENCIES


def plugin_for(syntax: UID) -> str:
    """Adds this module to pydicom's decoder of a transfer syntax, and returns the plugin that is to be used.

    Raises:
        NotImplementedError: pydicom does not know the transfer syntax.
    """
    from pydicom.pixels import get_decoder

    decoder = get_decoder(syntax)
    if syntax not in DECODER_DEPENDENCIES:
        return ""
    if PLUGIN not in decoder.available_plugins:
        decoder.add_plugin(PLUGIN, (__name__, "decode_frame"))
    return PLUGIN


def decode_frame(src: bytes, runner: DecodeRunner) -> bytearray:
    """Decodes a frame, and tells pydicom the form of its values; called by pydicom.

    Raises:
        ValueError: The frame is not of the size or number of channels that the header says.
    """
    import imagecodecs

    if runner.transfer_syntax in _JPEG_2000:
        pixels = imagecodecs.jpeg2k_decode(src)
        if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):
            runner.set_option("photometric_interpretation", "RGB")
    elif runner.transfer_syntax in _JPEG_LS:
        pixels = imagecodecs.jpegls_decode(src)
    else:
        pixels = imagecodecs.jpeg_decode(src)
        if pixels.ndim == 3:
            runner.set_option("photometric_interpretation", "RGB")
    samples = () if runner.samples_per_pixel == 1 else (runner.samples_per_pixel,)
    if pixels.shape != (runner.rows, runner.columns, *samples) or pixels.dtype.kind not in "ui":
        raise ValueError(f"a frame has the shape {pixels.shape} and {pixels.dtype} values")
    runner.set_option("bits_allocated", 8 * pixels.dtype.itemsize)
    runner.set_option("planar_configuration", 0)
    return bytearray(np.ascontiguousarray(pixels).tobytes())
