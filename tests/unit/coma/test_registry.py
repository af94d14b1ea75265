"""A method is one entry of `coma.registry` and its file; everything else asks the registry."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import torch

from coma import registry
from coma.config import (
    CoMAConfig,
    DecoderConfig,
    ObjectiveConfig,
    PretrainConfig,
    encoder_preset,
    method_preset,
)
from coma.config.serialization import from_plain, to_plain
from coma.errors import BadInput
from coma.models import build_encoder
from coma.objectives import MaskedPixels, ObjectiveOutput, build_objective
from coma.ranges import INSIDE

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class ToyConfig(ObjectiveConfig):
    """Predicts the right half from the left."""

    share: Annotated[float, INSIDE] = 0.5
    norm_pix: bool = False
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(16, 1, 2))


class Toy(MaskedPixels):
    config: ToyConfig

    def forward(self, images: torch.Tensor, seeds: torch.Tensor) -> ObjectiveOutput:
        h, w = self.grid(images)
        visible = torch.arange(w).expand(1, len(images), h, w) < w * self.config.share
        return self.predict(images, self.encode(images, visible[0])[None], visible)


@pytest.fixture
def toy(monkeypatch):
    entry = registry.Method(
        f"{__name__}:ToyConfig", f"{__name__}:Toy", {"toy": registry.Preset("left to right", {"share": 0.25})}
    )
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[ToyConfig.__module__])
    monkeypatch.setitem(registry.METHODS, "toy", entry)


def test_a_method_is_added_by_one_entry_and_learns(toy):
    objective = method_preset("toy", decoder_dim=32)
    assert objective == ToyConfig(0.25, False, DecoderConfig(16, 1, 1))  # its own width, 32 channels a head
    config = PretrainConfig(model=encoder_preset("tiny", 32), objective=objective)
    plain = to_plain(config)
    assert plain["objective"]["method"] == "toy"
    assert from_plain(plain, PretrainConfig, source="here") == config
    with pytest.raises(BadInput, match="share"):
        from_plain({**plain, "objective": plain["objective"] | {"share": 2.0}}, PretrainConfig, source="here")

    torch.manual_seed(0)
    model = build_objective(config.objective, build_encoder(config.model))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images, seeds = torch.randn(2, 3, 64, 64), torch.arange(2)
    before = model(images, seeds)
    before.loss.backward()
    optimizer.step()
    assert model(images, seeds).loss < before.loss
    assert model.reconstruct(images, before.visible[0]).shape == images.shape


def test_settings_of_no_entry_are_named():
    @dataclass(frozen=True)
    class Unlisted(CoMAConfig):
        pass

    with pytest.raises(TypeError, match="Unlisted is in no entry"):
        build_objective(Unlisted(), build_encoder(encoder_preset("tiny", 32)))


def test_all_classes_of_the_registry_are_there():
    for method in registry.METHODS.values():
        assert issubclass(registry.resolve(method.config), ObjectiveConfig)
        assert issubclass(registry.resolve(method.objective), MaskedPixels)
    for architecture in registry.ARCHITECTURES.values():
        assert issubclass(registry.resolve(architecture.classifier), registry.resolve(architecture.encoder))


def test_rooms_ask_encoders_instead_of_testing_their_types():
    """`isinstance` on an encoder or its settings stays in `coma.models` and `coma.config`."""
    kinds = "DyViT|ViT|DyViTConfig|ViTConfig|DyViTClassifier|ViTClassifier"
    asked = re.compile(rf"isinstance\([^()]*({kinds})")
    rooms = ("coma", "pretrain", "downstream", "export", "demo")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    found = {name for name, text in texts.items() if asked.search(text)}
    found = {name for name in found if not name.startswith(("coma/models/", "coma/config/"))}
    allowed = {"downstream/openmmlab/optim.py"}  # mmengine's backbones of the same names
    assert found <= allowed and "downstream/openmmlab/optim.py" in texts
