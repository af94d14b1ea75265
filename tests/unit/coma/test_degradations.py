"""Degradations: the geometry of every kind, and the sheet on which `coma degrade` shows them."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, signal
from skimage import data
from skimage.transform import warp

import pretrain.visualize.reconstructions as pictures
from coma import cli
from coma.config import BeyondConfig, DecoderConfig, Degradation, ViTConfig
from coma.data.transforms import normalize
from coma.errors import BadInput
from coma.masking.sampling import uniform
from coma.models import build_encoder
from coma.objectives import build_objective
from coma.objectives.degradations import KINDS, blur_kernels, border, centre, degrade
from pretrain.commands.degrade import DegradeConfig

ALL = get_args(Degradation)
MEAN, STD = DegradeConfig.mean, DegradeConfig.std


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(36, 36), (45, 27), (224, 224)])
def test_a_sample_is_degraded_alike_in_any_batch(kind, size):
    images, seeds = torch.rand(4, 3, *size), torch.tensor([7, 8, -9, 2**62])
    shown, whole = degrade(images, seeds, kind)
    alone = torch.cat([degrade(images[i : i + 1], seeds[i : i + 1], kind)[0] for i in range(4)])
    torch.testing.assert_close(shown, alone, rtol=0, atol=1e-6)
    assert whole is images
    expected = size if kind != "zoom-in" else tuple(n - 2 * border(n) for n in size)
    assert shown.shape == (4, 3, *expected)
    if kind != "zoom-in":
        again = degrade(images, seeds + 1, kind)[0]
        assert not torch.equal(shown, again)


def test_zooming_in_takes_the_published_sizes():
    assert [border(n) for n in (288, 18, 9, 6, 3)] == [32, 2, 1, 1, 1]
    assert degrade(torch.rand(1, 3, 288, 288), torch.zeros(1), "zoom-in")[0].shape[-2:] == (224, 224)
    image = torch.arange(81.0).view(1, 1, 9, 9)
    assert torch.equal(degrade(image, torch.zeros(1), "zoom-in")[0], image[..., 1:8, 1:8])
    for units in range(1, 60):  # the ring around an input is the ring of the view that it makes
        ring = max(1, round(units / 7))
        assert border(units + 2 * ring) == ring


@pytest.mark.parametrize("size", [(224, 224), (32, 48)])
def test_zooming_out_is_a_shrunk_picture_in_a_mirrored_frame(size):
    images, seeds = torch.rand(3, 2, *size), torch.arange(3)
    shown, _ = degrade(images, seeds, "zoom-out")
    inner = tuple(round(n * 5 / 7) for n in size)
    small = torch.nn.functional.interpolate(images, inner, mode="bilinear", antialias=True)
    spots = set()
    for got, picture, seed in zip(shown, small.numpy(), seeds, strict=True):
        draws = uniform(seed[None], 2, 0x6465 + 1)[0]
        top, left = (int(draw * (n - m + 1)) for draw, n, m in zip(draws, size, inner, strict=True))
        pad = [(0, 0), (top, size[0] - inner[0] - top), (left, size[1] - inner[1] - left)]
        assert min(min(pair) for pair in pad) >= 0
        np.testing.assert_array_equal(got.numpy(), np.pad(picture, pad, mode="symmetric"))
        spots.add((top, left))
    assert len(spots) == 3


def test_distortion_is_the_fisheye_that_scikit_image_computes():
    images, seeds = torch.rand(3, 3, 40, 56), torch.arange(3)
    shown, _ = degrade(images, seeds, "distort")
    for got, image, draws in zip(shown, images, uniform(seeds, 3, 0x6465 + 2), strict=True):
        x, y, strength = draws.tolist()
        cx, cy, strength = 2 * x - 1, 2 * y - 1, 0.15 + 0.1 * strength

        def seen_at(places, cx=cx, cy=cy, strength=strength):
            x, y = places[:, 0] / 55 * 2 - 1, places[:, 1] / 39 * 2 - 1
            reach = np.hypot(cx - x, cy - y) * strength
            x, y = x + (cx - x) * reach, y + (cy - y) * reach
            return np.stack([(x + 1) / 2 * 55, (y + 1) / 2 * 39], axis=1)

        expected = warp(image.permute(1, 2, 0).numpy().astype(np.float64), seen_at, order=1, mode="edge")
        np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=1e-4)


def test_blurring_is_the_correlation_that_scipy_computes():
    images, seeds = torch.rand(2, 3, 20, 31), torch.tensor([5, 6])
    shown, _ = degrade(images, seeds, "blur")
    for got, image, kernel in zip(shown, images.numpy(), blur_kernels(seeds).numpy(), strict=True):
        for channel, pixels in zip(got.numpy(), image, strict=True):
            np.testing.assert_allclose(channel, ndimage.correlate(pixels, kernel, mode="mirror"), atol=1e-5)
            inside = signal.correlate2d(pixels, kernel, mode="valid")
            np.testing.assert_allclose(channel[3:-3, 3:-3], inside, atol=1e-5)


def test_blur_kernels_have_the_stated_weights():
    kernels = blur_kernels(torch.arange(4000)).flatten(1)
    torch.testing.assert_close(kernels.sum(1), torch.ones(4000), rtol=0, atol=1e-5)
    around = (kernels - 1 / 49).flatten()
    assert abs(around.std().item() - 0.02) < 0.002  # dividing by a sum of about 1 changes it a little
    assert abs(around.mean().item()) < 1e-6
    assert abs((around > 0.02).float().mean().item() - 0.159) < 0.01  # a normal distribution's share


def test_decolouring_is_one_weighted_sum():
    images, seeds = torch.rand(2, 3, 8, 9), torch.tensor([1, 2])
    shown, _ = degrade(images, seeds, "decolor")
    weights = 0.667 * uniform(seeds, 3, 0x6465 + 4)
    np.testing.assert_allclose(shown.numpy()[:, 0], np.einsum("bchw,bc->bhw", images, weights), atol=1e-6)
    assert torch.equal(shown[:, 0], shown[:, 2])
    means = 0.667 * uniform(torch.arange(5000), 3, 0x6465 + 4)
    assert abs(means.mean().item() - 0.3335) < 0.005 and means.max() < 0.667


def test_uniform_numbers_are_uniform_and_never_0_or_1():
    draws = uniform(torch.arange(1000), 100)
    counts = torch.histc(draws, 20, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # 19 degrees of freedom, one in a thousand
    assert draws.min() > 0 and draws.max() < 1


def test_what_cannot_be_degraded_is_refused():
    seeds = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(BadInput, match="no degradation 'melt'; there are: zoom-in"):
        degrade(torch.rand(1, 3, 9, 9), seeds, "melt")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"floating point, not torch\.uint8"):
        degrade(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), seeds, "zoom-in")
    with pytest.raises(BadInput, match="3 channels, not 4"):
        degrade(torch.rand(1, 4, 9, 9), seeds, "decolor")
    with pytest.raises(BadInput, match="too small"):
        degrade(torch.rand(1, 3, 3, 9), seeds, "blur")
    with pytest.raises(BadInput, match="nothing is left"):
        centre(torch.rand(1, 3, 4, 4), 2, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_is_degraded_like_float32(kind, dtype):
    images, seeds = torch.rand(3, 3, 40, 56).to(dtype), torch.arange(3)
    shown, whole = degrade(images, seeds, kind)
    assert whole is images and shown.dtype == dtype
    expected = degrade(images.float(), seeds, kind)[0]
    step = 1e-5 if dtype == torch.float64 else torch.finfo(dtype).eps  # of rounding the result once
    torch.testing.assert_close(shown.float(), expected, rtol=step, atol=step)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        assert torch.equal(degrade(images, seeds, kind)[0], shown)


@pytest.mark.parametrize("kind", KINDS)
def test_only_decolouring_depends_on_how_pixels_are_normalised(kind):
    images, seeds = torch.rand(8, 3, 40, 56), torch.arange(8)
    before = degrade(normalize(images, MEAN, STD), seeds, kind)[0]
    after = normalize(degrade(images, seeds, kind)[0], MEAN, STD)
    apart = (before - after).abs().max()
    assert apart > 0.5 if kind == "decolor" else apart < 1e-4


# the sheet -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("photo") / "cat.png"
    Image.fromarray(data.chelsea()[:180, 150:330]).save(path)
    return str(path)


def places(sheet: np.ndarray, cell: np.ndarray, column: int) -> list[int]:
    """Tops in pixels at which the cell stands in that column, give or take a level of rounding."""
    side = cell.shape[0]
    strip = sheet[:, 24 + column * (side + 8) :][:, :side].astype(int)
    rows = np.flatnonzero((np.abs(strip[: len(strip) - side + 1] - cell[0]) <= 1).all(axis=(1, 2)))
    return [top for top in rows.tolist() if np.abs(strip[top : top + side] - cell).max() <= 1]


def shown_by(kind: Degradation, pixels: np.ndarray, seeds: torch.Tensor) -> list[np.ndarray]:
    """What the objective itself shows of it: `[draws, H, W, 3]` for every view, hidden units grey."""
    torch.manual_seed(0)
    encoder = build_encoder(ViTConfig(patch=20, dim=32, depth=1, heads=2))
    model: Any = build_objective(BeyondConfig(degrade=kind, decoder=DecoderConfig(32, 1, 2)), encoder)
    plain = torch.from_numpy(pixels).permute(2, 0, 1).expand(len(seeds), -1, -1, -1)
    given = model.degraded(normalize(plain, MEAN, STD), seeds)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    seen = ((given * std + mean).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    views = model.draw_visible(seeds, 9, 9).repeat_interleave(20, 2).repeat_interleave(20, 3).numpy()
    return [np.where(view[..., None], seen, (222, 222, 228)) for view in views]


def test_the_sheet_shows_what_every_degradation_shows_the_encoder(tmp_path, photo, capsys):
    out = tmp_path / "sheets" / "sheet.png"
    argv = ["degrade", photo, "--out", str(out), "--draws", "2", "--size", "180", "--seed", "7"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as opened:
        sheet = np.asarray(opened.convert("RGB"))
    pixels, seeds = np.array(Image.open(photo)), torch.tensor([7, 8])
    first = places(sheet, pixels.astype(int), 0)
    assert len(first) == 2 and first[1] - first[0] == 180 + 8
    cells = [(kind, view) for kind in DegradeConfig.kind for view in shown_by(kind, pixels, seeds)]
    assert {kind for kind, _ in cells} == set(ALL) and len(cells) == 9  # of zoom-in+coma both views
    assert sheet.shape[1] == 2 * 24 + 5 * (180 + 8) - 8
    for number, (kind, view) in enumerate(cells, start=1):
        tops = [places(sheet, cell.astype(int), number % 5) for cell in view]
        assert all(tops), kind
        if kind != "zoom-in":  # whose draws are all alike
            assert [len(each) for each in tops] == [1, 1], kind
        assert {top for each in tops for top in each} == {top + (tops[0][0] - first[0]) for top in first}
        assert (tops[0][0] == first[0]) == (number < 5)  # five side by side, the others below
        assert (np.abs(view - pixels).mean(axis=(1, 2, 3)) > 2).all(), kind  # none is the picture as it was
    for argv_, columns in ((["--kind", "blur"], 2), (["--kind", "zoom-in+coma", "blur", "blur"], 4)):
        assert cli.main([*argv, *argv_]) == 0
        with Image.open(out) as opened:
            assert opened.width == 2 * 24 + columns * (180 + 8) - 8


def test_the_sheet_says_how_it_was_made(tmp_path, photo, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "draw_sheet", lambda *a, **k: drawn.append(a) or Image.new("RGB", (1, 1)))
    common = ["degrade", photo, "--out", str(tmp_path / "a.png"), "--draws", "1", "--kind"]
    assert cli.main([*common, "decolor", "zoom-in"]) == 0
    grey = ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5", "--unit", "48"]
    assert cli.main([*common, "decolor", "zoom-in", *grey]) == 0
    (columns, _, notes), (plain, _, other) = drawn
    assert "(32 x 32 px a unit)" in notes
    assert "mean 0.485/0.456/0.406, standard deviation 0.229/0.224/0.225" in notes
    assert "(48 x 48 px a unit)" in other and "mean 0.5/0.5/0.5" in other
    assert columns[1][1].shape == (1, 288, 288, 3)
    assert [np.ptp(c[1][1], axis=-1).max() > 9 for c in (columns, plain)] == [True, False]  # a tint, or none
    assert [c[2][2].sum() for c in (columns, plain)] == [224**2, 192**2]  # what zooming in shows


def test_mistakes_are_named_and_nothing_is_written(tmp_path, photo, capsys):
    folder, file = tmp_path / "folder.png", tmp_path / "file"
    folder.mkdir()
    file.touch()
    small = ["--size", "36", "--draws", "1"]
    out = str(tmp_path / "new.png")
    for image, argv, message in (
        (str(tmp_path / "none.png"), ["--out", out], "cannot be read"),
        (photo, ["--out", out, "--draws", "0"], "--draws 0"),
        (photo, ["--out", out, "--size", "3"], "--size 3"),
        (photo, ["--out", out, "--size", "1000000"], "--size 1000000"),
        (photo, ["--out", out, "--unit", "0"], "--unit 0"),
        (photo, ["--out", out, "--unit", "18"], "no centre to zoom in to"),
        (photo, ["--out", out, "--std", "1", "0", "1"], "--std: 0 must be at least 1e-09"),
        (photo, ["--out", out, "--mean", "nan", "0", "1"], "--mean: nan must be a number"),
        (photo, ["--out", out, "--kind"], "--kind: name at least one"),
        (photo, ["--out", out, "--seed", str(2**63)], f"--seed {2**63}"),
        (photo, ["--out", out, "--seed", str(2**63 - 1), "--draws", "2"], f"--seed {2**63 - 1}"),
        (photo, ["--out", out, "--seed", str(-(2**63) - 1)], f"--seed -{2**63 + 1}"),
        (photo, ["--out", str(folder)], "folder.png: is a directory"),
        (photo, ["--out", "."], "ends in .png"),
        (photo, ["--out", str(tmp_path)], "ends in .png"),
        (photo, ["--out", str(tmp_path / "o.jpg")], "ends in .png"),
        (photo, ["--out", str(file / "x.png")], "a file is where its folder should be"),
        (photo, ["--out", str(file / "more" / "x.png")], "a file is where its folder should be"),
        (photo, ["--out", str(tmp_path / f"{'x' * 248}.png")], "File name too long"),
    ):
        assert cli.main(["degrade", image, *small, *argv]) == 2, argv
        assert message in capsys.readouterr().err, argv
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("seed", [2**63 - 2, -(2**63)])
def test_the_largest_and_the_smallest_seeds_draw(tmp_path, photo, seed):
    out = tmp_path / "sheet.PNG"
    argv = ["--out", str(out), "--size", "36", "--draws", "2", "--seed", str(seed)]
    assert cli.main(["degrade", photo, *argv]) == 0
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
