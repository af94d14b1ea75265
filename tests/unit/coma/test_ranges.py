"""Ranges of settings: in code, in JSON files of runs and artifacts, and in the words of their messages."""

import json
import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from coma.artifact import ArtifactConfig, library_versions
from coma.config import DataConfig, DyViTConfig, FinetuneRecipe, OptimizerConfig, PretrainConfig
from coma.config.objectives import method_preset
from coma.config.serialization import from_plain, read_config, to_plain
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.ranges import SEED, Range, Ranged, ranges_of


@dataclass(frozen=True)
class Settings(Ranged):
    flags = "--of."

    count: Annotated[int | None, Range(1, 16)] = None
    share: Annotated[tuple[float, ...], Range(0, 1, above=True)] = (0.5,)
    pair: Annotated[tuple[str, float], Range(0, 1e6)] = ("images", 1.0)
    nested: Annotated[tuple[tuple[int, ...], ...], Range(0, 9)] = ((1,), (2, 3))
    flag: bool = True


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "--of.count 0 must be 1 to 16"),
        ({"count": 2**70}, "--of.count 118059... (22 digits) must be 1 to 16"),
        ({"count": 10**400}, "--of.count 100000... (401 digits) must be 1 to 16"),
        ({"share": (0.5, 0)}, "--of.share: 0 must be more than 0 and at most 1"),
        ({"share": (math.nan,)}, "--of.share: nan must be more than 0 and at most 1"),
        ({"pair": ("images", -1)}, "--of.pair: -1 must be at least 0"),
        ({"pair": ("images", math.inf)}, "--of.pair: inf must be at most 1e+06"),
        ({"nested": ((1,), (2, -3))}, "--of.nested: -3 must be 0 to 9"),
    ],
)
def test_values_outside_are_named_with_their_flag(wrong, message):
    with pytest.raises(BadInput) as raised:
        Settings(**wrong)
    assert str(raised.value) == message


def test_what_is_no_number_and_what_lies_inside_passes():
    assert Settings(count=None, share=(1, 1e-9), flag=False).count is None
    assert set(ranges_of(Settings)) == {"count", "share", "pair", "nested"}
    with pytest.raises(BadInput, match="nan must be a number"):
        SEED.check("--seed", math.nan)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_lr": math.nan},
        {"base_lr": -1.0},
        {"betas": (1.5, 0.9)},
        {"epochs": math.nan},
        {"warmup": math.nan},
        {"weight_decay": -1.0},
        {"clip_grad": -1.0},
        {"ema_decay": 1.0},
        {"batch_size": 0},
        {"micro_batch": 0},
        {"steps": 2**70},
    ],
)
@pytest.mark.parametrize("kind", [OptimizerConfig, FinetuneRecipe])
def test_recipes_of_both_kinds_are_checked(kind, wrong):
    (name,) = wrong
    with pytest.raises(BadInput, match=f"^--{name.replace('_', '-')}:? .* must be"):
        kind(**wrong)


@pytest.mark.parametrize("method", ["coma", "mae", "beyond", "cmt", "coma-balanced"])
def test_files_of_runs_are_checked_like_command_lines(tmp_path, method):
    good = to_plain(PretrainConfig(objective=method_preset(method)))
    assert from_plain(good, PretrainConfig, source="x").objective == method_preset(method)
    for part, name, value in [
        ("optimizer", "base_lr", math.nan),
        ("optimizer", "weight_decay", -1),
        ("optimizer", "betas", [0.9, 1]),
        ("run", "seed", 2**64),
        ("data", "image_size", 10**9),
        ("model", "dim", 0),
    ]:
        plain = json.loads(json.dumps(good))
        plain[part][name] = value
        (tmp_path / "config.json").write_text(json.dumps(plain))
        with pytest.raises(BadInput, match=name.replace("_", "-")) as raised:
            read_config(tmp_path)
        assert "must be" in str(raised.value) and "--" not in str(raised.value)
    plain = json.loads(json.dumps(good))
    plain["objective"]["decoder"]["depth"] = 10**6
    with pytest.raises(BadInput, match=r"objective\.decoder\.depth 1000000 must be 1 to 256"):
        from_plain(plain, PretrainConfig, source="x")


def test_descriptions_of_artifacts_are_checked():
    model = DyViTConfig()
    good = ArtifactConfig(
        "backbone", model, None, ImageSize.of(224), (0.5,) * 3, (0.2,) * 3, None, {}, library_versions()
    )
    for change, message in [
        ({"model": {**to_plain(good)["model"], "mlp_ratio": math.inf}}, "model.mlp-ratio inf must be"),
        ({"image_size": 2**70}, "image-size 118059"),
        ({"std": [0.2, 0.0, 0.2]}, "std: 0 must be at least 1e-09"),
        ({"mean": [0.2, math.nan, 0.2]}, "mean: nan must be a number"),
    ]:
        with pytest.raises(BadInput, match=message):
            from_plain({**to_plain(good), **change}, ArtifactConfig, source="config.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "\x00", "{'a': 1}", ""])
def test_files_that_are_no_json_are_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json: "):
        read_config(tmp_path)


def test_values_that_do_not_fit_together_are_one_line_without_pythons_words():
    for wrong in (
        lambda: DataConfig(mean=(0.5, 0.5), std=(0.2,)),
        lambda: DataConfig(mean=(), std=()),
        lambda: DataConfig(std=(0.2,)),
        lambda: DataConfig(crop_scale=(0.5, 0.2)),
    ):
        with pytest.raises(BadInput) as raised:
            wrong()
        assert not any(stray in str(raised.value) for stray in ("None", "(0", ",)"))
