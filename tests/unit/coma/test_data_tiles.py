"""--tiles: windows of large images are exactly those of the whole image, whatever the file looks like."""

import io
import json
import pickle
import re
import struct
import tarfile
from itertools import product

import imagecodecs
import numpy as np
import pytest
import tifffile
from dicom_files import dicom
from encoded_images import encoded, npy, tiff
from PIL import Image, ImageFile
from skimage import data as pictures

from coma.config import DataConfig
from coma.data import BatchLayout, compute_mean_std, decode_tiff, open_source, training_batches
from coma.data.codestreams import codestream_size
from coma.data.decode import decode
from coma.data.listing import changes, list_data
from coma.data.pack import _key
from coma.data.windows import Recent, Window, parse_window
from coma.errors import BadImage, BadInput
from coma.image_size import ImageSize

COLOUR = pictures.coffee()[:201, :323]  # [201, 323, 3], odd sides
GREY = COLOUR[:, :, 0]
FIVE = np.dstack([COLOUR, COLOUR[:, :, :2] // 2])
TILE = 100


def windows_of(folder, tile: int = TILE):
    """The images of all windows by name, and the source."""
    source = open_source(folder, tiles=tile)
    names, _ = source.listing()
    return dict(zip(names, (source.decode(i) for i in range(len(source))), strict=True)), source


def box(name: str) -> tuple[int, int, int, int]:
    left, top, width, height = map(int, re.findall(r"\d+", name.split("xywh=")[1]))
    return top, left, height, width


def assert_windows(folder, name: str, whole: np.ndarray, tolerance: float = 0) -> None:
    """Every window shows its part of the whole, and every pixel is in a window."""
    found, _ = windows_of(folder)
    seen = np.zeros(whole.shape[:2], int)
    assert len(found) == np.prod([-(-side // TILE) for side in whole.shape[:2]])
    for each, image in found.items():
        assert each.startswith(f"{name}#xywh=")
        top, left, height, width = box(each)
        assert (height, width) == (TILE, TILE)
        expected = whole[top : top + height, left : left + width]
        assert image.pixels.dtype == whole.dtype
        assert np.abs(image.pixels.astype(float) - expected).max() <= tolerance
        seen[top : top + height, left : left + width] += 1
    assert seen.min() == 1


LAYOUTS = [
    {},
    {"rowsperstrip": 7},
    {"compression": "zlib", "rowsperstrip": 13, "predictor": True},
    {"compression": "lzw", "rowsperstrip": 1000},
    {"tile": (64, 80)},
    {"tile": (64, 80), "compression": "zstd", "predictor": True, "bigtiff": True},
    {"tile": (512, 512), "compression": "zlib", "byteorder": ">"},
]


@pytest.mark.parametrize(
    ("layout", "kind"),
    list(product(LAYOUTS, ("uint8", "uint16", "float32"))),
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_windows_of_a_tiff_are_those_of_the_whole_image(tmp_path, layout, kind, planar):
    pixels = FIVE.astype(kind) * (3 if kind == "uint16" else 1)
    stored = pixels if planar == "contig" else np.moveaxis(pixels, 2, 0)
    plain = {"photometric": "minisblack", "planarconfig": planar, "metadata": None}
    (tmp_path / "a.tif").write_bytes(tiff(stored, **plain, **layout))
    assert_windows(tmp_path, "a.tif", pixels)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (64, 64)}], ids=["plain", "tiled"])
def test_channels_in_pages_are_put_together(tmp_path, options):
    (tmp_path / "a.tif").write_bytes(tiff(np.moveaxis(FIVE, 2, 0), photometric="minisblack", **options))
    assert_windows(tmp_path, "a.tif", FIVE)


def test_channels_in_pages_of_one_large_strip_are_decoded_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_tiff, "_LARGEST_SEGMENT", 1000)
    stored = tiff(np.moveaxis(FIVE, 2, 0), photometric="minisblack", compression="zlib", rowsperstrip=1000)
    (tmp_path / "a.tif").write_bytes(stored)
    assert_windows(tmp_path, "a.tif", FIVE)


@pytest.mark.parametrize("colours", ["rgb", "ycbcr", "minisblack"])
def test_tiles_of_jpegs_are_decoded_on_their_own(tmp_path, colours):
    """As in the files of slide scanners."""
    pixels = GREY if colours == "minisblack" else COLOUR
    content = tiff(pixels, photometric=colours, compression="jpeg", tile=(64, 64))
    (tmp_path / "a.tif").write_bytes(content)
    assert_windows(tmp_path, "a.tif", decode(content, "x").pixels, tolerance=4)


def test_white_is_zero_opacity_and_orientation_are_as_in_whole_images(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(GREY, photometric="miniswhite", tile=(64, 64), compression="zlib"))
    assert_windows(tmp_path, "a.tif", 255 - GREY[:, :, None])
    rgba = np.dstack([COLOUR, np.full(GREY.shape, 128, np.uint8)])
    content = tiff(rgba, extrasamples=["assocalpha"], photometric="rgb", tile=(64, 64), compression="zlib")
    (tmp_path / "a.tif").write_bytes(content)
    assert_windows(tmp_path, "a.tif", decode(content, "x").pixels)
    turned = tiff(
        COLOUR, photometric="rgb", tile=(64, 64), compression="zlib", extratags=[(274, 3, 1, 6, True)]
    )
    (tmp_path / "a.tif").write_bytes(turned)
    found, _ = windows_of(tmp_path)
    first = found["a.tif#xywh=0,0,100,100"].pixels
    assert np.array_equal(first, np.rot90(COLOUR[:100, :100], -1))
    assert np.array_equal(first, decode(turned, "x").pixels[:100, -100:])


def test_missing_values_are_marked_in_windows_and_empty_windows_are_named(tmp_path):
    heights = GREY.astype(np.float32)
    heights[:120, :120] = -9999
    tag = (42113, "s", 0, "-9999", True)
    (tmp_path / "a.tif").write_bytes(
        tiff(heights, extratags=[tag], tile=(64, 64), compression="zlib", metadata=None)
    )
    source = open_source(tmp_path, tiles=TILE)
    with pytest.raises(BadImage, match=r"a\.tif#xywh=0,0,100,100: every value is nodata"):
        source.decode(0)
    image = source.decode(1)
    assert image.missing is not None
    assert np.array_equal(image.missing[:, :, 0], heights[:100, 100:200] == -9999)
    compute_mean_std(source, 1, workers=0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "CMYK", "palette", "npy", "npy by columns"])
def test_other_formats_are_cut_too(tmp_path, kind):
    picture = Image.fromarray(COLOUR)
    content = {
        "CMYK": lambda: encoded(picture.convert("CMYK"), "TIFF"),
        "palette": lambda: encoded(picture.quantize(32), "PNG"),
        "npy": lambda: npy(COLOUR.astype(np.uint16)),
        "npy by columns": lambda: npy(np.asfortranarray(np.moveaxis(COLOUR, 2, 0))),
    }.get(kind, lambda: encoded(picture, kind))()
    name = "a.npy" if "npy" in kind else "a.png"
    (tmp_path / name).write_bytes(content)
    assert_windows(tmp_path, name, decode(content, "x").pixels)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_windows_of_photographs_are_cut_from_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(Image.fromarray(COLOUR), "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(content)
    assert_windows(tmp_path, "a.jpg", decode(content, "x").pixels)


@pytest.mark.parametrize("place", ["before", "behind", "16 bit"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_windows_of_pngs_are_cut_from_the_upright_image(tmp_path, place, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(Image.fromarray(COLOUR), "PNG", exif=exif)
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4])
    chunk, rest = content[start:end], content[:start] + content[end:]
    if place == "behind":
        content = rest[:-12] + chunk + rest[-12:]  # IEND has 12 bytes
    elif place == "16 bit":
        deep = bytes(imagecodecs.png_encode(COLOUR.astype(np.uint16)))
        content = deep[:33] + chunk + deep[33:]  # behind IHDR
    (tmp_path / "a.png").write_bytes(content)
    whole = decode(content, "x").pixels
    assert whole.shape[:2] == (COLOUR.shape[:2] if orientation == 1 else COLOUR.shape[1::-1])
    assert_windows(tmp_path, "a.png", whole)


def test_sizes_of_pngs_are_read_without_their_pixels(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(COLOUR), "PNG"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    assert len(open_source(tmp_path, tiles=TILE)) == 12


def test_images_that_are_no_larger_are_read_as_before(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(COLOUR), "PNG"))
    (tmp_path / "b.jpg").write_bytes(encoded(Image.fromarray(COLOUR[:100, :100]), "JPEG"))
    source, plain = open_source(tmp_path, tiles=TILE), open_source(tmp_path)
    assert source.summary() == (
        f"{tmp_path}: 2 images (1 .jpg, 1 .png); --tiles 100: 12 windows of 1 image, 1 whole"
    )
    assert source.describe(12) == plain.describe(1)
    assert source.read_bytes(12) == plain.read_bytes(1)
    assert source.read_bytes(0) is None
    wide = open_source(tmp_path, tiles=250)
    assert [box(name) for name in wide.listing()[0][:2]] == [(0, 0, 201, 250), (0, 73, 201, 250)]


def test_every_frame_of_a_dicom_file_is_an_image(tmp_path):
    frames = np.stack([GREY, 255 - GREY, GREY // 2])
    (tmp_path / "a.dcm").write_bytes(dicom(frames, frames=3))
    whole, _ = windows_of(tmp_path, 512)
    assert list(whole) == ["a.dcm#frame=1", "a.dcm#frame=2", "a.dcm#frame=3"]
    assert all(np.array_equal(image.pixels[:, :, 0], frames[i]) for i, image in enumerate(whole.values()))
    cut, source = windows_of(tmp_path)
    assert len(cut) == 36
    assert np.array_equal(cut["a.dcm#frame=2&xywh=223,101,100,100"].pixels[:, :, 0], frames[1][101:, 223:])
    assert source.summary().endswith("--tiles 100: 36 windows of 1 image, 0 whole")


# what builds on it -------------------------------------------------------------------------------


def classes(folder) -> None:
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        (folder / name / "a.tif").write_bytes(
            tiff(COLOUR + np.uint8(number), photometric="rgb", tile=(64, 64))
        )


def test_an_epoch_has_every_window_once_and_starts_anywhere(tmp_path):
    classes(tmp_path)
    source = open_source(tmp_path, tiles=TILE)
    data = DataConfig(image_size=ImageSize.of(32), workers=0)
    layout = BatchLayout(8, 8)
    batches = training_batches(source, data, channels=3, seed=1, batch=layout)
    epoch = [next(batches) for _ in range(3)]
    assert sorted(i for batch in epoch for i in batch.indices.tolist()) == list(range(24))
    sent = pickle.loads(pickle.dumps(source))  # as to a worker
    later = training_batches(sent, data, channels=3, seed=1, batch=layout, start=8)
    assert (next(later).images == epoch[1].images).all()


def test_labels_and_listing_are_those_of_windows(tmp_path):
    classes(tmp_path)
    source = open_source(tmp_path, tiles=TILE)
    labels = source.labels
    assert labels is not None
    assert labels.tolist() == [0] * 12 + [1] * 12
    assert source.class_names == ("cat", "dog")
    before = list_data({"images": source})
    assert len(json.loads(json.dumps(before))["images"]["names"]) == 24
    with (tmp_path / "dog" / "a.tif").open("ab") as file:
        file.write(b"0")
    (now,) = changes(before, list_data({"images": open_source(tmp_path, tiles=TILE)}))
    assert now.startswith("the images have changed: 12 of another size (dog/a.tif#xywh=0,0,100,100 ")


def test_names_of_windows_are_read_back():
    for window in (Window(None, (0, 512, 64, 32)), Window(2, None), Window(0, (1, 2, 3, 4))):
        assert parse_window(f"a#1.tif{window}") == ("a#1.tif", window)
    for name in ("a.tif", "a.tif#", "#xywh=0,0,1,1", "a#xywh=0,0,1", "a.tif#photo"):
        assert parse_window(name) is None
    assert _key(7, "x/big one.tif#xywh=512,0,64,64") == "00000007-big_one_xywh_512_0_64_64"
    assert _key(7, "x/00000003-a.jpg") == "00000007-a"


def test_files_inside_other_files_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(COLOUR), "PNG"))
        tar.add(tmp_path / "a.png", "a.png")
    with pytest.raises(BadInput, match=r"--tiles cuts image files on a disk.*coma pack --tiles"):
        open_source(tmp_path / "a.tar", tiles=TILE)


# damage and cost ---------------------------------------------------------------------------------


def test_what_cannot_be_read_is_one_named_image_and_the_others_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(COLOUR), "PNG"))
    (tmp_path / "b.jpg").write_bytes(b"words")
    (tmp_path / "c.tif").write_bytes(tiff(COLOUR, photometric="rgb")[:100])
    source = open_source(tmp_path, tiles=TILE)
    assert len(source) == 14
    for i, name in ((12, "b.jpg"), (13, "c.tif")):
        with pytest.raises(BadImage, match=rf"{name}: ") as raised:
            source.decode(i)
        assert str(raised.value).count(name) == 1
        assert source.read_bytes(i) is None


def test_a_file_that_shrinks_after_it_was_listed_is_named(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(COLOUR, photometric="rgb", tile=(64, 64), compression="zlib"))
    (tmp_path / "b.tif").write_bytes(tiff(COLOUR, photometric="rgb"))
    source = open_source(tmp_path, tiles=TILE)
    (tmp_path / "a.tif").write_bytes(tiff(COLOUR[:150], photometric="rgb", tile=(64, 64), compression="zlib"))
    with pytest.raises(BadImage, match=r"a\.tif#xywh=223,101,100,100: .*has changed since it was listed"):
        source.decode(11)
    whole = (tmp_path / "b.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadImage, match=r"b\.tif#xywh=223,101,100,100: is truncated"):
        source.decode(23)
    (tmp_path / "b.tif").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.decode(23)


def test_one_large_compressed_strip_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_tiff, "_LARGEST_SEGMENT", 1000)
    monkeypatch.setattr(decode_tiff, "MAX_VALUES", 10_000)
    (tmp_path / "a.tif").write_bytes(tiff(COLOUR, photometric="rgb", compression="zlib", rowsperstrip=1000))
    (tmp_path / "b.tif").write_bytes(tiff(COLOUR, photometric="rgb", rowsperstrip=1000))
    source = open_source(tmp_path, tiles=TILE)
    assert len(source) == 13  # a file without compression can always be read
    with pytest.raises(BadImage, match=r"a\.tif: 201 x 323 pixels are stored in pieces.*gdal_translate -co"):
        source.decode(0)


def test_costly_layouts_are_named_and_cheap_ones_are_not(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(COLOUR, photometric="rgb", compression="zlib", rowsperstrip=1000))
    (tmp_path / "b.tif").write_bytes(tiff(COLOUR, photometric="rgb", compression="zlib", tile=(32, 32)))
    (tmp_path / "c.tif").write_bytes(tiff(COLOUR, photometric="rgb"))
    (note,) = open_source(tmp_path, tiles=64).notes
    assert note.startswith(f"1 image ({tmp_path}/a.tif): not stored in small tiles, so up to 16 times")
    assert open_source(tmp_path, tiles=300).notes == ()


def test_impossible_numbers_of_windows_are_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(COLOUR, photometric="rgb", tile=(64, 64)))
    content = tiff(GREY)
    for tag, side in ((256, GREY.shape[1]), (257, GREY.shape[0])):  # ImageWidth and ImageLength
        before, after = (struct.pack("<HHII", tag, 4, 1, value) for value in (side, 2**31 - 1))
        assert before in content
        content = content.replace(before, after)
    (tmp_path / "b.tif").write_bytes(content)
    source = open_source(tmp_path, tiles=32)
    assert len(source) == 78
    with pytest.raises(BadImage, match=r"b\.tif: "):
        source.decode(77)


