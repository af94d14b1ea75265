"""Beyond Masking: what each degradation shows, where its loss lies, what it rebuilds, golden loss curves."""

import json
import re
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from short_runs import MODEL, at
from small_models import DECODER, ENCODERS, loss_curve
from small_models import pictures as drawn

from coma import cli, load_pretrained
from coma.config import (
    BeyondConfig,
    DataConfig,
    DecoderConfig,
    Degradation,
    DyViTConfig,
    PretrainConfig,
    ViTConfig,
    method_preset,
)
from coma.config.serialization import from_plain, to_plain
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.objectives import build_objective
from coma.objectives.degradations import border, degrade
from pretrain.training import pretrain

ALL = get_args(Degradation)
MASKED = ("zoom-in+mask", "zoom-in+coma")
BORDERED = ("zoom-in", *MASKED)
HIDING = (*BORDERED, "zoom-out+mask")


def pictures(count=4, size=48):
    return drawn(count, size)


def objective(encoder, kind, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = BeyondConfig(degrade=kind, decoder=DECODER, **changes)
    return build_objective(config, build_encoder(ENCODERS[encoder]))


# the objective ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_shapes_and_gradients(encoder, kind):
    model = objective(encoder, kind)
    out = model(pictures(), torch.arange(4))
    views = 2 if kind == "zoom-in+coma" else 1
    shown = {"zoom-in": 16, "zoom-in+mask": 4, "zoom-in+coma": 8, "zoom-out+mask": 9}.get(kind, 36)
    assert out.prediction.shape == (views, 4, 6, 6, 8 * 8 * 3)
    assert (out.visible.flatten(2).sum(-1) == shown).all()
    assert torch.equal(out.visible, model.draw_visible(torch.arange(4), 6, 6))
    if kind == "zoom-in+coma":
        assert torch.equal(out.visible.sum(0)[:, 1:5, 1:5], torch.ones(4, 4, 4, dtype=torch.int64))
    assert not out.visible[..., 0].any() or kind not in BORDERED
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
    elif kind == "zoom-out+mask":
        assert share[out.visible].abs().max() == 0
        hidden = units[~out.visible]
        torch.testing.assert_close(hidden, torch.full_like(hidden, 1 / (4 * 27)), rtol=1e-2, atol=1e-9)
    else:
        torch.testing.assert_close(units, torch.full_like(units, 1 / 144), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("kind", HIDING)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_prediction_knows_the_visible_pixels_only(encoder, kind):
    model = objective(encoder, kind, norm_pix=False).eval()
    images, seeds = pictures(), torch.arange(4)
    images, model.degraded = model.degraded(images, seeds), lambda images, seeds: images
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


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in ("distort", "zoom-out", "blur", "decolor")), ("distort", {"padding": "edge"})],
)
def test_what_is_shown_is_degraded_and_what_is_predicted_is_not(kind, settings):
    model = objective("vit", kind, norm_pix=False, **settings)
    images, seeds = pictures(), torch.arange(4)
    got: list[torch.Tensor] = []
    real = model.encoder.forward_features
    model.encoder.forward_features = lambda x, *a: got.append(x) or real(x, *a)
    out = model(images, seeds)
    assert torch.equal(got[0], degrade(images, seeds, kind, **settings)[0])
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
        poisoned = torch.where(pixels, shown, images * -3 + 2)
        assert torch.equal(model.reconstruct(poisoned, visible).where(~pixels, 0), filled.where(~pixels, 0))
    else:
        assert not torch.isclose(filled, shown).all(dim=(1, 2, 3)).any()  # every pixel is predicted


