"""Image sizes of one number or two, in code, files and commands; what follows from them for the encoders."""

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest
import torch
import tyro
from artifact_files import description, pretrained, rewrite
from small_models import DECODER, ENCODERS
from taught_models import METHODS as TAUGHT
from taught_models import teacher

from coma.arguments import from_keywords, parse_arguments
from coma.artifact import load_artifact, save_artifact
from coma.config import (
    BeyondConfig,
    CoMAConfig,
    DataConfig,
    MAEConfig,
    ObjectiveConfig,
    PretrainConfig,
    encoder_preset,
)
from coma.config.serialization import read_config, to_plain
from coma.errors import BadArtifact, BadInput
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.objectives import build_objective
from coma.ranges import SIDE, Ranged
from pretrain.training.run_plan import check_objective, check_shapes
from pretrain.training.throughput import encoder_flops, views_per_image

WIDE = ImageSize(32, 64)

# sizes ------------------------------------------------------------------------------------------


def test_one_number_is_a_square():
    assert ImageSize.of(224) == ImageSize.of([224, 224]) == (224, 224)
    assert (str(ImageSize.of(224)), ImageSize.of(224).words, ImageSize.of(224).plain) == ("224", "224", 224)
    assert (str(WIDE), WIDE.words, WIDE.plain) == ("32 x 64", "32 64", [32, 64])
    assert ImageSize.parse(WIDE.words) == WIDE and ImageSize.parse("32") == (32, 32)


@pytest.mark.parametrize("value", [True, "64", 64.0, [64], (64, 64.0), (1, 2, 3), None, {"height": 1}])
def test_anything_else_is_refused(value):
    with pytest.raises(BadInput, match="must be a whole number, or two: height and width"):
        ImageSize.of(value)


def test_settings_take_numbers_and_pairs():
    assert DataConfig(image_size=64).image_size == ImageSize(64, 64)  # type: ignore[arg-type]
    assert DataConfig(image_size=(32, 64)).image_size == WIDE  # type: ignore[arg-type]
    assert isinstance(DataConfig(image_size=(32, 64)).image_size, ImageSize)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="--image-size: 0 must be at least 1"):
        DataConfig(image_size=ImageSize(0, 64))
    with pytest.raises(BadInput, match="--image-size 0 must be at least 1"):
        DataConfig(image_size=ImageSize(0, 0))


