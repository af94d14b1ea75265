"""Decoding: every format, depth, orientation and colour model to the right pixels."""

import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from encoded_images import COLOUR, encoded, npy, tiff
from PIL import Image

from coma.data import open_source
from coma.data.channels import convert_channels
from coma.data.decode import decode
from coma.data.image import DecodedImage
from coma.errors import BadImage

GREY = COLOUR[:, :, 1]
ORIENTATION = 0x0112
RNG = np.random.default_rng(0)


# formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_pixels_that_went_in(kind, options):
    assert (decode(encoded(Image.fromarray(COLOUR), kind, **options), "x").pixels == COLOUR).all()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("WEBP", {"quality": 95}),
        ("TIFF", {"compression": "jpeg", "quality": 95}),
    ],
)
def test_lossy_formats_come_close(kind, options):
    pixels = decode(encoded(Image.fromarray(COLOUR), kind, **options), "x").pixels
    assert np.abs(pixels.astype(int) - COLOUR).mean() < 4


def test_grey_images_have_one_channel():
    for kind in ("PNG", "BMP", "TIFF", "JPEG"):
        pixels = decode(encoded(Image.fromarray(GREY), kind), "x").pixels
        assert pixels.shape == (61, 83, 1)
        assert np.abs(pixels[:, :, 0].astype(int) - GREY).mean() < 2


def test_one_bit_images_are_black_and_white():
    bits = GREY > 100
    for kind in ("PNG", "TIFF", "BMP"):
        assert (decode(encoded(Image.fromarray(bits), kind), "x").pixels[:, :, 0] == bits * 255).all()
    assert (decode(npy(bits), "x").pixels[:, :, 0] == bits * 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_palettes_become_colours(kind):
    palette = Image.fromarray(COLOUR).quantize(64)
    assert (decode(encoded(palette, kind), "x").pixels == np.asarray(palette.convert("RGB"))).all()


def test_transparent_palettes_keep_their_opacity():
    palette = Image.fromarray(COLOUR).quantize(16)
    picture = decode(encoded(palette, "PNG", transparency=3), "x")
    assert picture.alpha
    assert ((picture.pixels[:, :, 3] == 0) == (np.asarray(palette) == 3)).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind):
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    pixels = decode(encoded(cmyk, kind), "x").pixels
    assert pixels.shape == COLOUR.shape
    assert np.abs(pixels.astype(int) - COLOUR).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_a_channel_until_it_is_adapted(kind):
    pixels = np.dstack([COLOUR, RNG.integers(1, 256, GREY.shape, np.uint8)])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    picture = decode(encoded(Image.fromarray(pixels), kind, **options), "x")
    assert picture.alpha
    assert (picture.pixels == pixels).all()


# precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_keeps_every_bit(channels):
    pixels = RNG.integers(0, 65536, (11, 13, channels), np.uint16)
    picture = decode(bytes(imagecodecs.png_encode(pixels.squeeze())), "x")
    assert picture.pixels.dtype == np.uint16
    assert (picture.pixels == pixels).all()
    assert picture.alpha == (channels in (2, 4))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "float32", "float16", "float64"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((19, 23), {}),
        ((19, 23, 3), {"photometric": "rgb"}),
        ((3, 19, 23), {"photometric": "rgb", "planarconfig": "separate"}),
        ((19, 23, 7), {"photometric": "minisblack", "planarconfig": "contig"}),
        ((7, 19, 23), {"photometric": "minisblack", "planarconfig": "separate"}),
        ((7, 19, 23), {"metadata": {"axes": "CYX"}}),
        ((7, 19, 23), {"photometric": "minisblack"}),  # one page per channel
        ((19, 23, 7), {"photometric": "minisblack"}),  # tifffile's default: one page per row
        ((7, 19, 23), {"metadata": None, "photometric": "minisblack", "compression": "zlib"}),
        ((19, 23, 3), {"photometric": "rgb", "compression": "lzw", "bigtiff": True}),
    ],
)
def test_tiff_of_any_layout_and_depth(shape, options, dtype):
    array = (RNG.random(shape) * (1 if "f" in dtype else 255)).astype(dtype)
    want = np.moveaxis(array, 0, 2) if shape[0] in (3, 7) else array.reshape(19, 23, -1)
    picture = decode(tiff(array, **options), "x")
    assert not picture.alpha
    kept = np.float32 if "f" in dtype else np.dtype(dtype).newbyteorder("=")
    assert picture.pixels.dtype == kept
    assert (picture.pixels == want.astype(kept)).all()


