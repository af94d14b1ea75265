"""DICOM files for tests of readers."""

import io

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

PATIENT = "Doe^Jane"


def dicom(pixels: np.ndarray, colours: str = "MONOCHROME2", *, frames: int = 1, **elements) -> bytes:
    """An uncompressed file of pixels `[H, W]`, `[H, W, 3]`, or with an axis of frames before these."""
    rows, columns = pixels.shape[frames > 1 :][:2]
    return written(pixels.tobytes(), pixels.dtype, (rows, columns), colours, frames=frames, **elements)


def compressed(
    stream: bytes | bytearray, pixels: np.ndarray, syntax: str, colours: str = "MONOCHROME2", **elements
) -> bytes:
    """A file of one frame that is compressed already; `pixels` say its form."""
    return written(
        encapsulate([bytes(stream)]), pixels.dtype, pixels.shape[:2], colours, syntax=UID(syntax), **elements
    )


def written(
    content: bytes,
    dtype: np.dtype,
    size: tuple[int, int],
    colours: str,
    *,
    frames: int = 1,
    syntax: UID = ExplicitVRLittleEndian,
    **elements,
) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    data.PatientName, data.PatientID = PATIENT, "MRN-4711"
    data.Rows, data.Columns = size
    data.PhotometricInterpretation = colours
    data.SamplesPerPixel = 3 if colours.startswith(("RGB", "YBR")) else 1
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8 * dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(dtype.kind == "i")
    if frames > 1:
        data.NumberOfFrames = frames
    data.PixelData = content + bytes(len(content) % 2)
    data["PixelData"].VR = "OB" if dtype.itemsize == 1 or syntax.is_encapsulated else "OW"
    for name, value in elements.items():
        setattr(data, name, value)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()
