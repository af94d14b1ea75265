"""DyViT's contract: no leak between views, any size, dense == dropped tokens, golden sizes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import DyViTConfig, ViTConfig, dyvit_preset, encoder_preset
from pretrain.errors import BadInput
from pretrain.masking.partition import partition
from pretrain.masking.units import pad_to_units, unit_grid
from pretrain.models import DyViT, ViT, build_encoder
from pretrain.models.sequences import Sequences, image_sequences

TINY = DyViTConfig(
    patch=1, dim=16, depths=(1, 2, 1, 1), heads=(2, 2, 4, 4), windows=((4, 8), (3, 4), (0, 3), (2,))
)


def awake(encoder):
    """Random weights everywhere, so that no branch is silent (a fresh gate is)."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
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
@pytest.mark.parametrize("size", [(64, 96), (70, 97), (224, 224)])
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
        rows = torch.tensor([s[0] for s in spots]).float()
        cols = torch.tensor([s[1] for s in spots]).float()
        x = torch.stack([tokens[s] for s in spots])
        for block in stage.blocks:
            y = block.norm1(x)
            heads, d = block.attn.heads, x.shape[-1] // block.attn.heads
            q, k, v = block.attn.qkv(y).view(len(x), 3, heads, d).unbind(1)
            frequencies = 100.0 ** -(torch.arange(d // 4).float() / (d // 4))
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


@pytest.mark.parametrize(("size", "views"), [((24, 24), 2), ((32, 24), 4), ((19, 30), 2)])
def test_one_dense_pass_equals_separate_passes_with_dropped_tokens(size, views):
    encoder = awake(DyViT(TINY))
    images = torch.randn(1, 3, *size)
    h, w = unit_grid(size[0], size[1], encoder.unit)
    group = partition(torch.tensor([5]), h, w, views)
    with torch.no_grad():
        dense = encoder.forward_features(images, group)[0]
        for view in range(views):
            for spot, feature in dropped_token_pass(encoder, images, group[0] == view).items():
                torch.testing.assert_close(dense[spot], feature, rtol=1e-4, atol=1e-4)


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
    "small": (17_133_680, 2_696_761_344),
    "base": (42_197_352, 6_676_821_504),
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


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        encoder = awake(DyViT(TINY)).train()
        encoder.set_grad_checkpointing(recompute)
        torch.manual_seed(0)
        encoder.forward_features(
            torch.randn(1, 3, 24, 24), partition(torch.tensor([1]), 3, 3, 2)
        ).sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_captured_graph_equals_eager():
    encoder = awake(DyViT(TINY))
    images, group = torch.randn(2, 3, 24, 24), partition(torch.arange(2), 3, 3, 2)
    captured = torch.compile(encoder.forward_features, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = encoder.forward_features(images, group)
        torch.testing.assert_close(captured(images, group, (5, 4)), expected)


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