def test_npy_layouts():
    array = RNG.integers(0, 65536, (20, 30, 5), np.uint16)
    for shaped in (array, np.moveaxis(array, 2, 0), np.asfortranarray(array)):
        assert (decode(npy(shaped), "x").pixels == array).all()
    assert (decode(npy(array[:, :, 0]), "x").pixels[:, :, 0] == array[:, :, 0]).all()


@pytest.mark.parametrize("shape", [(8, 30, 8), (30, 30, 30), (4, 20, 30, 3), (30,)])
def test_arrays_that_could_be_read_in_two_ways_are_refused(shape):
    with pytest.raises(BadImage, match=r"^scan\.npy: shape"):
        decode(npy(np.zeros(shape, np.uint8)), "scan.npy")


def test_stacks_of_frames_are_refused():
    with pytest.raises(BadImage, match="one file per frame"):
        decode(tiff(np.zeros((5, 20, 30), np.uint8), metadata={"axes": "ZYX"}), "x.tif")


PAGES = {
    "RGB": (lambda image: image, {}),
    "palette": (lambda image: image.quantize(16), {}),
    "CMYK": (lambda image: image.convert("CMYK"), {}),
    "1 bit": (lambda image: image.convert("1"), {}),
    "JPEG": (lambda image: image, {"compression": "jpeg"}),
}


@pytest.mark.parametrize("kind", PAGES)
def test_frames_of_all_kinds_of_tiff_are_refused_and_thumbnails_are_not(tmp_path, kind):
    convert, options = PAGES[kind]
    first, second = (convert(Image.fromarray(each)) for each in (COLOUR, COLOUR[::-1].copy()))
    stack = encoded(first, "TIFF", save_all=True, append_images=[second], **options)
    with pytest.raises(BadImage, match=r"^x\.tif: axes .* are not one image: save one file per frame"):
        decode(stack, "x.tif")
    (tmp_path / "x.tif").write_bytes(stack)
    with pytest.raises(BadImage, match="save one file per frame"):
        open_source(tmp_path, tiles=50).decode(0)
    small = convert(Image.fromarray(COLOUR[::4, ::4].copy()))
    with_thumbnail = encoded(first, "TIFF", save_all=True, append_images=[small], **options)
    alone = decode(encoded(first, "TIFF", **options), "x.tif").pixels
    assert (decode(with_thumbnail, "x.tif").pixels == alone).all()


def test_grey_pages_are_channels_however_they_are_compressed():
    pages = [Image.fromarray(COLOUR[:, :, channel]) for channel in range(3)]
    for compression in ("tiff_lzw", "jpeg"):
        options = {"save_all": True, "append_images": pages[1:], "compression": compression}
        pixels = decode(encoded(pages[0], "TIFF", **options), "x").pixels
        assert pixels.shape == COLOUR.shape
        assert np.abs(pixels.astype(int) - COLOUR).mean() < 4


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint32", "complex64"])
def test_values_without_a_known_white_are_refused(dtype):
    with pytest.raises(BadImage, match=f"{dtype} pixels are not supported"):
        decode(npy(np.zeros((20, 30), dtype)), "x")


