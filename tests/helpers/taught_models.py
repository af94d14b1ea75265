"""What the tests of teachers and of the methods that have one share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from small_models import DECODER, ENCODERS

from coma.config import (
    BalancedCoMAConfig,
    CMTConfig,
    ViTConfig,
)
from coma.models import build_encoder
from coma.models.teacher import Teacher
from coma.objectives import build_objective

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
