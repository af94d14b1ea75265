"""DyViT's contract: no leak between views, any size, views together == views apart, golden sizes."""

from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import DyViTConfig, ViTConfig, dyvit_preset, encoder_preset
from pretrain.errors import BadInput
from pretrain.masking.partition import group_of, partition
from pretrain.masking.units import pad_to_units, spread, unit_grid
from pretrain.models import DyViT, ViT, build_encoder
from pretrain.models.attention import Consecutive, stage_layout
from pretrain.models.dyvit import FIRST_SIDE, Stage
from pretrain.models.sequences import Sequences, image_sequences

TINY = DyViTConfig(
    patch=1, dim=16, depths=(1, 2, 1, 1), heads=(2, 2, 4, 4), windows=((4, 8), (3, 4), (0, 3), (2,))
)


def awake(encoder, std=0.08):
    """Random weights everywhere, so that no branch is silent (a fresh gate is)."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return encoder.eval()


def leak(encoder, height, width, views):
    """Largest change in the features of the other views when one view's pixels change."""
    torch.manual_seed(2)
    unit = encoder.unit
    h, w = unit_grid(height, width, unit)
    group = partition(torch.arange(2), h, w, views)
    images = torch.randn(2, encoder.config.channels, height, width)
    touched = (group == views - 1).repeat_interleave(unit, 1).repeat_interleave(unit, 2)[:, None]
    changed = torch.where(touched[..., :height, :width], images * -7 + 3, images)
    worst = 0.0
    with torch.no_grad():
        pyramids = encoder(images, group), encoder(changed, group)
        for before, after, stride in zip(*pyramids, encoder.strides, strict=True):
            h_i, w_i = before.shape[-2:]
            side = unit // stride
            others = (group != views - 1).repeat_interleave(side, 1).repeat_interleave(side, 2)
            difference = (before - after).abs().amax(1)
            worst = max(worst, float(difference[others[:, :h_i, :w_i]].max()))
            assert difference[~others[:, :h_i, :w_i]].max() > 0  # the view itself does change
    return worst


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
    monkeypatch.setattr(Sequences, "mean", lambda _, x: x.mean(dim=(0, 1, 2), keepdim=True))
    assert leak(awake(DyViT(TINY)), 24, 24, 2) > 0


def test_the_leak_test_catches_a_missing_mask(monkeypatch):
    import pretrain.models.attention as attention

    monkeypatch.setattr(attention, "same_group_bias", lambda *_: None)
    assert leak(awake(DyViT(TINY)), 24, 24, 2) > 0


def test_the_leak_test_catches_a_unit_in_the_wrong_view(monkeypatch):
    import pretrain.models.dyvit as dyvit

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
        ("sequences.Sequences.mean", lambda _, x: x.mean(dim=(0, 1, 2), keepdim=True)),
        ("sequences.Sequences.at", lambda _, table: table[:5][None]),
    ],
    ids=["no rotary", "slots without a unit", "tokens out of order", "gate over all views", "wrong places"],
)
def test_the_comparison_notices(fault, monkeypatch):
    name, wrong = fault
    monkeypatch.setattr(f"pretrain.models.{name}", wrong)
    assert off_by((24, 24), 2) > 1e-4


