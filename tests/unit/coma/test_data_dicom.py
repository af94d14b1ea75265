"""DICOM: real files of pydicom's own tests, and written ones of every kind."""

import logging
import struct
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from dicom_files import PATIENT, compressed, dicom
from encoded_images import COLOUR
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import examples
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from coma.data.decode import decode
from coma.data.sources.open import open_source
from coma.errors import BadImage

GREY = COLOUR[:, :, 0]
DEEP = GREY.astype(np.uint16) * 16
"""12 bits in 16."""


def real(name: str):
    path = get_testdata_file(name, download=False)
    assert path, name
    return decode(Path(str(path)).read_bytes(), name)


# values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [GREY, DEEP, COLOUR], ids=["8", "16", "RGB"])
def test_pixels_are_those_that_were_written(pixels):
    image = decode(dicom(pixels, "RGB" if pixels.ndim == 3 else "MONOCHROME2"), "x")
    assert image.pixels.dtype == pixels.dtype
    assert np.array_equal(image.pixels.squeeze(), pixels)
    assert image.missing is None


def test_values_are_rescaled_to_the_unit_of_the_file():
    image = decode(dicom(DEEP, RescaleSlope=2, RescaleIntercept=-1024), "x")
    assert image.pixels.dtype == np.float32
    assert np.array_equal(image.pixels[:, :, 0], DEEP * 2.0 - 1024)
    assert decode(dicom(DEEP, RescaleSlope=1, RescaleIntercept=0), "x").pixels.dtype == np.uint16


def test_frames_have_rescaling_of_their_own():
    """As in enhanced multi-frame images, PS3.3, C.7.6.16."""

    def group(slope: float) -> Dataset:
        transform, outer = Dataset(), Dataset()
        transform.RescaleSlope, transform.RescaleIntercept = slope, 5
        outer.PixelValueTransformationSequence = Sequence([transform])
        return outer

    shared = decode(dicom(DEEP, SharedFunctionalGroupsSequence=Sequence([group(3)])), "x")
    assert np.array_equal(shared.pixels[:, :, 0], DEEP * 3.0 + 5)
    both: dict[str, Any] = {"SharedFunctionalGroupsSequence": Sequence([group(3)])}
    both["PerFrameFunctionalGroupsSequence"] = Sequence([group(7)])
    assert np.array_equal(decode(dicom(DEEP, **both), "x").pixels[:, :, 0], DEEP * 7.0 + 5)


def test_signed_values_are_floats():
    signed = DEEP.astype(np.int16) - 1000
    assert np.array_equal(decode(dicom(signed), "x").pixels[:, :, 0], signed.astype(np.float32))


def test_monochrome1_is_inverted_within_its_bits_and_before_rescaling():
    assert np.array_equal(decode(dicom(GREY, "MONOCHROME1"), "x").pixels[:, :, 0], 255 - GREY)
    deep = dicom(DEEP, "MONOCHROME1", BitsStored=12, HighBit=11)
    assert np.array_equal(decode(deep, "x").pixels[:, :, 0], 4095 - DEEP)
    rescaled = dicom(DEEP, "MONOCHROME1", BitsStored=12, HighBit=11, RescaleSlope=2, RescaleIntercept=-10)
    assert np.array_equal(decode(rescaled, "x").pixels[:, :, 0], (4095 - DEEP) * 2.0 - 10)
    signed = DEEP.astype(np.int16) - 1000
    assert np.array_equal(decode(dicom(signed, "MONOCHROME1"), "x").pixels[:, :, 0], -1.0 - signed)


def test_padding_is_missing_and_filled_with_the_mean_of_the_rest():
    padded = DEEP.copy()
    padded[:10] = 7
    image = decode(dicom(padded, PixelPaddingValue=7), "x")
    assert image.missing is not None
    assert np.array_equal(image.missing[:, :, 0], padded == 7)
    assert (image.pixels[:10] == round(padded[padded != 7].mean())).all()
    both = decode(dicom(padded, PixelPaddingValue=0, PixelPaddingRangeLimit=9), "x")
    assert both.missing is not None
    assert np.array_equal(both.missing[:, :, 0], padded <= 9)


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        ("1.2.840.10008.1.2.4.57", lambda x: imagecodecs.ljpeg_encode(x, bitspersample=12)),
        ("1.2.840.10008.1.2.4.70", lambda x: imagecodecs.ljpeg_encode(x, bitspersample=12)),
        ("1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode),
        (
            "1.2.840.10008.1.2.4.90",
            lambda x: imagecodecs.jpeg2k_encode(x, codecformat="J2K", reversible=True),
        ),
        ("1.2.840.10008.1.2.4.201", lambda x: imagecodecs.htj2k_encode(x, reversible=True)),
    ],
    ids=["JPEG lossless 14", "JPEG lossless SV1", "JPEG-LS", "JPEG 2000", "HTJ2K"],
)
def test_lossless_compression_changes_nothing(syntax, encode):
    assert np.array_equal(decode(compressed(encode(DEEP), DEEP, syntax), "x").pixels[:, :, 0], DEEP)


