"""What the tests of teachers and of the methods that have one share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from coma.config import (
    BalancedCoMAConfig,
    CMTConfig,
    DecoderConfig,
    DyViTConfig,
    ViTConfig,
)
from coma.models import build_encoder
from coma.models.teacher import Teacher
from coma.objectives import build_objective

DECODER = DecoderConfig(dim=32, depth=1, heads=2)
ENCODERS = {
    "dyvit": DyViTConfig(
        patch=1, dim=16, depths=(1, 1, 1, 1), heads=(2, 2, 4, 4), windows=((4, 8), (2, 4), (2, 0), (0,))
    ),
    "vit": ViTConfig(patch=8, dim=32, depth=2, heads=2),
}
STATISTICS = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
METHODS = {"cmt": CMTConfig(decoder=DECODER), "coma-balanced": BalancedCoMAConfig(decoder=DECODER)}


def timm_weights(folder: Path) -> Path:
    """A file of weights of timm's smallest vision transformer, classifier included."""
    torch.manual_seed(5)
    path = folder / "test_vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


def teacher() -> Any:
    torch.manual_seed(11)
    return Teacher(
        build_encoder(ViTConfig(patch=8, dim=24, depth=1, heads=2)), 24, (48, 48), STATISTICS, STATISTICS
    )


def objective(encoder="vit", method="cmt", **changes: Any) -> Any:
    torch.manual_seed(0)
    model = build_objective(replace(METHODS[method], **changes), build_encoder(ENCODERS[encoder]), teacher())
    return model.train()


def pictures(count=4, size=32):
    torch.manual_seed(3)
    ramp = torch.linspace(-1, 1, size)
    slopes = torch.randn(count, 3, 2, 1, 1)
    return slopes[:, :, 0] * ramp + slopes[:, :, 1] * ramp[:, None] + 0.05 * torch.randn(count, 3, size, size)
