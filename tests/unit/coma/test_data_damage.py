"""Damaged, hostile and mislabelled files: one BadImage line each, nothing printed, nothing unpickled."""

import io
import logging
import pickle
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from dicom_files import compressed
from encoded_images import COLOUR, encoded, npy, tiff
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file

from coma.data import decode as decoding
from coma.data import open_source
from coma.data.decode import decode
from coma.errors import BadImage

TALKATIVE = decoding._LOGGERS


def faked_size(png: bytes, side: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


PNG = encoded(Image.fromarray(COLOUR), "PNG")
PNG16 = bytes(imagecodecs.png_encode(COLOUR.astype(np.uint16)))
HUGE_TIFF = tiff(np.zeros((8, 8), np.uint16)).replace(
    struct.pack("<HHII", 256, 4, 1, 8), struct.pack("<HHII", 256, 4, 1, 1 << 20)
).replace(struct.pack("<HHII", 257, 4, 1, 8), struct.pack("<HHII", 257, 4, 1, 1 << 20))  # fmt: skip


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"these are words, not pixels\n" * 9, "not an image"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"\x93NUMPY\x01", "does not decode"),
        (faked_size(PNG, 60_000), "decompression bomb"),
        (faked_size(PNG16, 60_000), "decompression bomb"),
        (HUGE_TIFF, "decompression bomb"),
        (npy(np.zeros((0, 30), np.uint8)), "no pixels"),
        (npy(np.full((20, 30), np.nan, np.float32)), "NaN or infinite"),
        (npy(np.full((20, 30), 1e300)), "NaN or infinite"),
        (tiff(np.full((20, 30), np.inf, np.float32)), "NaN or infinite"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data, reason):
    with pytest.raises(BadImage, match=reason) as raised:
        decode(data, "dir/cat.jpg")
    message = str(raised.value)
    assert message.startswith("dir/cat.jpg: ")
    assert "\n" not in message
    assert "0x" not in message


@pytest.mark.parametrize(
    "data",
    [
        *(encoded(Image.fromarray(COLOUR), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")),
        PNG16,
        tiff(COLOUR.astype(np.uint16)),
        npy(COLOUR),
    ],
)
def test_truncated_files_are_refused(data):
    assert decode(data, "whole").pixels.shape == COLOUR.shape
    for share in (0.05, 0.5, 0.9):
        with pytest.raises(BadImage, match=r"^half: "):
            decode(data[: int(len(data) * share)], "half")


CLAIMS = {
    "jpeg2000": lambda at, data: data.index(b"\xff\x4f\xff\x51", at) + 8,
    "png": lambda at, data: data.index(b"IHDR", at) + 4,
    "webp": lambda at, data: data.index(b"VP8L", at) + 9,
    "jpeg": lambda at, data: data.index(b"\xff\xc0", at) + 5,
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_a_part_of_a_whole_image_that_claims_to_be_larger_is_refused(tmp_path, kind):
    rgba = np.dstack([COLOUR, COLOUR[:, :, 0]])
    options = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
    if kind == "jpeg":  # a page per channel: RGB is decoded by Pillow
        rgba, options = np.moveaxis(COLOUR, 2, 0), {"photometric": "minisblack"}
    content = tiff(rgba, compression=kind, tile=(64, 64), **options)
    assert decode(content, "x").pixels.shape[:2] == COLOUR.shape[:2]
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        at = CLAIMS[kind](file.pages.first.dataoffsets[0], content)
    hostile = content[:at] + b"\x0f\xff\x0f\xff" + content[at + 4 :]
    with pytest.raises(BadImage, match="a part of 64 x 64 pixels says that it has"):
        decode(hostile, "x")
    (tmp_path / "a.tif").write_bytes(hostile)
    with pytest.raises(BadImage, match="a part of 64 x 64 pixels says that it has"):
        open_source(tmp_path, tiles=50).decode(0)


def test_a_jpeg_that_hides_its_size_is_refused():
    content = tiff(np.moveaxis(COLOUR, 2, 0), photometric="minisblack", compression="jpeg", tile=(64, 64))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        at = content.index(b"\xff\xdb", file.pages.first.dataoffsets[0])
    with pytest.raises(BadImage, match="does not say its size"):
        decode(content[:at] + b"\0" + content[at + 1 :], "x")


class Bomb:
    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, "exploded", True)


def test_nothing_is_unpickled():
    data = npy(np.array([Bomb()], dtype=object), allow_pickle=True)
    pickle.loads(data[data.index(b"\x80") :])  # the planted fault works ...
    assert Bomb.exploded
    Bomb.exploded = False
    with pytest.raises(BadImage, match=r"x\.npy"):
        decode(data, "x.npy")
    assert not Bomb.exploded  # ... and is never run


FUZZED = {
    "jpeg": encoded(Image.fromarray(COLOUR), "JPEG"),
    "png": PNG,
    "png16": PNG16,
    "webp": encoded(Image.fromarray(COLOUR), "WEBP"),
    "tiff": tiff(COLOUR.astype(np.uint16), compression="lzw"),
    "npy": npy(COLOUR),
}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(FUZZED)),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6),
)
def test_damaged_files_give_pixels_or_bad_image_and_nothing_else(kind, changes):
    data = bytearray(FUZZED[kind])
    for position, value in changes:
        data[position % len(data)] = value
    try:
        pixels = decode(bytes(data), "x").pixels
    except BadImage:
        return
    assert pixels.ndim == 3
    assert pixels.dtype in (np.uint8, np.uint16, np.float32)


def talkative_files() -> dict[str, bytes]:
    """Damage that decoders log, by name."""
    many = bytearray(encoded(Image.fromarray(COLOUR), "TIFF"))
    for tag, value in ((277, 7), (262, 5)):  # seven samples per pixel, of CMYK
        many[many.index(struct.pack("<HHI", tag, 3, 1)) + 8] = value
    stray = tiff(COLOUR.astype(np.uint16)).replace(
        struct.pack("<HHI", 282, 5, 1), struct.pack("<HHI", 282, 99, 1)
    )
    cut = compressed(imagecodecs.jpegls_encode(COLOUR)[:300], COLOUR, "1.2.840.10008.1.2.4.80", "RGB")
    files = {"many.tif": bytes(many), "stray.tif": stray, "cut.dcm": cut, "words.jpg": b"words"}
    files["bad.dcm"] = Path(str(get_testdata_file("badVR.dcm", download=False))).read_bytes()
    for position in range(60, 400, 7):
        flipped = bytearray(PNG16)
        flipped[position] ^= 64
        files[f"{position}.png"] = bytes(flipped)
        flipped = bytearray(FUZZED["jpeg"])
        flipped[-position] ^= 64
        files[f"{position}.jpg"] = bytes(flipped)
    return files


def decode_all(files: dict[str, bytes]) -> None:
    for name, data in files.items():
        with suppress(BadImage):
            decode(data, name)


def test_decoders_keep_quiet(capfd, caplog, monkeypatch):
    """Libraries that print to the process's stderr would tear the progress bar."""
    files = talkative_files()
    with caplog.at_level(logging.WARNING):
        decode_all(files)
        assert not caplog.records
        monkeypatch.setattr(decoding, "_LOGGERS", ())
        decode_all(files)  # the planted fault: they do have something to say
    assert {record.name for record in caplog.records} == set(TALKATIVE)
    assert capfd.readouterr() == ("", "")
