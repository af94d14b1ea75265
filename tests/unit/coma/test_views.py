"""Views: none sees another, and views together equal views apart, on DyViT and on ViT."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from encoders import TINY, awake, leak

from coma.config import ViTConfig, dyvit_preset
from coma.masking.patchify import pad_to_units, spread, unit_grid
from coma.masking.sampling import group_of, partition
from coma.models import DyViT, ViT, build_encoder
from coma.models.view_sequences import ViewSequences, image_sequences


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("size", [(64, 96), (70, 97), (224, 224), (230, 260)])  # the last is cut into windows
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_no_view_sees_another(preset, size, views):
    assert leak(awake(DyViT(dyvit_preset(preset))), size[0], size[1], views) == 0.0


@pytest.mark.parametrize("preset", ["base", "large"])
def test_no_view_sees_another_in_the_large_presets(preset):
    config = replace(dyvit_preset(preset), depths=(1, 1, 2, 1))  # blocks of a stage are alike
    assert leak(awake(DyViT(config)), 70, 97, 2) == 0.0


@pytest.mark.parametrize("windows", [(1, 2), (3, 5), (0, 4), (7, 14), (64, 2)])
def test_no_window_leaks(windows):
    config = replace(TINY, windows=(windows,) * 4, heads=(2, 2, 4, 8))
    assert leak(awake(DyViT(config)), 27, 37, 2) == 0.0


def test_the_leak_test_catches_a_gate_that_pools_over_the_map(monkeypatch):
    monkeypatch.setattr(ViewSequences, "mean", lambda _, x: x.mean(dim=(0, 1, 2), keepdim=True))
    assert leak(awake(DyViT(TINY)), 24, 24, 2) > 0


def test_the_leak_test_catches_a_missing_mask(monkeypatch):
    import coma.models.attention as attention

    monkeypatch.setattr(attention, "same_group_bias", lambda *_: None)
    assert leak(awake(DyViT(TINY)), 24, 24, 2) > 0


def test_the_leak_test_catches_a_unit_in_the_wrong_view(monkeypatch):
    import coma.models.dyvit as dyvit

    def misdealt(rows, cols, group, sizes):
        sequences = image_sequences(rows, cols, group, sizes)
        assert sequences.unit_of is not None
        wrong = sequences.unit_of.clone()
        wrong[:, 0] = wrong[:, 0].roll(1)
        return replace(sequences, unit_of=wrong)

    monkeypatch.setattr(dyvit, "image_sequences", misdealt)
    assert leak(awake(DyViT(TINY)), 24, 24, 2) > 0


def dropped_token_pass(encoder, images, shown):
    """One view of one image through DyViT, on the list of its own tokens only.

    Written from DyViT's definition, sharing the weights but none of the window, mask or gate code.
    """
    padded = pad_to_units(images, encoder.unit)
    h, w = unit_grid(padded.shape[-2], padded.shape[-1], encoder.unit)
    side = 8
    x = encoder.stem.norm(encoder.stem.conv(padded)[0].permute(1, 2, 0))
    h, w = h * side, w * side
    where = [(i, j) for i in range(h) for j in range(w) if shown[i // side, j // side]]
    tokens = {spot: x[spot] for spot in where}
    for stage in encoder.stages:
        if not isinstance(stage.merge, torch.nn.Identity):
            side //= 2
            coarse = {(i // 2, j // 2) for i, j in tokens}
            tokens = {
                (i, j): stage.merge.linear(
                    stage.merge.norm(
                        torch.cat([tokens[2 * i + p, 2 * j + q] for p in (0, 1) for q in (0, 1)])
                    )
                )
                for i, j in sorted(coarse)
            }
            h, w = h // 2, w // 2
        spots = sorted(tokens)
        rows = torch.tensor([s[0] for s in spots]).double()
        cols = torch.tensor([s[1] for s in spots]).double()
        x = torch.stack([tokens[s] for s in spots])
        for block in stage.blocks:
            y = block.norm1(x)
            heads, d = block.attn.heads, x.shape[-1] // block.attn.heads
            q, k, v = block.attn.qkv(y).view(len(x), 3, heads, d).unbind(1)
            frequencies = 100.0 ** -(torch.arange(d // 4).double() / (d // 4))
            angles = torch.cat([rows[:, None] * frequencies, cols[:, None] * frequencies], dim=-1)
            turn = torch.polar(torch.ones_like(angles), angles)[:, None]
            q, k = (torch.complex(*part.chunk(2, -1)) * turn for part in (q, k))
            scores = torch.einsum("ihd,jhd->hij", q, k.conj()).real / d**0.5
            per_window = heads // len(stage.windows)
            for g, window in enumerate(stage.windows):
                wh, ww = window or h, window or w
                cell = torch.stack([rows // wh, cols // ww])
                same = (cell[:, :, None] == cell[:, None, :]).all(0)
                scores[g * per_window : (g + 1) * per_window, ~same] = -torch.inf
            out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
            if block.attn.gate is not None:
                logits = block.attn.gate.out(F.gelu(block.attn.gate.hidden(out.mean(0))))
                out = out * (logits.view(len(stage.windows), -1).softmax(0) * len(stage.windows)).flatten()
            x = x + block.attn.proj(out)
            x = x + block.mlp(block.norm2(x))
        tokens = dict(zip(spots, x, strict=True))
    return {spot: encoder.norm(token) for spot, token in tokens.items()}


def off_by(size, views):
    """Largest difference between all views in one pass and a slow pass for each, in float64."""
    encoder = awake(DyViT(TINY), std=0.3).double()  # weights that make attention far from uniform
    torch.manual_seed(3)
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    h, w = unit_grid(size[0], size[1], encoder.unit)
    group = partition(torch.tensor([5]), h, w, views)
    with torch.no_grad():
        together = encoder.forward_features(images, group)[0]
        apart = [dropped_token_pass(encoder, images, group[0] == view) for view in range(views)]
    return max(float((together[spot] - f).abs().max()) for view in apart for spot, f in view.items())


SIZES_AND_VIEWS = [((24, 24), 2), ((32, 24), 4), ((19, 30), 2)]


@pytest.mark.parametrize(("size", "views"), SIZES_AND_VIEWS)
def test_one_pass_for_all_views_equals_slow_passes_with_dropped_tokens(size, views):
    assert off_by(size, views) < 1e-5  # rotary angles are float32


@pytest.mark.parametrize(
    "fault",
    [
        ("attention.rotate", lambda x, _: x),
        ("attention._real_bias", lambda *_: None),
        ("attention.nested_places", lambda side, _: torch.cartesian_prod(*[torch.arange(side)] * 2)),
        ("view_sequences.ViewSequences.mean", lambda _, x: x.mean(dim=(0, 1, 2), keepdim=True)),
        ("view_sequences.ViewSequences.at", lambda _, table: table[:5][None]),
    ],
    ids=["no rotary", "slots without a unit", "tokens out of order", "gate over all views", "wrong places"],
)
def test_the_comparison_notices(fault, monkeypatch):
    name, wrong = fault
    monkeypatch.setattr(f"coma.models.{name}", wrong)
    assert off_by((24, 24), 2) > 1e-4


def test_units_that_no_view_sees_are_zero_at_every_level():
    encoder = awake(DyViT(TINY))
    group = torch.tensor([[[0, -1, 0], [1, 1, -1]]])
    with torch.no_grad():
        for level, stride in zip(encoder(torch.randn(1, 3, 16, 24), group), encoder.strides, strict=True):
            unseen = spread(group, encoder.unit // stride) < 0
            energy = level.abs().sum(1)
            assert (energy[unseen] == 0).all() and (energy[~unseen] > 0).all()


@pytest.mark.parametrize("config", [TINY, ViTConfig(patch=8, dim=16, depth=2, heads=2)])
def test_one_view_in_place_equals_dropped_units(config, monkeypatch):
    encoder = awake(build_encoder(config)).eval()
    images = torch.randn(3, 3, 5 * encoder.unit - 3, 4 * encoder.unit)
    visible = torch.rand(3, 5, 4) < 0.4
    visible[:, 0, 0] = True
    group = group_of(visible)
    with torch.no_grad():
        expected = encoder.forward_features(images, group)
        monkeypatch.setattr("coma.models.view_sequences.is_exporting", lambda: True)
        found = encoder.forward_features(images, group)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.abs().sum() > 0


def test_vit_views_equal_separate_passes_with_dropped_tokens():
    encoder = awake(ViT(ViTConfig(patch=8, dim=16, depth=2, heads=2)))
    images = torch.randn(3, 3, 40, 24)
    group = partition(torch.arange(3), 5, 3, 2)
    group[group == 1] = torch.tensor([1, -1, 1, -1, 1, 1, 1]).repeat(3)  # a dropped unit belongs to no view
    with torch.no_grad():
        together = encoder.forward_features(images, group)
        static = encoder.forward_features(images, group, (8, 5))
        assert torch.equal(together, static)
        assert together[group == -1].abs().sum() == 0
        for view in (0, 1):
            alone = encoder.forward_features(images, torch.where(group == view, 0, -1))
            torch.testing.assert_close(together[group == view], alone[group == view])


def test_vit_takes_samples_that_see_different_numbers_of_units():
    encoder = awake(ViT(ViTConfig(patch=8, dim=16, depth=2, heads=2)))
    images = torch.randn(2, 3, 16, 24)
    group = torch.tensor([[[0, -1, 0], [-1, -1, -1]], [[0, 0, 0], [0, 0, -1]]])
    with torch.no_grad():
        together = encoder.forward_features(images, group)
        for i in (0, 1):
            alone = encoder.forward_features(images[i : i + 1], group[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("views", [2, 4])
def test_no_view_sees_another_on_a_plain_vit(views):
    assert leak(awake(ViT(ViTConfig(patch=8, dim=16, depth=2, heads=2))), 43, 30, views) == 0.0
