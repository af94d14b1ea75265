"""The reading copy in docs/ computes what the toolkit does, from the same weights."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from export_files import awake

from coma.config import CoMAConfig, DecoderConfig, DyViTConfig, dyvit_preset
from coma.masking.sampling import noise, partition
from coma.models import build_encoder
from coma.objectives import build_objective

FILE = Path(__file__).parents[3] / "docs" / "coma_in_one_file.py"
CASES = {
    "tiny, 64 px": (dyvit_preset("tiny", 64), 2, (64, 64)),
    "tiny, 96 px: views of 5 and 4 units": (dyvit_preset("tiny", 96), 2, (96, 96)),
    "windows and gates of all kinds, four views, five channels": (
        DyViTConfig(
            channels=5, patch=1, dim=16, depths=(1, 2, 1, 1), heads=(4, 2, 4, 2),
            windows=((2, 4, 8, 0), (4, 0), (2,), (0, 1)),
        ),
        4, (16, 40),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def one_file():
    spec = importlib.util.spec_from_file_location("coma_in_one_file", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair(one_file: Any, config: DyViTConfig, views: int) -> tuple[Any, Any]:
    """A model of the toolkit, and the reading copy with its weights."""
    decoder = DecoderConfig(dim=32, depth=2, heads=4)
    real = awake(build_objective(CoMAConfig(views=views, decoder=decoder), build_encoder(config))).eval()
    encoder = one_file.DyViT(
        config.channels, config.patch, config.dim, config.depths, config.heads, config.windows
    )
    pixels = config.unit**2 * config.channels
    copy = one_file.CoMA(encoder, one_file.Decoder(config.dim * 8, pixels, 32, 2, 4), views)
    copy.load_state_dict(real.state_dict())  # strict: the names are the same, and no tensor is left over
    return real, copy.eval()


def difference(own, real):
    """The norm of the difference, relative to the norm."""
    return ((own - real).norm() / real.norm()).item()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_reading_copy_equals_the_toolkit(one_file, case):
    config, views, (height, width) = CASES[case]
    real, copy = pair(one_file, config, views)
    images, seeds = torch.randn(3, config.channels, height, width), torch.tensor([3, 1, 4])
    h, w = height // config.unit, width // config.unit
    group, keys = partition(seeds, h, w, views), noise(seeds, h * w)

    masks = one_file.partition(keys, h, w, views)
    assert all(torch.equal(mask, group == view) for view, mask in enumerate(masks))

    features = real.encoder.forward_features(images, group)
    for mask, own in zip(masks, copy.encoder(images, masks), strict=True):
        assert difference(own.flatten(0, 1), features[mask]) < 1e-6

    assert difference(copy(images, keys), real(images, seeds).loss) < 1e-6

    rebuilt = real.reconstruct(images, masks[0], statistics="target")
    assert difference(copy.reconstruct(images, masks[0]), rebuilt) < 1e-6


def test_another_formula_is_noticed(one_file, monkeypatch):
    config, views, (height, width) = CASES["tiny, 64 px"]
    real, copy = pair(one_file, config, views)
    images, seeds = torch.randn(2, 3, height, width), torch.tensor([3, 1])
    keys = noise(seeds, (height // config.unit) * (width // config.unit))
    monkeypatch.setattr(one_file, "rotate", lambda x, table: x)  # no positions in the encoder
    assert abs(copy(images, keys) - real(images, seeds).loss) > 1e-4


def test_it_is_short():
    assert len(FILE.read_text().splitlines()) <= 250