def test_white_is_zero_and_premultiplied_opacity_are_undone():
    ramp = np.arange(400, dtype=np.uint16).reshape(20, 20) * 100
    assert (decode(tiff(ramp, photometric="miniswhite"), "x").pixels[:, :, 0] == 65535 - ramp).all()
    alpha = np.full((20, 20, 1), 32768, np.uint16)
    stored = np.concatenate([np.repeat(ramp[:, :, None] // 2, 3, 2), alpha], 2)
    pixels = decode(tiff(stored, photometric="rgb", extrasamples=["assocalpha"]), "x").pixels
    assert np.abs(pixels[:, :, 0].astype(int) - ramp).max() <= 2


# orientation ------------------------------------------------------------------------------------


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores, by the EXIF table: which side of the scene is row 0, which is column 0."""
    rows_cols = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: upright[:, ::1].swapaxes(0, 1)[::-1],
        7: upright[::-1, ::-1].swapaxes(0, 1), 8: upright.swapaxes(0, 1)[:, ::-1],
    }  # fmt: skip
    return np.ascontiguousarray(rows_cols[orientation])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "PNG16"])
def test_pictures_come_out_upright(kind, orientation):
    stored = stored_as(COLOUR, orientation)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"exif": exif.tobytes()}
    if kind == "TIFF":
        options = {"tiffinfo": {ORIENTATION: orientation}}
    if kind == "WEBP":
        options |= {"lossless": True}
    if kind == "PNG16":
        data = with_exif(bytes(imagecodecs.png_encode(stored.astype(np.uint16) * 257)), exif.tobytes())
    else:
        data = encoded(Image.fromarray(stored), kind, **options)
    pixels = decode(data, "x").pixels
    pixels = pixels // 257 if kind == "PNG16" else pixels
    assert pixels.shape == COLOUR.shape
    assert np.abs(pixels.astype(int) - COLOUR).mean() < (5 if kind == "JPEG" else 1e-9)


def with_exif(png: bytes, exif: bytes) -> bytes:
    """Insert an eXIf chunk behind the header of a PNG."""
    body = b"eXIf" + exif.removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:33] + chunk + png[33:]


def test_16_bit_tiff_is_turned_too():
    stored = stored_as(COLOUR, 6).astype(np.uint16) * 257
    data = tiff(stored, photometric="rgb", extratags=[(ORIENTATION, "H", 1, 6, True)])
    assert (decode(data, "x").pixels == COLOUR.astype(np.uint16) * 257).all()


def test_damaged_metadata_does_not_make_a_picture_bad():
    data = encoded(Image.fromarray(COLOUR), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data, "x").pixels.shape == COLOUR.shape


def test_large_jpegs_may_come_smaller_but_never_below_what_was_asked():
    large = Image.fromarray(COLOUR).resize((830, 610))
    data = encoded(large, "JPEG", quality=95)
    assert decode(data, "x").pixels.shape == (610, 830, 3)
    assert decode(data, "x", min_side=306).pixels.shape == (610, 830, 3)
    small = decode(data, "x", min_side=150).pixels
    assert small.shape == (153, 208, 3)
    assert (decode(data, "x", min_side=lambda height, width: 150 * width // height).pixels.shape) == (
        305,
        415,
        3,
    )
    assert np.abs(small.astype(int) - np.asarray(large.resize((208, 153), Image.Resampling.BOX))).mean() < 3


# channels ---------------------------------------------------------------------------------------


def test_grey_is_repeated_and_colour_becomes_luminance():
    assert (convert_channels(DecodedImage(GREY[:, :, None]), 3, "x") == np.dstack([GREY] * 3)).all()
    luminance = convert_channels(DecodedImage(COLOUR), 1, "x")
    want = np.asarray(Image.fromarray(COLOUR).convert("L"))
    assert np.abs(luminance[:, :, 0].astype(int) - want).max() <= 1
    assert luminance.dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_transparency_is_laid_over_white(dtype):
    white = 1 if dtype is np.float32 else np.iinfo(dtype).max
    colour = np.array([[[0, 0, 0], [white, 0, 0], [white / 5, white / 5, white / 5]]], dtype)
    opaque, clear, half = (np.full((1, 3, 1), share * white, dtype) for share in (1, 0, 0.5))
    over = [
        convert_channels(DecodedImage(np.concatenate([colour, alpha], 2), alpha=True), 3, "x")
        for alpha in (opaque, clear, half)
    ]
    assert np.allclose(over[0], colour, atol=1e-6)
    assert (over[1] == white).all()
    assert np.allclose(over[2] / white, (colour / white + 1) / 2, atol=0.005)
    assert all(each.dtype == dtype for each in over)


def test_grey_with_alpha_fits_1_2_and_3_channels():
    picture = DecodedImage(np.dstack([GREY, np.full_like(GREY, 255)]), alpha=True)
    assert (convert_channels(picture, 1, "x")[:, :, 0] == GREY).all()
    assert (convert_channels(picture, 2, "x") == picture.pixels).all()
    assert (convert_channels(picture, 3, "x") == GREY[:, :, None]).all()


@pytest.mark.parametrize(("have", "want"), [(4, 3), (2, 3), (5, 3), (5, 1), (3, 4), (1, 2), (13, 12)])
def test_other_counts_must_match_exactly(have, want):
    message = rf"^bands\.tif: {have} channels, but the model takes {want}; `coma pretrain --channels {have}` "
    with pytest.raises(BadImage, match=message):
        convert_channels(DecodedImage(np.zeros((4, 4, have), np.uint8)), want, "bands.tif")
    same = np.zeros((4, 4, have), np.uint16)
    assert convert_channels(DecodedImage(same), have, "x") is same
