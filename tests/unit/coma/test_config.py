"""Settings as plain data: presets, JSON both ways, and refusal of what does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from coma.artifact import ArtifactConfig, library_versions
from coma.config import (
    ENCODER_PRESETS,
    METHOD_PRESETS,
    BeyondConfig,
    DataConfig,
    DecoderConfig,
    DyViTConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    ViTConfig,
    dyvit_preset,
    encoder_preset,
    method_preset,
)
from coma.config.serialization import from_plain, read_config, to_plain
from coma.errors import BadInput
from coma.image_size import ImageSize


@pytest.mark.parametrize("method", METHOD_PRESETS)
@pytest.mark.parametrize("model", ENCODER_PRESETS)
def test_every_preset_survives_json(model, method):
    config = PretrainConfig(
        data=DataConfig(Path("photos"), mean=(0.5,), std=(0.2,)),
        model=encoder_preset(model, 64, channels=1),
        objective=method_preset(method),
        optimizer=OptimizerConfig(steps=3),
        run=RunConfig(Path("out")),
    )
    assert from_plain(json.loads(json.dumps(to_plain(config))), PretrainConfig, source="x") == config


@pytest.mark.parametrize("size", [28, 32, 48, 64, 96, 112, 224, 384, 448])
@pytest.mark.parametrize("model", ENCODER_PRESETS)
def test_presets_leave_several_units_to_choose_from(model, size):
    config = encoder_preset(model, size)
    assert (size // config.unit) ** 2 >= 9
    assert config == encoder_preset(model, size)


def test_windows_follow_the_map():
    assert dyvit_preset("base", 224).windows[2] == (2, 14)
    assert dyvit_preset("base", 256).windows[2] == (2, 16)
    assert dyvit_preset("tiny", 32).unit == 8 and dyvit_preset("tiny", 224).unit == 32


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data", "image_size"), 224.7, "image_size"),
        (("data", "image_size"), "224", "image_size"),
        (("data", "flip"), 1, "flip"),
        (("run", "seed"), True, "seed"),
        (("run", "parallel"), "dp", "parallel"),
        (("model", "wndows"), 1, "wndows"),
        (("model", "architecture"), "resnet", "resnet"),
        (("optimizer", "steps"), [1], "steps"),
        (("model", "channels"), 99, "1 to 16"),
    ],
)
def test_fields_that_do_not_fit_are_named(path, value, message):
    plain = to_plain(PretrainConfig())
    plain[path[0]][path[1]] = value
    with pytest.raises(BadInput, match=message) as error:
        from_plain(plain, PretrainConfig, source="run/config.json")
    assert str(error.value).startswith("run/config.json: ")


def test_unreadable_configs_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        read_config(tmp_path / "nothing.json")
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(BadInput, match="not a readable config"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: DataConfig(mean=(0.5,)), "both"),
        (lambda: DataConfig(mean=(0.5,), std=(0.0,)), "--std: 0 must be at least 1e-09"),
        (lambda: DataConfig(mean=(0.5,), std=(1e-30,)), "--std: 1e-30 must be at least 1e-09"),
        (lambda: DataConfig(crop_scale=(0.5, 0.2)), "smallest share, then"),
        (lambda: ViTConfig(dim=10, heads=3), "multiple of 4"),
        (lambda: encoder_preset("huge"), "no model preset"),
        (lambda: method_preset("simclr"), "no method"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(BadInput, match=message):
        wrong()


def test_learning_rate_scales_with_the_batch():
    assert OptimizerConfig(batch_size=512).lr == pytest.approx(3e-4)
    assert replace(DyViTConfig(), patch=2).unit == 16


@pytest.mark.parametrize(("degrade", "side"), [("zoom-in+mask", 288), ("zoom-in", 288), ("blur", 224)])
def test_an_artifact_tells_the_size_of_what_is_rebuilt(degrade, side):
    """Its image size stays what the encoder saw, which is what features are measured at."""
    run = PretrainConfig(objective=BeyondConfig(degrade))
    about = ArtifactConfig(
        "pretrained",
        run.model,
        run.objective,
        ImageSize.of(224),
        (0.5,) * 3,
        (0.2,) * 3,
        None,
        {},
        library_versions(),
    )
    assert about.view_size == run.view_size == (side, side)
    assert replace(about, kind="backbone", objective=None).view_size == (224, 224)


def test_decoders_that_cannot_be_built():
    for dim, heads in ((192, 5), (34, 2)):
        with pytest.raises(BadInput, match=f"decoder dim {dim} must be a multiple of 4 and of its {heads}"):
            DecoderConfig(dim, heads=heads)
