"""Uploads: what is fine is read as people see it, what is not is refused in plain words."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image
from upload_files import NOISE, animations, bad_files, good_files, saved

from coma.errors import BadImage
from demo import upload
from demo.storage import Storage
from demo.upload import MAX_PIXELS, MAX_SIDE, Uploads, read_picture


def test_bad_files_are_refused_by_what_they_are(tmp_path):
    files = bad_files(tmp_path / "bad")
    uploads = Uploads(Storage(tmp_path))
    for name, path in files.items():
        with pytest.raises(BadImage) as told:
            uploads.read(str(path), 3)
        expected = name.split(".")[0].split(" (")[0]
        text = str(told.value)
        assert expected.replace("not a picture", "is not a picture") in text, f"{name}: {text}"
        assert str(tmp_path) not in text


def test_good_files_are_read_as_people_see_them(tmp_path):
    files = good_files(tmp_path / "good")
    uploads = Uploads(Storage(tmp_path))
    shapes = {name: uploads.read(str(path), 3).shape for name, path in files.items()}
    assert shapes.pop("turned.jpg") == (60, 40, 3)
    assert shapes.pop("large.jpg") == (MAX_SIDE, MAX_SIDE * 3 // 4, 3)
    assert set(shapes.values()) == {(40, 60, 3)}
    assert np.allclose(uploads.read(str(files["16 bit.png"]), 3), NOISE / 255, atol=1e-6)
    assert (uploads.read(str(files["transparent.png"]), 3) == 255).all()  # laid over white
    assert uploads.read(str(files["grey.png"]), 1).shape == (40, 60, 1)
    with pytest.raises(BadImage, match="5 channels"):
        uploads.read(str(files["grey.png"]), 5)


def test_floats_in_a_unit_of_their_own_are_refused():
    def floats(*values: float) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.array([values] * 2, np.float32)).save(file, "TIFF")
        return file.getvalue()

    assert read_picture(floats(0, 0.25, 1)).pixels[0, :, 0].tolist() == [0, 0.25, 1]
    for values in ((0, 1000), (-0.5, 1)):
        with pytest.raises(BadImage, match=f"numbers from {values[0]:g} to {values[1]:g}, and"):
            read_picture(floats(*values))


def test_the_first_frame_of_an_animation_is_used_and_said(tmp_path):
    uploads = Uploads(Storage(tmp_path))
    for kind, path in animations(tmp_path / "moving").items():
        picture = uploads.open(str(path))
        assert picture.describe(3).startswith(f"60 x 40 px, {kind}, ") and picture.animated, kind
        assert picture.describe(3).endswith("animated: this is the first frame"), kind
        error = np.abs(uploads.read(str(path), 3).astype(int) - NOISE).mean()
        assert error < 45 < np.abs(255 - NOISE.astype(int) - NOISE).mean(), (kind, error)  # 256 colours
    still = uploads.open(str(good_files(tmp_path / "good")["still.gif"]))
    assert not still.animated and "first frame" not in still.describe(3)


def test_heic_without_its_extra_is_said(tmp_path, monkeypatch):
    heic = good_files(tmp_path)["still.heic"].read_bytes()
    assert read_picture(heic).describe(3).startswith("60 x 40 px, HEIC, ")
    monkeypatch.setattr(upload, "HEIC", False)
    with pytest.raises(BadImage, match="HEIC pictures are not supported here"):
        read_picture(heic)


def test_nothing_is_decoded_before_its_header_was_read(tmp_path, monkeypatch):
    path = bad_files(tmp_path)["too large.png"]
    monkeypatch.setattr(upload, "decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(BadImage, match=f"at most {MAX_PIXELS // 10**6} megapixels"):
        read_picture(path.read_bytes())
    monkeypatch.setattr(upload, "MAX_PIXELS", 10**9)  # the guard that did it
    with pytest.raises(pytest.fail.Exception):
        read_picture(path.read_bytes())


def tiff(compression: int, content: bytes, pages: int = 1) -> bytes:
    """A TIFF of 8 by 8 grey pixels in one strip; every page shows it."""
    tags = {256: 8, 257: 8, 258: 8, 259: compression, 262: 1, 277: 1, 278: 8, 279: len(content)}
    size = 2 + 12 * (len(tags) + 1) + 4
    directories = bytearray()  # which grows in place
    for page in range(1, pages + 1):
        fields = sorted({**tags, 273: 8 + pages * size}.items())
        following = 8 + page * size if page < pages else 0
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
        directories += struct.pack("<H", len(fields)) + entries + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", 8) + directories + content


def encoded(kind: str, side: int = 8, **options) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side), 90).save(file, kind, **options)
    return file.getvalue()


def bmp(width: int, height: int, runs: bytes) -> bytes:
    """A BMP of one grey, with runs of equal pixels."""
    start = 14 + 40 + 1024
    return (
        b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
        + bytes(1024) + runs
    )  # fmt: skip


def test_what_costs_more_than_its_size_says_is_not_decoded(monkeypatch):
    """Such files, sent twice, would hold both places for hours, or take the server's memory."""
    jpeg = encoded("JPEG", 800, progressive=True)
    scan = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    hostile = {
        "scans": jpeg[:-2] + scan * 10_000 + b"\xff\xd9",
        "pages": tiff(1, bytes(64), pages=50_000),
        "too long": bmp(12_000_000, 4, b"\0\2\0\xff"),
        "TIFF compression": tiff(50001, encoded("WEBP", 2000)),
        "compression is not supported": tiff(7, encoded("JPEG")),
    }
    for name in ("GifImageFile", "TiffImageFile"):  # counting pages is what costs
        kind = getattr(__import__(f"PIL.{name[:-9]}ImagePlugin", fromlist=[name]), name)
        monkeypatch.setattr(kind, "n_frames", property(lambda _: pytest.fail("counted")))
    with monkeypatch.context() as patch:
        patch.setattr(upload, "decode", lambda *_, **__: pytest.fail("decoded"))
        for name, data in hostile.items():
            with pytest.raises(BadImage, match=name):
                read_picture(data)
    fine = [
        jpeg, tiff(1, bytes(64)), tiff(8, zlib.compress(bytes(64))), bmp(8, 1, b"\x08\1\0\1"),
        encoded("TIFF", compression="tiff_lzw"), encoded("TIFF", compression="packbits"),
        encoded("TIFF", compression="zstd"),
    ]  # fmt: skip
    for data in fine:
        assert read_picture(data).pixels.ndim == 3


