"""Decodes DICOM files: one frame at a time, in the values that the file defines.

    8 and 16 bits        uint8 and uint16, as in other rasters; MONOCHROME1 is inverted (PS3.3, C.7.6.3.1.2)
    rescale, modality LUT, signed values
                         float32 in the unit of the file, such as Hounsfield units (PS3.3, C.11.1)
    palette, YBR         RGB
    padding              missing values, like nodata (PS3.3, C.7.5.1.1.2)

Only elements that describe pixels are read, and no value of another one can appear in a message. pydicom
reads the files; see `dicom_codecs` for compressed ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from coma.data.codestreams import check_codestream
from coma.data.decode_arrays import to_supported_dtype
from coma.data.dicom_codecs import plugin_for
from coma.data.image import DecodedImage, check_size
from coma.errors import BadImage

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_EXTENSIONS = (".dcm", ".dicom")
INSTALL_DICOM = "pip install 'coma-dyvit[dicom]'"

PREAMBLE = 128
"""Bytes before the letters DICM (PS3.10, 7.1)."""

_TAGS = (
    *("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "PhotometricInterpretation"),
    *("BitsStored", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(
        f"{c}PaletteColorLookupTable{part}"
        for c in ("Red", "Green", "Blue")
        for part in ("Descriptor", "Data")
    ),
    *(f"Segmented{c}PaletteColorLookupTableData" for c in ("Red", "Green", "Blue")),
)
_COLOURS = ("MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR")
_CONVERTED = ("YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
"""Photometric interpretations that pydicom returns as RGB."""
_DEFLATED = "1.2.840.10008.1.2.1.99"
_HEADER = 12
"""Bytes before the value of encapsulated pixels: tag, VR and length (PS3.5, A.4)."""


def dicom_size(file: BinaryIO) -> tuple[int, int, int]:
    """Returns the number of frames, and their height and width.

    Raises:
        BadImage: See `decode_dicom`.
    """
    header = _header(file)
    return _frames(header, file), header.Rows, header.Columns


def decode_dicom(file: BinaryIO, frame: int | None = None) -> DecodedImage:
    """Decodes one frame.

    Args:
        file: The file.
        frame: Its position, from 0; None for the only one.

    Raises:
        BadImage: The file is damaged, holds no image or several, or is of an unsupported kind; or a package
            is missing.
    """
    header = _header(file)
    position, frames = file.tell(), _frames(header, file)
    if frame is None and frames > 1:
        raise BadImage(
            f"holds {frames} frames; to read all of them, give --tiles SIDE to coma pretrain, pack or embed, "
            "or save them as a file each"
        )
    return _decode_frame(file, header, position, frame or 0, frames)


def _header(file: BinaryIO) -> Dataset:
    """Returns the elements that describe the pixels; leaves the file at the element of the pixels."""
    try:
        from pydicom import dcmread
        from pydicom.filereader import read_dataset
    except ImportError:
        raise BadImage(f"DICOM images need an extra: {INSTALL_DICOM}") from None
    try:
        file.seek(PREAMBLE + 4)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        deflated = meta.get("TransferSyntaxUID") == _DEFLATED
        file.seek(0)
        header = None if deflated else dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
    except Exception as error:  # their messages may quote elements
        raise BadImage(f"is damaged: its DICOM elements cannot be read ({type(error).__name__})") from None
    if header is None:
        raise BadImage("is a deflated DICOM file; save it uncompressed, or with compressed pixels only")
    if not header.get("Rows") or not header.get("Columns"):
        raise BadImage("is a DICOM file without an image")
    check_size(header.Rows, header.Columns, header.get("SamplesPerPixel") or 1)
    return header


def _frames(header: Dataset, file: BinaryIO) -> int:
    try:
        frames = int(header.get("NumberOfFrames") or 1)
    except (TypeError, ValueError):
        frames = 0
    if not 1 <= frames <= file.seek(0, 2):  # a frame has at least one byte
        raise BadImage("is damaged: its number of frames is not possible")
    return frames


def _decode_frame(file: BinaryIO, header: Dataset, position: int, frame: int, frames: int) -> DecodedImage:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    colours = str(header.get("PhotometricInterpretation"))
    if colours not in (*_COLOURS, *_CONVERTED):
        raise BadImage("DICOM photometric interpretation is not supported; save it as RGB or MONOCHROME2")
    plugin = _usable_plugin(file, header, position, frame, frames)
    pixels = pixel_array(file, index=frame, decoding_plugin=plugin)
    missing = _padding(pixels, header)
    if colours == "PALETTE COLOR":
        return DecodedImage(to_supported_dtype(apply_color_lut(pixels, header)[..., :3]))
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if colours == "MONOCHROME1":
        low, high = _stored_range(header, pixels.dtype)
        pixels = pixels.dtype.type(low + high) - pixels
    scale = _rescale(header, frame)
    if scale is not None:
        pixels = apply_modality_lut(pixels, scale).astype(np.float32)
    elif pixels.dtype.kind == "i":
        pixels = pixels.astype(np.float32)
    elif pixels.dtype == np.uint8 and header.get("BitsStored") == 1:
        pixels = pixels.astype(bool)
    return DecodedImage(to_supported_dtype(pixels), missing=missing)


def _usable_plugin(file: BinaryIO, header: Dataset, position: int, frame: int, frames: int) -> str:
    """Checks that pixels can be decoded here, and that compressed ones have no other size than the header.

    Returns:
        The plugin for pydicom; empty for any.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise BadImage("is damaged: it has no DICOM transfer syntax")
    try:
        plugin = plugin_for(syntax)
    except NotImplementedError:
        raise BadImage(f"DICOM compression {syntax.name} is not supported; save it uncompressed") from None
    if not get_decoder(syntax).is_available:
        raise BadImage(f"DICOM compression {syntax.name} cannot be decoded here; save it uncompressed")
    if syntax.is_encapsulated:
        file.seek(position + _HEADER)
        check_codestream(get_frame(file, frame, number_of_frames=frames), header.Rows, header.Columns)
    return plugin


def _padding(pixels: np.ndarray, header: Dataset) -> np.ndarray | None:
    """Returns which values are padding: one value, or all up to a limit."""
    value = header.get("PixelPaddingValue")
    if not isinstance(value, int) or pixels.ndim != 2:
        return None
    limit = header.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    return ((pixels >= low) & (pixels <= high))[:, :, None]


def _stored_range(header: Dataset, dtype: np.dtype) -> tuple[int, int]:
    """Returns the smallest and the largest value that pixels can have before any rescaling."""
    bits = min(int(header.get("BitsStored") or 8 * dtype.itemsize), 8 * dtype.itemsize)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.kind == "i" else (0, 2**bits - 1)


def _rescale(header: Dataset, frame: int) -> Dataset | None:
    """Returns the data set with the modality LUT or rescaling of a frame; None if values stay as stored."""
    groups: list[Any] = [header]
    for name, number in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        sequence = header.get(name) or []
        if number < len(sequence):
            groups += sequence[number].get("PixelValueTransformationSequence") or []
    for group in groups:
        if group.get("ModalityLUTSequence"):
            return group
        if "RescaleSlope" in group and "RescaleIntercept" in group:
            plain = (group.RescaleSlope, group.RescaleIntercept) == (1, 0)
            return None if plain else group
    return None