def test_a_tile_that_claims_to_be_larger_is_refused(tmp_path):
    content = tiff(COLOUR, photometric="rgb", compression="jpeg", tile=(64, 64))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        first = file.pages.first.dataoffsets[0]
    at = content.index(b"\xff\xc0", first) + 5
    (tmp_path / "a.tif").write_bytes(content[:at] + b"\xff\xff\xff\xff" + content[at + 4 :])
    with pytest.raises(BadImage, match="a part of 64 x 64 pixels says that it has 65535 x 65535"):
        open_source(tmp_path, tiles=TILE).decode(0)


@pytest.mark.parametrize(
    "stream",
    [
        imagecodecs.jpeg_encode(COLOUR),
        imagecodecs.jpegls_encode(COLOUR),
        imagecodecs.jpeg2k_encode(COLOUR, codecformat="J2K"),
        imagecodecs.jpeg2k_encode(COLOUR, codecformat="JP2"),
        imagecodecs.ljpeg_encode(GREY),
        imagecodecs.png_encode(COLOUR),
        imagecodecs.webp_encode(COLOUR, lossless=True),
        encoded(Image.fromarray(COLOUR), "WEBP", quality=50),
        encoded(Image.fromarray(COLOUR), "WEBP", exif=Image.Exif()),
    ],
)
def test_the_size_of_streams_is_read(stream):
    assert codestream_size(bytes(stream)) == (201, 323)
    assert codestream_size(b"PNG") is None
    for cut in range(60):
        codestream_size(bytes(stream[:cut]))


def test_what_was_decoded_is_kept_up_to_a_limit():
    recent, made = Recent(100), []

    def item(key, size):
        return recent.get(key, size, lambda: made.append(key) or key)

    for key, size in (
        ("a", 40),
        ("b", 40),
        ("a", 40),
        ("c", 40),
        ("a", 40),
        ("b", 40),
        ("d", 500),
        ("d", 500),
    ):
        assert item(key, size) == key
    assert made == ["a", "b", "c", "b", "d"]