def test_units_that_no_view_sees_are_zero_at_every_level():
    encoder = awake(DyViT(TINY))
    group = torch.tensor([[[0, -1, 0], [1, 1, -1]]])
    with torch.no_grad():
        for level, stride in zip(encoder(torch.randn(1, 3, 16, 24), group), encoder.strides, strict=True):
            unseen = spread(group, encoder.unit // stride) < 0
            energy = level.abs().sum(1)
            assert (energy[unseen] == 0).all() and (energy[~unseen] > 0).all()


@pytest.mark.parametrize("preset", ["tiny", "small", "base", "large"])
@pytest.mark.parametrize("image_size", [32, 64, 224, 448])
def test_presets_cut_no_windows_from_the_map(preset, image_size):
    config = dyvit_preset(preset, image_size)
    units = image_size // config.unit
    sequences = image_sequences(units, units)
    for stage, windows in enumerate(config.windows):
        tokens = torch.empty(1, units**2, 1, 1)
        layout = stage_layout(sequences, windows, 8, FIRST_SIDE >> stage, tokens)
        assert all(isinstance(window, Consecutive) for window in layout.windows)


@pytest.mark.parametrize("windows", [(4, 2), (0, 3)])
def test_many_windows_are_attended_in_pieces(windows, monkeypatch):
    encoder = awake(DyViT(replace(TINY, windows=(windows,) * 4)), std=0.3)
    images, group = torch.randn(3, 3, 24, 40), partition(torch.arange(3), 3, 5, 2)
    with torch.no_grad():
        whole = encoder.forward_features(images, group)
        monkeypatch.setattr("pretrain.models.attention._MOST_WINDOWS", 4)
        torch.testing.assert_close(encoder.forward_features(images, group), whole)


def test_sizes_that_do_not_fit_the_groups_are_refused():
    group = partition(torch.arange(1), 3, 3, 2)
    for sizes in ((4, 5), (9,), (5, 4, 1)):
        with pytest.raises(BadInput, match="group map gives"):
            DyViT(TINY).forward_features(torch.randn(1, 3, 24, 24), group, sizes)


def test_without_groups_it_is_one_view_of_everything():
    encoder = awake(DyViT(TINY))
    images = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        plain = encoder.forward_features(images)
        one_group = encoder.forward_features(images, torch.zeros(1, 3, 5, dtype=torch.int64))
    torch.testing.assert_close(plain, one_group, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4, 16])
