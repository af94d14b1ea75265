"""Beyond Masking: the geometry of every degradation, where the loss lies, and golden loss curves.

The curves in `tests/golden/loss_curves_beyond.json` are renewed by `python tests/test_pretrain_beyond.py`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import ndimage, signal
from short_runs import MODEL, at
from skimage.transform import warp

from pretrain import cli, load_pretrained
from pretrain.config import (
    BeyondConfig,
    DataConfig,
    DecoderConfig,
    Degradation,
    DyViTConfig,
    PretrainConfig,
    ViTConfig,
    method_preset,
)
from pretrain.degradations import KINDS, blur_kernels, border, centre, degrade
from pretrain.errors import BadInput
from pretrain.masking.partition import uniform
from pretrain.models import build_encoder
from pretrain.objectives import build_objective
from pretrain.plain import from_plain, to_plain
from pretrain.training import pretrain

DECODER = DecoderConfig(dim=32, depth=1, heads=2)
ENCODERS = {
    "dyvit": DyViTConfig(
        patch=1, dim=16, depths=(1, 1, 1, 1), heads=(2, 2, 4, 4), windows=((4, 8), (2, 4), (2, 0), (0,))
    ),
    "vit": ViTConfig(patch=8, dim=32, depth=2, heads=2),
}
GOLDEN = Path(__file__).parent / "golden" / "loss_curves_beyond.json"
ALL = get_args(Degradation)
MASKED = ("zoom-in+mask", "zoom-in+coma")
HIDING = ("zoom-in", *MASKED)


def objective(encoder, kind, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = BeyondConfig(degrade=kind, decoder=DECODER, **changes)
    return build_objective(config, build_encoder(ENCODERS[encoder]))


def pictures(count=4, size=48):
    torch.manual_seed(3)
    ramp = torch.linspace(-1, 1, size)
    slopes = torch.randn(count, 3, 2, 1, 1)
    return slopes[:, :, 0] * ramp + slopes[:, :, 1] * ramp[:, None] + 0.05 * torch.randn(count, 3, size, size)


# degradations ----------------------------------------------------------------------------------


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
    with pytest.raises(BadInput, match="3 channels, not 4"):
        degrade(torch.rand(1, 4, 9, 9), seeds, "decolor")
    with pytest.raises(BadInput, match="too small"):
        degrade(torch.rand(1, 3, 3, 9), seeds, "blur")
    with pytest.raises(BadInput, match="nothing is left"):
        centre(torch.rand(1, 3, 4, 4), 2, 1)


# the objective ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_shapes_and_gradients(encoder, kind):
    model = objective(encoder, kind)
    out = model(pictures(), torch.arange(4))
    views = 2 if kind == "zoom-in+coma" else 1
    shown = {"zoom-in": 16, "zoom-in+mask": 4, "zoom-in+coma": 8}.get(kind, 36)
    assert out.prediction.shape == (views, 4, 6, 6, 8 * 8 * 3)
    assert (out.visible.flatten(2).sum(-1) == shown).all()
    assert torch.equal(out.visible, model.draw_visible(torch.arange(4), 6, 6))
    if kind == "zoom-in+coma":
        assert torch.equal(out.visible.sum(0)[:, 1:5, 1:5], torch.ones(4, 4, 4, dtype=torch.int64))
    assert not out.visible[..., 0].any() or kind not in HIDING
    out.loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert out.loss.isfinite() and out.loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in ALL), *((kind, {"border_weight": 0.2}) for kind in MASKED)],
)
def test_where_the_loss_lies(kind, settings):
    model = objective("vit", kind, norm_pix=False, **settings)
    out = model(pictures(), torch.arange(4))
    (gradient,) = torch.autograd.grad(out.loss, out.prediction)
    share = gradient / (
        2 * (out.prediction - out.target)
    )  # d loss / d prediction = 2 share (prediction - target)
    units = share.mean(-1) * share.shape[-1]  # v b h w
    ring = torch.ones(6, 6, dtype=torch.bool)
    ring[1:5, 1:5] = False
    if kind in MASKED:
        border_share = settings.get("border_weight", 0.5)  # published: 0.8 centre + 0.2 sum of four strips
        assert share[out.visible].abs().max() == 0
        outside = units[..., ring]
        hidden = units[~out.visible & ~ring]
        assert outside.sum().item() == pytest.approx(border_share, rel=1e-3)
        assert hidden.sum().item() == pytest.approx(1 - border_share, rel=1e-3)
        for part in (outside, hidden):
            torch.testing.assert_close(part, part.mean().expand_as(part), rtol=1e-2, atol=1e-9)
    else:
        torch.testing.assert_close(units, torch.full_like(units, 1 / 144), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("kind", HIDING)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_prediction_knows_the_visible_pixels_only(encoder, kind):
    model = objective(encoder, kind, norm_pix=False).eval()
    images, seeds = pictures(), torch.arange(4)
    with torch.no_grad():
        before = model(images, seeds)
        shown = before.visible.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, None]
        for view, pixels in enumerate(shown):
            after = model(torch.where(pixels, images, images.flip(0) * 5 + 1), seeds)
            assert torch.equal(before.prediction[view], after.prediction[view])
        seen = model(torch.where(shown[-1], images + 1, images), seeds)
    assert not torch.equal(before.prediction[-1], seen.prediction[-1])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoder_gets_the_centre_at_the_places_it_knows(encoder, monkeypatch):
    model = objective(encoder, "zoom-in")
    images = pictures()
    got: list[torch.Tensor] = []
    real = model.encoder.forward_features
    monkeypatch.setattr(model.encoder, "forward_features", lambda x, *a: got.append(x) or real(x, *a))
    model(images, torch.arange(4))
    assert torch.equal(got[0], images[..., 8:40, 8:40])


@pytest.mark.parametrize("kind", ["distort", "zoom-out", "blur", "decolor"])
def test_what_is_shown_is_degraded_and_what_is_predicted_is_not(kind):
    model = objective("vit", kind, norm_pix=False)
    images, seeds = pictures(), torch.arange(4)
    got: list[torch.Tensor] = []
    real = model.encoder.forward_features
    model.encoder.forward_features = lambda x, *a: got.append(x) or real(x, *a)
    out = model(images, seeds)
    assert torch.equal(got[0], degrade(images, seeds, kind)[0])
    assert torch.equal(out.target, objective("vit", "blur", norm_pix=False)(images, seeds).target)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_loss_does_not_depend_on_how_a_batch_is_split(encoder, kind):
    model = objective(encoder, kind)
    images, seeds = pictures(), torch.arange(4)
    with torch.no_grad():
        whole = model(images, seeds).loss
        halves = [model(images[part], seeds[part]).loss for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_reconstruction(encoder, kind):
    model = objective(encoder, kind).eval()
    images, seeds = pictures(2), torch.arange(2)
    visible = model.draw_visible(seeds, 6, 6)[0]
    shown = model.degraded(images, seeds)
    filled = model.reconstruct(shown, visible)
    assert filled.shape == images.shape and filled.isfinite().all()
    pixels = visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    if kind in HIDING:
        assert torch.equal(filled.where(pixels, 0), shown.where(pixels, 0))
        poisoned = torch.where(pixels, images, images * -3 + 2)
        assert torch.equal(model.reconstruct(poisoned, visible).where(~pixels, 0), filled.where(~pixels, 0))
    else:
        assert not torch.isclose(filled, shown).all(dim=(1, 2, 3)).any()  # every pixel is predicted


def test_settings_and_views():
    config = PretrainConfig(model=DyViTConfig(), objective=BeyondConfig())
    assert config.view_size == 288
    assert replace(config, model=ViTConfig()).view_size == 288
    assert replace(config, objective=BeyondConfig(degrade="blur")).view_size == 224
    assert replace(config, data=DataConfig(image_size=32), model=ENCODERS["vit"]).view_size == 48
    plain = to_plain(config)
    assert plain["objective"]["method"] == "beyond"
    assert from_plain(plain, PretrainConfig, source="x") == config
    assert method_preset("beyond") == BeyondConfig()


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(BadInput, match="between 0 and 1"):
        BeyondConfig(hidden_ratio=1.0)
    with pytest.raises(BadInput, match="at least 2 views"):
        BeyondConfig(views=1)
    with pytest.raises(BadInput, match=r"border weight 0\.0 must lie"):
        BeyondConfig(border_weight=0.0)
    grey = build_encoder(ViTConfig(channels=1, patch=8, dim=32, depth=1, heads=2))
    with pytest.raises(BadInput, match="3 channels, not 1"):
        build_objective(BeyondConfig(degrade="decolor", decoder=DECODER), grey)
    with pytest.raises(BadInput, match="no centre to zoom in to"):
        objective("vit", "zoom-in").draw_visible(torch.arange(2), 2, 6)
    with pytest.raises(BadInput, match="leaves none to see"):
        objective("vit", "zoom-in+mask", hidden_ratio=0.99)(pictures(), torch.arange(4))


# runs and commands -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zoom-in+coma", "zoom-out"])
def test_a_run_leaves_an_artifact_that_loads_reconstructs_and_evaluates(settings, tmp_path, kind):
    method = BeyondConfig(degrade=kind, decoder=DecoderConfig(8, 1, 2))
    config = replace(settings, model=MODEL, objective=method)
    folder = pretrain(at(config, tmp_path / "run"))
    assert (folder / "reconstructions" / "step-000005.png").stat().st_size > 5000
    model, about = load_pretrained(folder / "artifact")
    assert about.image_size == 16
    assert about.trained["method"] == "beyond"
    images = torch.randn(2, 3, 32, 32)
    visible = model.draw_visible(torch.arange(2), 4, 4)[0]
    assert model.reconstruct(images, visible).shape == images.shape


def test_command_line(tmp_path, photos, capsys):
    common = ["pretrain", str(photos), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main([*common, "--degrade", "blur"]) == 2
    assert "--degrade blur belongs to --method beyond" in capsys.readouterr().err
    small = ["--model", "tiny", "--image-size", "16", "--steps", "1", "--batch-size", "2", "--workers", "0"]
    wide = ["--objective.decoder.depth", "1"]
    assert cli.main([*common, *small, *wide, "--method", "beyond", "--degrade", "zoom-in"]) == 0
    plain = json.loads((tmp_path / "run" / "config.json").read_text())
    assert plain["objective"]["degrade"] == "zoom-in"
    capsys.readouterr()
    grey = [*common[:2], "--out", str(tmp_path / "grey"), *small, "--channels", "1"]
    assert cli.main([*grey, "--method", "beyond", "--degrade", "decolor"]) == 2
    assert "3 channels" in capsys.readouterr().err
    assert not (tmp_path / "grey").exists()


def test_coma_degrade_draws_every_kind(tmp_path, photos, capsys):
    from PIL import Image

    out = tmp_path / "sheets" / "sheet.png"
    image = str(next(photos.iterdir()))
    assert cli.main(["degrade", image, "--out", str(out), "--draws", "2", "--size", "36"]) == 0
    with Image.open(out) as sheet:
        width = sheet.size[0]
    assert capsys.readouterr().out == f"{out}\n"
    assert cli.main(["degrade", image, "--out", str(out), "--kind", "blur", "--size", "36"]) == 0
    with Image.open(out) as sheet:
        assert sheet.size[0] < width
    for argv, message in (
        ([str(tmp_path / "none.png")], "cannot be read"),
        ([image, "--draws", "0"], "--draws 0"),
        ([image, "--size", "3"], "--size 3"),
    ):
        assert cli.main(["degrade", *argv, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


def loss_curve(encoder, kind, steps=20):
    model = objective(encoder, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, curve = pictures(8), []
    for step in range(steps):
        loss = model(images, torch.arange(8) + 8 * step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


CURVES = [("dyvit", "zoom-in+mask"), ("vit", "zoom-in+coma"), ("vit", "zoom-out"), ("vit", "decolor")]


@pytest.mark.parametrize(("encoder", "kind"), CURVES)
def test_golden_loss_curve(encoder, kind):
    curve = loss_curve(encoder, kind)
    assert curve == pytest.approx(json.loads(GOLDEN.read_text())[f"{encoder} {kind}"], rel=0.01)
    assert curve[-1] < 0.9 * curve[0]


if __name__ == "__main__":
    curves = {f"{e} {k}": [round(x, 5) for x in loss_curve(e, k)] for e, k in CURVES}
    GOLDEN.write_text(json.dumps(curves, indent=0) + "\n")