def test_files_of_too_many_bytes_are_not_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path / "noise.png", Image.fromarray(NOISE))
    assert read_picture(path.read_bytes()).pixels.shape == NOISE.shape
    monkeypatch.setattr(upload, "MAX_BYTES", 1000)
    with pytest.raises(BadImage, match="larger than"):
        read_picture(path.read_bytes())


def test_few_are_decoded_at_a_time_and_each_once(tmp_path, monkeypatch):
    paths = [saved(tmp_path / f"{i}.png", Image.fromarray(NOISE + i)) for i in range(6)]
    running, most, calls, lock = 0, 0, 0, threading.Lock()

    def slow(data: bytes):
        nonlocal running, most, calls
        with lock:
            running, calls = running + 1, calls + 1
            most = max(most, running)
        threading.Event().wait(0.05)
        with lock:
            running -= 1
        return read_picture(data)

    monkeypatch.setattr(upload, "read_picture", slow)
    uploads = Uploads(Storage(tmp_path))
    threads = [threading.Thread(target=uploads.read, args=(str(path), 3)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == upload.AT_ONCE and calls == 6
    uploads.read(str(paths[-1]), 3)
    assert calls == 6


def test_a_picture_that_is_gone_is_said_to_be(tmp_path):
    with pytest.raises(BadImage, match="no longer exists"):
        Uploads(Storage(tmp_path)).read(str(tmp_path / "gone.png"), 3)