@pytest.mark.parametrize("size", [(32, 32), (33, 95), (224, 224), (200, 180)])
def test_pyramid_of_any_size_and_any_channels(size, channels):
    encoder = DyViT(replace(dyvit_preset("tiny", channels=channels), depths=(1, 1, 1, 1))).eval()
    with torch.no_grad():
        pyramid = encoder(torch.randn(2, channels, *size))
    for i, (x, stride) in enumerate(zip(pyramid, (4, 8, 16, 32), strict=True)):
        assert x.shape == (2, 32 * 2**i, -(-size[0] // stride), -(-size[1] // stride))
        assert x.isfinite().all()


def test_window_padding_changes_nothing():
    # 5 x 5 units at stage 4: a window of 4 pads the map to 8 x 8; top-left windows must not notice.
    encoder = awake(DyViT(replace(TINY, windows=((8,), (4,), (2,), (4,)))))
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        whole = encoder.forward_features(images)
        corner = encoder.forward_features(images[..., :32, :32])
    torch.testing.assert_close(whole[:, :4, :4], corner, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [64, 256, 448, 800])
def test_features_of_a_flat_image_do_not_depend_on_the_resolution(size):
    # "Window Attention is Bugged" (Bolya et al. 2024): absolute positions under window attention fail this.
    encoder = awake(DyViT(replace(dyvit_preset("tiny"), depths=(1, 1, 1, 1))))
    flat = torch.tensor([0.3, -0.8, 1.1]).view(1, 3, 1, 1)
    with torch.no_grad():
        reference = encoder.forward_features(flat.expand(1, 3, 224, 224))[0, 0, 0]
        features = encoder.forward_features(flat.expand(1, 3, size, size))
    torch.testing.assert_close(features, reference.expand_as(features), rtol=1e-3, atol=1e-3)


def test_features_of_a_tiled_image_repeat_with_its_tiles():
    # With windows inside a 112 px tile, every tile must have the same features at any resolution.
    encoder = awake(DyViT(replace(dyvit_preset("tiny"), windows=((4, 8), (4, 7), (7,), (1,)))))
    tile = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        one = encoder.forward_features(tile)
        nine = encoder.forward_features(tile.repeat(1, 1, 3, 3))
    torch.testing.assert_close(nine, one.repeat(1, 3, 3, 1), rtol=1e-3, atol=1e-3)


GOLDEN = {  # parameters, multiply-accumulates of one 224 px image
    "tiny": (3_060_600, 451_083_776),
    "small": (15_487_984, 2_368_344_064),
    "base": (34_802_664, 5_229_049_344),
    "large": (119_792_124, 19_646_596_224),
    "vit-small": (21_590_016, 4_598_498_304),
    "vit-base": (85_647_360, 17_563_060_224),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_size_of_presets(name):
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # shapes only
        encoder = build_encoder(encoder_preset(name))
        with FlopCounterMode(display=False) as counter:
            encoder.forward_features(torch.zeros(1, 3, 224, 224))
    assert (sum(p.numel() for p in encoder.parameters()), counter.get_total_flops() // 2) == GOLDEN[name]


def test_gradient_checkpointing_computes_twice_and_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        encoder = awake(DyViT(TINY)).train()
        encoder.set_grad_checkpointing(recompute)
        passes = []
        block = encoder.get_submodule("stages.1.blocks.1")
        block.register_forward_pre_hook(lambda *_, seen=passes: seen.append(1))
        torch.manual_seed(0)
        encoder.forward_features(
            torch.randn(1, 3, 24, 24), partition(torch.tensor([1]), 3, 3, 2)
        ).sum().backward()
        assert len(passes) == 1 + recompute
        gradients.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_captured_graph_equals_eager():
    encoder = awake(DyViT(TINY))
    images, group = torch.randn(2, 3, 24, 24), partition(torch.arange(2), 3, 3, 2)
    captured = torch.compile(encoder.forward_features, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = encoder.forward_features(images, group)
        torch.testing.assert_close(captured(images, group, (5, 4)), expected)


def test_compiled_attention_is_torchs_own():
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph

    encoder = DyViT(TINY)
    with torch.no_grad():
        torch.compile(encoder.forward_features, backend=keep, fullgraph=True)(torch.randn(1, 3, 16, 16))
    assert graphs[0].count("scaled_dot_product_attention") == sum(
        len(windows) * depth for windows, depth in zip(TINY.windows, TINY.depths, strict=True)
    )


@pytest.mark.parametrize("config", [TINY, ViTConfig(patch=8, dim=16, depth=2, heads=2)])
def test_one_view_in_place_equals_dropped_units(config, monkeypatch):
    encoder = awake(build_encoder(config)).eval()
    images = torch.randn(3, 3, 5 * encoder.unit - 3, 4 * encoder.unit)
    visible = torch.rand(3, 5, 4) < 0.4
    visible[:, 0, 0] = True
    group = group_of(visible)
    with torch.no_grad():
        expected = encoder.forward_features(images, group)
        monkeypatch.setattr("pretrain.models.sequences.is_exporting", lambda: True)
        found = encoder.forward_features(images, group)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize("encoder", [DyViT(TINY), ViT(ViTConfig(patch=8, dim=16, depth=1, heads=2))])
def test_what_does_not_fit_is_refused(encoder):
    with pytest.raises(BadInput, match="takes \\[batch, 3"):
        encoder(torch.randn(1, 4, 32, 32))
    with pytest.raises(BadInput, match="smaller than a mask unit"):
        encoder(torch.randn(1, 3, 7, 32))
    with pytest.raises(BadInput, match="does not fit"):
        encoder(torch.randn(1, 3, 32, 32), torch.zeros(1, 3, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": ((4,), (4,), (4,))}, "4 stages"),
        ({"windows": ((4, 8, 2), (4,), (4,), (4,))}, "cannot be shared"),
        ({"windows": ((-1,), (4,), (4,), (4,))}, ">= 0"),
        ({"dim": 12}, "multiple of 4"),
        ({"channels": 17}, "1 to 16"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(BadInput, match=message):
        replace(TINY, **change)


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


def test_global_blocks_attend_to_the_whole_map():
    plain = DyViTConfig(
        patch=1, dim=16, depths=(1, 1, 4, 2), heads=(2, 2, 4, 4), windows=((4,), (4,), (2, 2), (1,))
    )
    images = torch.randn(2, 3, 40, 56)
    narrow, some, all_of_them = (awake(DyViT(replace(plain, global_blocks=count))) for count in (0, 2, 4))
    everywhere = awake(DyViT(replace(plain, windows=((4,), (4,), (0, 0), (0,)))))
    assert [sorted(cast(Stage, stage).whole) for stage in some.stages] == [[], [], [1, 3], [0, 1]]
    with torch.no_grad():
        outputs = [encoder(images)[-1] for encoder in (narrow, some, all_of_them, everywhere)]
    torch.testing.assert_close(outputs[2], outputs[3])
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])
    assert leak(some, 40, 56, 2) == 0.0


def test_more_global_blocks_than_blocks_are_refused():
    with pytest.raises(BadInput, match="stage 3 has 6 blocks"):
        replace(dyvit_preset("tiny"), global_blocks=7)
