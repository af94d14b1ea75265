"""What tests share: one thread each, so that results depend on no machine, a few pictures, a short run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.config import (
    CoMAConfig,
    DataConfig,
    DecoderConfig,
    DyViTConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten small pictures of noise."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def settings(photos: Path, tmp_path: Path) -> PretrainConfig:
    """Five steps of a very small model."""
    model = DyViTConfig(
        patch=1, dim=8, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), windows=((4, 8), (4,), (4,), (0,))
    )
    return PretrainConfig(
        data=DataConfig(images=photos, image_size=16, workers=0),
        model=model,
        objective=CoMAConfig(decoder=DecoderConfig(8, 1, 2)),
        optimizer=OptimizerConfig(steps=5, batch_size=4),
        run=RunConfig(out=tmp_path / "run", log_steps=2, save_steps=2, sheet_steps=3, device="cpu"),
    )