# commands ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings(Ranged):
    """Settings of a command."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    image_size: Annotated[ImageSize, SIDE] = ImageSize(224, 224)  # noqa: RUF009
    other_size: ImageSize | None = None


def parsed(*argv: str) -> Settings:
    return parse_arguments(Settings, argv, prog="coma some")


def test_flags_take_a_second_number_and_leave_other_words_alone():
    assert parsed().image_size == (224, 224) and parsed().other_size is None
    for argv in (["--image-size", "32", "64"], ["--image-size=32", "64"], ["--image_size", "32", "64"]):
        assert parsed(*argv, "--other-size", "8") == Settings((), WIDE, ImageSize(8, 8))
        assert parsed(*argv, "PHOTOS", "MORE") == Settings(("PHOTOS", "MORE"), WIDE)
    assert parsed("--image-size", "64", "PHOTOS", "7") == Settings(("PHOTOS", "7"), ImageSize.of(64))
    assert parsed("--image-size", "32", "64", "7") == Settings(("7",), WIDE)  # two are enough
    assert parsed("--other-size", "None").other_size is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["64x128"], "--image-size '64x128' must be a whole number, or two: height and width"),
        (["64.5"], "--image-size '64.5' must be a whole number"),
        (["64", "-1"], "--image-size: -1 must be at least 1"),
        (["0"], "--image-size 0 must be at least 1"),
        (["9" * 5000], "must be a whole number"),
        ([], "--image-size needs a value"),
    ],
)
def test_flags_refuse_other_words_in_a_line(words, message):
    with pytest.raises(BadInput) as raised:
        parsed("--image-size", *words)
    assert message in str(raised.value) and len(str(raised.value)) < 200


def test_keywords_of_python_calls_are_numbers_or_pairs():
    for given, size in ((64, (64, 64)), ((32, 64), WIDE), ([32, 64], WIDE), (None, (224, 224))):
        assert parsed(*from_keywords({"image_size": given})).image_size == size


# files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "model: tiny\ndata:\n  image_size: [64, 128]\n"),
        ("a.toml", 'model = "tiny"\n[data]\nimage_size = [64, 128]\n'),
        ("a.json", '{"model": "tiny", "data": {"image_size": [64, 128]}}'),
    ],
)
def test_settings_files_hold_numbers_or_pairs(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    config = read_config(tmp_path / name)
    assert config.data.image_size == (64, 128)
    assert config.model == encoder_preset("tiny", (64, 128)) and config.model.unit == 16
    (tmp_path / name).write_text(text.replace("[64, 128]", "64"))
    assert read_config(tmp_path / name).data.image_size == (64, 64)
    (tmp_path / name).write_text(text.replace("[64, 128]", "[64]"))
    with pytest.raises(BadInput, match=r"data\.image_size: \[64\] must be a whole number, or two"):
        read_config(tmp_path / name)


@pytest.mark.parametrize(("size", "stored"), [(WIDE, [32, 64]), (ImageSize(64, 64), 64)])
def test_artifacts_and_runs_hold_one_number_for_squares(tmp_path, size, stored):
    save_artifact(tmp_path / "a", tensors=pretrained(), config=description(image_size=size))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["image_size"] == stored
    assert load_artifact(tmp_path / "a").config.image_size == size
    run = PretrainConfig(data=DataConfig(image_size=size))
    plain = to_plain(run)
    assert plain["data"]["image_size"] == stored
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert read_config(tmp_path) == run


@pytest.mark.parametrize(
    ("size", "message"), [([32, 3], "32 x 3 px is smaller"), ([32], "or two"), (0, "0 must")]
)
def test_sizes_of_artifacts_are_checked(tmp_path, size, message):
    save_artifact(tmp_path / "a", tensors=pretrained(), config=description())
    rewrite(tmp_path / "a", image_size=size)
    with pytest.raises(BadArtifact, match=message):
        load_artifact(tmp_path / "a")


# what follows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "patch"), [((224, 448), 4), ((448, 112), 4), ((64, 512), 2), ((32, 64), 1)])
def test_the_shorter_side_decides_about_the_patch_of_a_preset(size, patch):
    assert encoder_preset("tiny", size) == encoder_preset("tiny", size[::-1])
    assert encoder_preset("tiny", size).strides[0] == patch
    assert encoder_preset("vit-tiny", size).strides[0] == 4 * patch
    assert encoder_preset("tiny", (64, 64)) == encoder_preset("tiny", 64)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((60, 128), "--image-size 60 128: both must be multiples of the 16 px mask unit; 48 128 or 64 128"),
        ((8, 100), "--image-size 8 100: .* of the 16 px mask unit; 16 96 or 16 112 would do"),
        ((64, 7), "; 64 16 would do"),
    ],
)
def test_sides_that_are_no_whole_units_are_refused_with_the_nearest_sizes(size, message):
    config = PretrainConfig(data=DataConfig(image_size=ImageSize(*size)), model=encoder_preset("tiny", 64))
    with pytest.raises(BadInput, match=message):
        check_shapes(config)


def test_views_that_are_zoomed_into_have_a_border_on_every_side():
    run = PretrainConfig(DataConfig(image_size=ImageSize(224, 448)), objective=BeyondConfig("zoom-in"))
    assert run.view_size == (288, 576)
    assert replace(run, objective=BeyondConfig("blur")).view_size == (224, 448)


METHODS: dict[str, ObjectiveConfig] = {
    "coma": CoMAConfig(decoder=DECODER),
    "mae": MAEConfig(decoder=DECODER),
    "zoom-in+coma": BeyondConfig("zoom-in+coma", decoder=DECODER),
    **{kind: BeyondConfig(kind, decoder=DECODER) for kind in ("zoom-in+mask", "zoom-out", "distort", "blur")},
    **TAUGHT,
}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_wide_images_and_rebuilds_them(encoder, method):
    torch.manual_seed(0)
    settings, model = METHODS[method], ENCODERS[encoder]
    run = PretrainConfig(DataConfig(image_size=WIDE), model, settings)
    check_shapes(run)
    check_objective(run)
    assert views_per_image(run) == (2 if "coma" in method else 1)
    objective: Any = build_objective(settings, build_encoder(model), teacher() if settings.teacher else None)
    images = torch.randn(2, 3, *run.view_size)
    out = objective(images, torch.arange(2))
    rows, cols = (side // 8 for side in run.view_size)
    assert out.visible.shape[1:] == (2, rows, cols) and cols > rows
    out.loss.backward()
    with torch.no_grad():
        before = objective.encoder.forward_features(images)
        turned = objective.encoder.forward_features(images.transpose(2, 3)).transpose(1, 2)
    assert not torch.allclose(before, turned)  # rows and columns are told apart
    assert objective.eval().reconstruct(images, out.visible[0]).shape == images.shape


def test_flops_grow_with_both_sides():
    model = ENCODERS["vit"]
    assert encoder_flops(model, (32, 64)) == encoder_flops(model, (64, 32)) != encoder_flops(model, 64)
    assert encoder_flops(model, 64) == encoder_flops(model, (64, 64))