@pytest.mark.parametrize("kind", BORDERED)
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("size", [(48, 48), (43, 70)])
@pytest.mark.parametrize("statistics", ["visible", "target"])
def test_nothing_of_the_border_is_seen_whatever_the_mask_says(encoder, kind, size, statistics):
    model = objective(encoder, kind).eval()
    images = torch.randn(2, 3, *size)
    h, w = -(-size[0] // 8), -(-size[1] // 8)
    rows, cols = border(h), border(w)
    inside = torch.zeros(h, w, dtype=torch.bool)
    inside[rows : h - rows, cols : w - cols] = True
    visible = model.draw_visible(torch.arange(2), h, w)[0]
    filled = model.reconstruct(images, visible, statistics)
    assert torch.equal(model.reconstruct(images, visible | ~inside, statistics), filled)
    pixels = inside.repeat_interleave(8, 0).repeat_interleave(8, 1)[: size[0], : size[1]]
    assert not torch.isclose(filled, images)[..., ~pixels].all(dim=1).any()  # all of the border is predicted
    if statistics == "visible":
        poisoned = torch.where(pixels, images, images * -3 + 2)
        assert torch.equal(model.reconstruct(poisoned, visible | ~inside), filled)


def test_settings_and_views():
    config = PretrainConfig(model=DyViTConfig(), objective=BeyondConfig())
    assert config.view_size == (288, 288)
    assert replace(config, model=ViTConfig()).view_size == (288, 288)
    assert replace(config, objective=BeyondConfig(degrade="blur")).view_size == (224, 224)
    assert replace(config, data=DataConfig(image_size=ImageSize.of(32)), model=ENCODERS["vit"]).view_size == (
        48,
        48,
    )
    plain = to_plain(config)
    assert plain["objective"]["method"] == "beyond"
    assert from_plain(plain, PretrainConfig, source="x") == config
    assert method_preset("beyond") == BeyondConfig()


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(BadInput, match=r"--objective\.mask-ratio 1 must be more than 0 and less than 1"):
        BeyondConfig(mask_ratio=1.0)
    with pytest.raises(BadInput, match=r"--objective\.views 1 must be 2 to 1024"):
        BeyondConfig(views=1)
    with pytest.raises(BadInput, match=r"--objective\.border-weight 0 must be"):
        BeyondConfig(border_weight=0.0)
    with pytest.raises(BadInput, match=r"does not use it"):
        replace(BeyondConfig(mask_ratio=0.5), degrade="zoom-in")
    grey = build_encoder(ViTConfig(channels=1, patch=8, dim=32, depth=1, heads=2))
    with pytest.raises(BadInput, match="3 channels, not 1"):
        build_objective(BeyondConfig(degrade="decolor", decoder=DECODER), grey)
    with pytest.raises(BadInput, match="no centre to zoom in to"):
        objective("vit", "zoom-in").draw_visible(torch.arange(2), 2, 6)
    with pytest.raises(BadInput, match="leaves none to see"):
        objective("vit", "zoom-in+mask", mask_ratio=0.99)(pictures(), torch.arange(4))


@pytest.mark.parametrize(
    ("name", "value", "kinds"),
    [
        ("mask_ratio", 0.5, ("zoom-in+mask", "zoom-out+mask")),
        ("views", 3, MASKED[1:]),
        ("border_weight", 0.2, MASKED),
        ("padding", "edge", ("distort",)),
    ],
)
def test_a_setting_that_a_degradation_has_no_use_for_is_refused(name, value, kinds):
    flag = f"--objective.{name.replace('_', '-')} {value} belongs to {' and '.join(kinds)}; "
    for kind in ALL:
        if kind in kinds:
            assert getattr(BeyondConfig(degrade=kind, **{name: value}), name) == value
        else:
            with pytest.raises(BadInput, match=re.escape(f"{flag}{kind} does not use it")):
                BeyondConfig(degrade=kind, **{name: value})


# runs and commands -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zoom-in+coma", "zoom-out"])
def test_a_run_leaves_an_artifact_that_loads_reconstructs_and_evaluates(settings, tmp_path, kind):
    method = BeyondConfig(degrade=kind, decoder=DecoderConfig(8, 1, 2))
    config = replace(settings, model=MODEL, objective=method)
    folder = pretrain(at(config, tmp_path / "run"))
    assert (folder / "reconstructions" / "step-000005.png").stat().st_size > 5000
    model = load_pretrained(folder / "artifact")
    about = model.artifact
    assert about.image_size == (16, 16)
    assert about.trained["method"] == "beyond"
    images = torch.randn(2, 3, 32, 32)
    visible = model.draw_visible(torch.arange(2), 4, 4)[0]
    assert model.reconstruct(images, visible).shape == images.shape


def test_command_line(tmp_path, photos, capsys):
    common = ["pretrain", str(photos), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main([*common, "--degrade", "blur"]) == 2
    assert "--degrade blur belongs to --method beyond" in capsys.readouterr().err
    assert cli.main([*common, "--method", "beyond", "--degrade", "blur", "--objective.views", "3"]) == 2
    assert "--objective.views 3 belongs to zoom-in+coma; blur" in capsys.readouterr().err
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


CURVES = [("dyvit", "zoom-in+mask"), ("vit", "zoom-in+coma"), ("vit", "zoom-out"), ("vit", "decolor")]


@pytest.mark.parametrize(("encoder", "kind"), CURVES)
def test_golden_loss_curve(encoder, kind, golden_curve):
    curve = loss_curve(objective(encoder, kind), pictures(8), steps=20)
    golden_curve("loss_curves_beyond.json", f"{encoder} {kind}", curve)
