"""A very small artifact, and ways to spoil it."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from coma.artifact import ArtifactConfig, library_versions
from coma.config import DecoderConfig, DyViTConfig, MAEConfig, ViTConfig
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.objectives import build_objective

MODEL = ViTConfig(channels=2, patch=4, dim=8, depth=1, heads=2)
DYVIT = DyViTConfig(patch=1, dim=8, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), windows=((4, 8),) * 4)
OBJECTIVE = MAEConfig(decoder=DecoderConfig(dim=8, depth=1, heads=2))


def description(**changes) -> ArtifactConfig:
    plain = ArtifactConfig(
        kind="pretrained",
        model=MODEL,
        objective=OBJECTIVE,
        image_size=ImageSize.of(16),
        mean=(0.5, 0.4),
        std=(0.2, 0.1),
        class_names=None,
        trained={"method": "mae", "steps": 3, "loss": 0.5, "ema": None},
        versions=library_versions(),
    )
    return replace(plain, **changes)


def pretrained(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_objective(OBJECTIVE, build_encoder(MODEL)).state_dict()


def rewrite(directory: Path, **changes) -> None:
    """Change the description, as somebody who knows what they do."""
    plain = json.loads((directory / "config.json").read_text())
    plain.pop("checksums", None)
    (directory / "config.json").write_text(json.dumps({**plain, **changes}))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
