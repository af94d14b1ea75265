"""Values that are missing, and values whose unit is not the one they are normalised in."""

import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from coma.cli import main
from coma.config import DataConfig
from coma.data import ArraySource, BatchLayout, check_sample, compute_mean_std, open_source, training_batches
from coma.data.decode import decode
from coma.data.pixel_values import check_pixels
from coma.errors import BadImage, BadInput
from coma.image_size import ImageSize

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (40, 50, 3), np.uint8)
RUN = ["--model", "tiny", "--image-size", "32", "--batch-size", "2", "--steps", "2", "--device", "cpu"]


def tiff(array: np.ndarray, nodata: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if array.ndim == 3:
        options.setdefault("planarconfig", "contig")
    options["photometric"] = "rgb" if array.shape[2:] == (3,) else "minisblack"
    options["extratags"] = [] if nodata is None else [(42113, "s", 0, nodata, True)]
    tifffile.imwrite(buffer, array, metadata=None, **options)
    return buffer.getvalue()


def with_hole(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[:10, :10] = value
    return array


HEIGHTS = (RNG.random((40, 50)) * 30 + 100).astype(np.float32)  # metres


# nodata -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "nodata"),
    [
        (-9999, "-9999"),
        (-9999, " -9999.0 \0"),
        (-3.4028234663852886e38, "-3.4028234663852886e+38"),
        (-3.4028234663852886e38, "-3.40282e+38"),
        (-3.4028234663852886e38, None),  # never a measurement
        (0, "0"),
        (1e20, "1e+20"),
        (np.nan, "nan"),
        (np.nan, "-9999"),
        (np.nan, None),
        (np.inf, None),
        (-np.inf, "words"),
        (-np.inf, "-1.7976931348623157e+308"),  # usual in float64, which is read as float32
        (np.inf, "inf"),
    ],
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_missing_floats_are_filled_with_the_mean_and_marked(value, nodata, compression):
    picture = decode(tiff(with_hole(HEIGHTS, value), nodata, compression=compression), "x")
    there = with_hole(np.ones((40, 50), bool), 0)
    assert picture.missing is not None
    assert (picture.missing[:, :, 0] == ~there).all()
    assert (picture.pixels[there] == HEIGHTS[there][:, None]).all()
    assert picture.pixels[~there] == pytest.approx(HEIGHTS[there].mean(), rel=1e-5)


def test_bands_are_filled_one_by_one():
    bands = np.dstack([HEIGHTS] * 4)
    bands[0, 0, 2] = bands[1, 1, 3] = -9999
    picture = decode(tiff(bands, "-9999"), "x")
    assert picture.missing is not None
    assert np.argwhere(picture.missing).tolist() == [[0, 0, 2], [1, 1, 3]]
    assert picture.pixels.min() > 99
    planes = decode(tiff(np.moveaxis(bands, 2, 0)[:, :39, :45], "-9999", planarconfig="separate"), "x")
    assert planes.missing is not None
    assert np.argwhere(planes.missing).tolist() == [[0, 0, 2], [1, 1, 3]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_pixel_of_integers_is_missing_where_all_its_channels_say_so(dtype):
    colour = with_hole(COLOUR.astype(dtype) + 1 * (dtype == np.uint16), 0)
    colour[20, 20] = (9, 0, 0)  # a dark red is a colour
    picture = decode(tiff(colour, "0"), "x")
    assert picture.missing is not None
    assert picture.missing[:10, :10].all()
    assert not picture.missing[20, 20].any()
    assert picture.pixels[20, 20].tolist() == [9, 0, 0]
    assert picture.pixels[0, 0].tolist() == [
        round(colour[:, :, c][~picture.missing[:, :, c]].mean()) for c in range(3)
    ]
    for nothing in ("-9999", "nan", "256.5", ""):
        assert decode(tiff(colour, nothing), "x").missing is None


def test_what_is_turned_or_inverted_is_marked_where_it_lies():
    raw = with_hole(COLOUR[:, :, 0].astype(np.uint16) + 8, 7)
    buffer = io.BytesIO()
    extra = [(42113, "s", 0, "7", True), (274, "H", 1, 6, True)]
    tifffile.imwrite(buffer, raw, extratags=extra, photometric="miniswhite", metadata=None)
    picture = decode(buffer.getvalue(), "x")
    assert picture.missing is not None
    assert picture.missing.shape == picture.pixels.shape == (50, 40, 1)
    assert picture.missing[:10, -10:].all() and picture.missing.sum() == 100
    assert picture.pixels[20, 5, 0] == 65535 - raw[34, 20]


@pytest.mark.parametrize(
    ("array", "nodata", "reason"),
    [
        (np.full((20, 30), -9999, np.float32), "-9999", "every value is nodata, NaN or infinite"),
        (np.full((20, 30), np.nan, np.float32), None, "every value is nodata, NaN or infinite"),
        (np.zeros((20, 30, 3), np.uint8), "0", "every value is nodata, NaN or infinite"),
        (
            np.dstack([HEIGHTS, np.full_like(HEIGHTS, np.nan), HEIGHTS, HEIGHTS]),
            None,
            "every value of channel 2 is nodata, NaN or infinite",
        ),
    ],
)
def test_an_image_of_nothing_but_nodata_is_a_bad_image(array, nodata, reason):
    with pytest.raises(BadImage, match=f"^x: {reason}$"):
        decode(tiff(array, nodata), "x")


def test_missing_values_do_not_count_in_the_statistics(caplog):
    caplog.set_level(logging.INFO)
    holes = [with_hole(HEIGHTS, np.nan), HEIGHTS + 1]
    (mean,), (std,) = compute_mean_std(ArraySource(holes), 1)
    known = [each[np.isfinite(each)].astype(np.float64) for each in holes]
    assert mean == pytest.approx(np.mean([each.mean() for each in known]))
    assert std == pytest.approx(
        np.sqrt(np.mean([np.square(each).mean() for each in known]) - mean**2), rel=1e-6
    )
    assert caplog.messages == [
        "array: 1 of 2 images looked at have nodata, NaN or infinite values (2.50% of all values); they are "
        "filled with the mean of their channel"
    ]


def test_training_counts_and_names_images_with_missing_values(tmp_path):
    for number in range(4):
        array = with_hole(HEIGHTS, -9999) if number == 2 else HEIGHTS
        (tmp_path / f"{number}.tif").write_bytes(tiff(array, "-9999"))
    data = DataConfig(image_size=ImageSize.of(16), workers=0, mean=(115,), std=(8.7,))
    batches = training_batches(open_source(tmp_path), data, channels=1, seed=0, batch=BatchLayout(4, 4))
    batch = next(batches)
    assert batch.filled == (
        f"{tmp_path}/2.tif: 5.00% of its values are nodata, NaN or infinite; "
        "filled with the mean of their channel",
    )
    assert 99 < batch.images.min() <= batch.images.max() < 131


def test_a_geotiff_with_nodata_trains_and_says_so(tmp_path, capsys, caplog):
    for number in range(4):
        array = np.dstack([with_hole(HEIGHTS, -3.4028234663852886e38) + number] * 3)
        (tmp_path / f"{number}.tif").write_bytes(tiff(array, "-3.4028234663852886e+38"))
    assert main(["pretrain", str(tmp_path), "--out", str(tmp_path / "run"), *RUN]) == 0
    assert (
        f"{tmp_path}: 4 of 4 images looked at have nodata, NaN or infinite values (5.00% of all"
        in caplog.text
    )
    error = capsys.readouterr().err
    assert (
        error.count("5.00% of its values are nodata, NaN or infinite; filled with") == 3
    )  # then counted alone
    assert '"filled": 4' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_pack_says_how_many_images_were_filled(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(3):
        array = with_hole(HEIGHTS, -9999) if number else HEIGHTS
        (tmp_path / "in" / f"{number}.tif").write_bytes(tiff(array, "-9999"))
    assert main(["pack", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert "2 images had nodata, NaN or infinite values, which were filled" in capsys.readouterr().out


# units ------------------------------------------------------------------------------------------


def refusal(images: Sequence[np.ndarray], channels: int = 3) -> str:
    with pytest.raises(BadInput) as raised:
        compute_mean_std(ArraySource(images), channels)
    return str(raised.value)


def test_floats_of_0_to_255_beside_bytes_are_refused_by_name():
    text = refusal([*[COLOUR] * 5, COLOUR.astype(np.float32)])
    assert (
        "array[5] (float, 0 to 255) are of different units: integers are scaled to 0..1, floats are not"
        in text
    )
    assert "save the float images (1 of 6 looked at) scaled to 0..1, or train on them separately" in text
    assert "array[5]" in refusal([*[COLOUR.astype(np.uint16) * 257] * 5, COLOUR.astype(np.float32)])
    assert "different units" in refusal([COLOUR, COLOUR.astype(np.float32) / 127.5 - 1])


def test_floats_of_0_to_1_beside_floats_of_0_to_255_are_refused_by_name():
    text = refusal([COLOUR.astype(np.float32), COLOUR.astype(np.float32) / 255])
    assert "array[0] (float, 0 to 255) are of different units" in text
    assert "array[1] (float, 0 to 1)" in text
    assert "give --mean and --std to train anyway" in text


def test_twelve_bits_in_sixteen_beside_bytes_are_refused_by_name():
    text = refusal([COLOUR, COLOUR, COLOUR.astype(np.uint16) * 16])
    assert "array[2] (16-bit, 0 to 4080) uses a small part of its 16 bits" in text


@pytest.mark.parametrize(
    "images",
    [
        [COLOUR, COLOUR.astype(np.float32) / 255, COLOUR.astype(np.uint16) * 257],  # one unit
        [COLOUR.astype(np.uint16) * 16, COLOUR.astype(np.uint16) * 16],  # a sensor alone
        [COLOUR.astype(np.float32), COLOUR.astype(np.float32) / 20],  # floats alone, whatever their range
        [np.dstack([HEIGHTS - 99.9] * 3) / 31, np.dstack([HEIGHTS] * 3), np.dstack([HEIGHTS] * 3) / 20],
        [COLOUR, np.zeros((20, 30, 3), np.float32), np.zeros((20, 30, 3), np.uint16)],  # black is black
    ],
)  # fmt: skip
def test_what_goes_together_is_measured(images):
    mean, std = compute_mean_std(ArraySource(images), 3)
    assert len(mean) == len(std) == 3


def test_undeclared_marks_are_refused_by_name():
    text = refusal([HEIGHTS, with_hole(HEIGHTS, -9999)], channels=1)
    assert text == (
        "array[1]: 100 of 2000 values are -9999, far from all others; if they are missing values, save them "
        "as NaN or declare them (gdal_edit.py -a_nodata -9999 FILE)"
    )
    compute_mean_std(ArraySource([HEIGHTS - 1e4 + 1, HEIGHTS * 100 - 9999]), 1)  # such depths there are


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("mean", "std", "advice"),
    [
        (
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            "divided by 255: --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225",
        ),
        (IMAGENET[0], (58.395, 57.12, 57.375), "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"),
        ((123.675, 116.28, 103.53), IMAGENET[1], "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"),
        ((127.5, 127.5, 127.5), (1, 1, 1), "--mean 0.5 0.5 0.5 --std 1 1 1"),
    ],
)
def test_statistics_of_0_to_255_are_refused_with_the_values_divided(mean, std, advice):
    for pixels in (COLOUR, COLOUR.astype(np.uint16) * 257):
        with pytest.raises(
            BadInput, match=r"array\[0\]: its pixels are scaled to 0\.\.1, but mean"
        ) as raised:
            check_sample(ArraySource([pixels]), 3, mean, std)
        assert advice in str(raised.value)


def test_statistics_of_sixteen_bits_are_divided_by_65535():
    with pytest.raises(BadInput, match=r"divided by 65535: --mean 0\.5 --std 0\.25"):
        check_sample(ArraySource([HEIGHTS.astype(np.uint16)]), 1, (32767.5,), (16383.75,))


def test_floats_far_from_statistics_of_0_to_1_are_refused():
    with pytest.raises(BadInput, match=r"array\[0\]: float values of 0 to 255, but mean \(0\.485 0\.456"):
        check_sample(ArraySource([COLOUR.astype(np.float32)]), 3, *IMAGENET)


@pytest.mark.parametrize(
    ("pixels", "mean", "std"),
    [
        (COLOUR, *IMAGENET),
        (COLOUR, (0, 0, 0), (1, 1, 1)),
        (COLOUR.astype(np.float32), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        (COLOUR.astype(np.float32) / 255, *IMAGENET),
        (COLOUR.astype(np.float32) / 25, *IMAGENET),  # very bright
    ],
)
def test_statistics_that_fit_are_taken(pixels, mean, std):
    check_sample(ArraySource([pixels]), 3, mean, std)


def test_every_command_with_statistics_refuses_those_of_other_pixels(tmp_path, capsys):
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.fromarray(COLOUR).save(photo)
    numbers = ["--mean", "123.675", "116.28", "103.53", "--std", "58.395", "57.12", "57.375"]
    assert main(["pretrain", str(photo.parent), "--out", str(tmp_path / "run"), *RUN, *numbers]) == 2
    refused = capsys.readouterr().err
    assert main(["degrade", str(photo), "--out", str(tmp_path / "sheet.png"), *numbers]) == 2
    text = (
        f"error: {photo}: its pixels are scaled to 0..1, but mean (123.7 116.3 103.5) and standard deviation "
        "(58.4 57.12 57.38) are of larger values; divided by 255: --mean 0.485 0.456 0.406 "
        "--std 0.229 0.224 0.225\n"
    )
    assert refused == capsys.readouterr().err == text
    assert list(tmp_path.iterdir()) == [photo.parent]


def test_an_image_of_another_unit_stops_training_by_name(tmp_path):
    """Statistics come from a sample; what is rare is met later."""
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", COLOUR.astype(np.float32))
    for mean, name in (((0.5,) * 3, "b.npy"), ((127.5,) * 3, "a.png")):
        data = DataConfig(image_size=ImageSize.of(16), workers=0, mean=mean, std=(0.5,) * 3)
        batches = training_batches(open_source(tmp_path), data, channels=3, seed=0, batch=BatchLayout(2, 2))
        with pytest.raises(BadInput, match=f"^{tmp_path}/{name}: ") as raised:
            next(batches)
        assert not isinstance(raised.value, BadImage)  # which would be skipped


def test_nobody_is_told_to_change_the_statistics_of_a_trained_model():
    with pytest.raises(
        BadInput, match="was trained on float images; give float images in the same unit"
    ) as no:
        check_pixels(COLOUR, [120.0] * 3, [50.0] * 3, lambda: "a.png", fixed=True)
    assert "--mean" not in str(no.value)


@pytest.mark.parametrize("mark", [-9999.0, 9.96921e36, 1e20])
def test_marks_for_missing_values_that_nobody_declared_are_named(mark):
    pixels = np.random.default_rng(0).random((32, 32, 1), np.float32)
    pixels[:4] = mark
    with pytest.raises(BadInput, match=r"^a\.npy: 128 of 1024 values are .*, far from all others"):
        check_pixels(pixels, None, None, lambda: "a.npy")