@pytest.mark.parametrize(
    ("name", "same_as", "off"),
    [
        ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm", 0),  # lossless JPEG
        ("SC_rgb_gdcm_KY.dcm", "SC_rgb_rle.dcm", 0),  # JPEG 2000
        ("SC_rgb_jls_lossy_sample.dcm", "SC_rgb_rle.dcm", 2),
        ("SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_rle.dcm", 2),  # baseline JPEG, YBR
        ("SC_ybr_full_422_uncompressed.dcm", "SC_rgb_rle.dcm", 6),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm", 0),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm", 0),
        ("MR_small_bigendian.dcm", "MR_small.dcm", 0),
        ("MR_small_RLE.dcm", "MR_small.dcm", 0),
    ],
)
def test_real_files_give_the_same_pixels_however_they_are_compressed(name, same_as, off):
    one, other = real(name).pixels, real(same_as).pixels
    assert one.dtype == other.dtype
    assert np.abs(one.astype(float) - other).max() <= off


def test_real_files_of_other_kinds():
    ct = examples.ct
    expected = ct.pixel_array * float(ct.RescaleSlope) + float(ct.RescaleIntercept)
    assert np.array_equal(real("CT_small.dcm").pixels[:, :, 0], expected)  # its preamble is that of a TIFF
    assert real("examples_palette.dcm").pixels.shape == (350, 800, 3)
    assert real("JPEG-lossy.dcm").pixels.max() > 255  # 12 bits


# refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("examples_ybr_color.dcm", "holds 30 frames; to read all of them, give --tiles SIDE"),
        ("rtdose_1frame.dcm", "uint32 pixels are not supported"),
        ("image_dfl.dcm", "deflated"),
        ("test-SR.dcm", "a DICOM file without an image"),
        ("MR_truncated.dcm", "does not decode"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(name, reason):
    with pytest.raises(BadImage, match=reason) as raised:
        real(name)
    assert str(raised.value).startswith(f"{name}: ")
    assert "\n" not in str(raised.value)


def test_sizes_of_hostile_headers_are_refused_before_memory_is_allocated():
    with pytest.raises(BadImage, match="decompression bomb"):
        decode(dicom(GREY, Rows=65535, Columns=65535), "x")
    with pytest.raises(BadImage, match="its number of frames is not possible"):
        decode(dicom(GREY, NumberOfFrames=2**31 - 1), "x")
    stream = bytearray(imagecodecs.jpegls_encode(DEEP))
    at = stream.index(b"\xff\xf7") + 5
    stream[at : at + 4] = struct.pack(">HH", 65535, 65535)
    with pytest.raises(BadImage, match="says that it has 65535 x 65535"):
        decode(compressed(bytes(stream), DEEP, "1.2.840.10008.1.2.4.80"), "x")


def test_video_is_refused_with_the_way_out():
    with pytest.raises(BadImage, match=r"MPEG.*is not supported; save it uncompressed"):
        decode(compressed(b"\0" * 64, COLOUR, "1.2.840.10008.1.2.4.100", "RGB"), "x")


def test_no_patient_is_ever_named(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    good = dicom(DEEP)
    assert PATIENT.encode() in good  # the planted data
    for cut in range(130, len(good) - 9000, 3):
        with pytest.raises(BadImage) as raised:
            decode(good[:cut] if cut % 2 else good[: cut - 2] + b"\xff\xff" + good[cut : cut + 40], "x")
        assert "Doe" not in str(raised.value)
        assert "4711" not in str(raised.value)
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "Doe" not in printed
    assert "4711" not in printed


FUZZED = [
    dicom(DEEP),
    dicom(COLOUR, "YBR_FULL"),
    compressed(imagecodecs.jpegls_encode(DEEP), DEEP, "1.2.840.10008.1.2.4.80"),
    compressed(imagecodecs.ljpeg_encode(DEEP, bitspersample=12), DEEP, "1.2.840.10008.1.2.4.70"),
]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(FUZZED),
    st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_files_give_pixels_or_bad_image_and_nothing_else(data, changes):
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    try:
        pixels = decode(bytes(damaged), "x").pixels
    except BadImage as error:
        assert "Doe" not in str(error)
        return
    assert pixels.dtype in (np.uint8, np.uint16, np.float32)


# folders -----------------------------------------------------------------------------------------


def test_files_are_found_by_extension_and_by_their_first_bytes(tmp_path):
    for name in ("a.dcm", "IM-0001", "1.2.840.113619"):
        (tmp_path / name).write_bytes(dicom(DEEP))
    source = open_source(tmp_path)
    assert source.summary() == f"{tmp_path}: 3 images (2 without extension, 1 .dcm)"
    assert all(np.array_equal(source.read(i)[:, :, 0], DEEP) for i in range(3))


def test_without_the_extra_the_way_to_it_is_said(tmp_path, monkeypatch):
    import builtins

    from coma.data import inventory

    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "pydicom":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    (tmp_path / "a.dcm").write_bytes(dicom(DEEP))
    (tmp_path / "IM-0001").write_bytes(dicom(DEEP))
    monkeypatch.setattr(inventory, "find_spec", lambda name: None)
    monkeypatch.setattr(builtins, "__import__", refuse)
    source = open_source(tmp_path)
    assert source.summary().endswith("skipped: 1 .dcm (to read them: pip install 'coma-dyvit[dicom]')")
    with pytest.raises(
        BadImage, match=r"IM-0001: DICOM images need an extra: pip install 'coma-dyvit\[dicom\]'"
    ):
        source.read(0)
