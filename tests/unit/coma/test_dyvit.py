"""DyViT's contract: any size, presets and their golden sizes, compiled and checkpointed; what is refused."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from encoders import TINY, awake, leak
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coma.config import DyViTConfig, ViTConfig, dyvit_preset, encoder_preset
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.masking.sampling import partition
from coma.models import DyViT, ViT, build_encoder
from coma.models.attention import Consecutive, stage_layout
from coma.models.dyvit import FIRST_SIDE, Stage
from coma.models.view_sequences import image_sequences


@pytest.mark.parametrize("preset", ["tiny", "small", "base", "large"])
@pytest.mark.parametrize("image_size", [32, 64, 224, 448, (64, 128), (448, 224), (32, 512)])
def test_presets_cut_no_windows_from_the_map(preset, image_size):
    config = dyvit_preset(preset, image_size)
    rows, cols = (side // config.unit for side in ImageSize.of(image_size))
    sequences = image_sequences(rows, cols)
    for stage, windows in enumerate(config.windows):
        tokens = torch.empty(1, rows * cols, 1, 1)
        layout = stage_layout(sequences, windows, 8, FIRST_SIDE >> stage, tokens)
        assert all(isinstance(window, Consecutive) for window in layout.windows)


@pytest.mark.parametrize("windows", [(4, 2), (0, 3)])
def test_many_windows_are_attended_in_pieces(windows, monkeypatch):
    encoder = awake(DyViT(replace(TINY, windows=(windows,) * 4)), std=0.3)
    images, group = torch.randn(3, 3, 24, 40), partition(torch.arange(3), 3, 5, 2)
    with torch.no_grad():
        whole = encoder.forward_features(images, group)
        monkeypatch.setattr("coma.models.attention._MOST_WINDOWS", 4)
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


@pytest.mark.slow
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
        ({"windows": ((-1,), (4,), (4,), (4,))}, "--model.windows: -1 must be at least 0"),
        ({"dim": 12}, "multiple of 4"),
        ({"channels": 17}, "1 to 16"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(BadInput, match=message):
        replace(TINY, **change)


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
