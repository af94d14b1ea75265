"""CoMA and MAE: which pixels carry loss, what each view may know, and golden loss curves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import DECODER, ENCODERS, loss_curve, pictures

from coma.config import CoMAConfig, MAEConfig
from coma.errors import BadInput
from coma.masking.patchify import patchify
from coma.masking.sampling import group_sizes
from coma.models import Decoder, build_encoder
from coma.objectives import build_objective
from coma.objectives.targets import hidden_loss, nearby_statistics, pixel_targets, unit_statistics

METHODS = {
    "coma2": CoMAConfig(views=2, decoder=DECODER),
    "coma4": CoMAConfig(views=4, decoder=DECODER),
    "independent": CoMAConfig(masks="independent", decoder=DECODER),
    "single": CoMAConfig(masks="single", decoder=DECODER),
    "mae": MAEConfig(decoder=DECODER),
}


def objective(encoder, method, **changes):
    torch.manual_seed(0)
    return build_objective(replace(METHODS[method], **changes), build_encoder(ENCODERS[encoder]))


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_shapes_visibility_and_gradients(encoder, method, norm_pix):
    model = objective(encoder, method, norm_pix=norm_pix)
    out = model(pictures(), torch.arange(4))
    views = {"coma2": 2, "coma4": 4, "independent": 2, "single": 1, "mae": 1}[method]
    shown = {"coma2": 8, "coma4": 4, "independent": 8, "single": 8, "mae": 4}[method]
    assert out.prediction.shape == (views, 4, 4, 4, 8 * 8 * 3)
    assert out.target.shape == (4, 4, 4, 8 * 8 * 3)
    assert (out.visible.flatten(2).sum(-1) == shown).all()
    assert torch.equal(out.visible, model.draw_visible(torch.arange(4), 4, 4))
    if method.startswith("coma"):
        assert (out.visible.sum(0) == 1).all()  # disjoint, and nothing is left out
    out.loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert not silent
    assert out.loss.isfinite() and out.loss.dtype == torch.float32


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("views", [2, 4])
def test_every_pixel_carries_the_same_share_of_comas_loss(encoder, views):
    model = objective(encoder, f"coma{views}", norm_pix=False)
    out = model(pictures(), torch.arange(4))
    (weight,) = torch.autograd.grad(out.loss, out.prediction)
    share = weight / (
        2 * (out.prediction - out.target)
    )  # d loss / d prediction = 2 share (prediction - target)
    hidden = ~out.visible[..., None].expand_as(share)
    assert share[~hidden].abs().max() == 0
    torch.testing.assert_close(
        share.sum(0), torch.full_like(share[0], 1 / share[0].numel()), rtol=1e-3, atol=1e-9
    )


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_views_prediction_knows_its_own_pixels_only(encoder, method):
    model = objective(encoder, method, norm_pix=False).eval()
    images, seeds = pictures(), torch.arange(4)
    with torch.no_grad():
        before = model(images, seeds)
        for view, visible in enumerate(before.visible):
            pixels = visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
            poisoned = torch.where(pixels, images, images.flip(0) * 5 + 1)
            after = model(poisoned, seeds)
            assert torch.equal(before.prediction[view], after.prediction[view])
            assert len(before.prediction) == 1 or not torch.equal(before.prediction, after.prediction)


def test_complementary_masks_on_dyvit_need_one_encoder_pass(monkeypatch):
    for method, passes in (("coma2", 4), ("coma4", 4), ("independent", 8), ("single", 4)):
        model: Any = objective("dyvit", method)
        seen: list[int] = []
        model.encoder.stem.register_forward_hook(lambda _, args, __, seen=seen: seen.append(len(args[0])))
        model(pictures(), torch.arange(4))
        assert seen == [passes]


def test_loss_is_the_mean_over_hidden_units_computed_by_hand():
    prediction = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2, 1)
    target = torch.tensor([0.0, 0.0, 1.0, 0.0]).view(1, 2, 2, 1)
    visible = torch.tensor([True, False, False, True]).view(1, 1, 2, 2)
    assert hidden_loss(prediction, target, visible) == (2**2 + 2**2) / 2


def test_norm_pix_targets_have_mean_0_and_deviation_1():
    units = patchify(pictures() * 3 + 7, 8)
    targets = pixel_targets(units, norm_pix=True)
    assert targets.mean(-1).abs().max() < 1e-4
    assert (targets.std(-1) - 1).abs().max() < 1e-2
    flat = pixel_targets(torch.ones(1, 1, 1, 12), norm_pix=True)
    assert flat.isfinite().all() and flat.abs().max() == 0


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("size", [(32, 32), (27, 45)])
def test_reconstruction_keeps_what_is_visible_and_knows_nothing_else(encoder, norm_pix, size):
    model = objective(encoder, "coma2", norm_pix=norm_pix).eval()
    torch.manual_seed(5)
    images = torch.randn(2, 3, *size)
    h, w = -(-size[0] // 8), -(-size[1] // 8)
    visible = model.draw_visible(torch.arange(2), h, w)[0]
    pixels = visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None, : size[0], : size[1]]
    filled = model.reconstruct(images, visible)
    assert filled.shape == images.shape
    assert torch.equal(filled.where(pixels, 0), images.where(pixels, 0))
    poisoned = torch.where(pixels, images, images * -3 + 2)
    assert torch.equal(model.reconstruct(poisoned, visible).where(~pixels, 0), filled.where(~pixels, 0))
    leaks = not torch.equal(
        model.reconstruct(poisoned, visible, "target").where(~pixels, 0),
        model.reconstruct(images, visible, "target").where(~pixels, 0),
    )
    assert leaks == norm_pix  # true statistics of hidden units do leak: that is why they are not the default


def test_nearby_statistics_weigh_visible_units_by_distance():
    units = torch.tensor([0.0, 0.0, 10.0]).view(1, 1, 3, 1) + torch.tensor([-1.0, 1.0])
    visible = torch.tensor([[[True, False, True]]])
    mean, std = nearby_statistics(units, visible)
    assert mean.flatten().tolist() == pytest.approx([0, 5, 10])
    assert torch.allclose(std, unit_statistics(units)[1])
    far = nearby_statistics(units.expand(1, 1, 3, 2), torch.tensor([[[False, False, True]]]))[0]
    assert far.flatten().tolist() == pytest.approx([10, 10, 10])
    nothing = nearby_statistics(units, torch.zeros(1, 1, 3, dtype=torch.bool))
    assert all(x.isfinite().all() for x in nothing)


def test_decoder_ignores_features_of_units_a_view_does_not_see():
    torch.manual_seed(0)
    decoder = Decoder(16, 12, DECODER).eval()
    visible = torch.tensor([[[[True, False], [False, True]]]])
    features = torch.randn(1, 2, 2, 16)
    poisoned = torch.where(visible[0, ..., None], features, 1e6)
    assert torch.equal(decoder(features, visible), decoder(poisoned, visible))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", METHODS)
def test_loss_does_not_depend_on_how_a_batch_is_split(encoder, method):
    model = objective(encoder, method)
    images, seeds = pictures(), torch.arange(4)
    with torch.no_grad():
        whole = model(images, seeds).loss
        halves = [model(images[part], seeds[part]).loss for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


def test_unequal_views_are_supported():
    images = pictures(2, 40)[..., :24]  # 5 x 3 units
    for encoder in ENCODERS:
        for method, views in (("coma2", 2), ("coma4", 4)):
            out = objective(encoder, method)(images, torch.arange(2))
            assert tuple(out.visible[:, 0].flatten(1).sum(1).tolist()) == group_sizes(15, views)


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(BadInput, match="whole mask units"):
        objective("dyvit", "coma2")(torch.randn(1, 3, 33, 32), torch.arange(1))
    with pytest.raises(BadInput, match="leaves none to see"):
        objective("dyvit", "mae", mask_ratio=0.99)(pictures(), torch.arange(4))
    with pytest.raises(BadInput, match=r"--objective\.views 1 must be 2 to 1024"):
        CoMAConfig(views=1)
    with pytest.raises(BadInput, match=r"--objective\.mask-ratio 1 must be more than 0 and less than 1"):
        MAEConfig(mask_ratio=1.0)


CURVES = [(encoder, method) for encoder in ENCODERS for method in ("coma2", "mae")]


@pytest.mark.parametrize(("encoder", "method"), CURVES)
def test_golden_loss_curve(encoder, method, golden_curve):
    curve = loss_curve(objective(encoder, method), pictures(8), steps=30)
    golden_curve("loss_curves.json", f"{encoder} {method}", curve)
