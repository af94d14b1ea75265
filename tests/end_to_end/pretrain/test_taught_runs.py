"""Runs with a teacher: where they begin, what is refused beforehand, what they cost, which teacher it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from short_runs import MODEL, OBJECTIVE, at, interrupted
from small_models import DECODER, ENCODERS
from taught_models import METHODS, STATISTICS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coma.atomic_io import sha256_of
from coma.config import (
    BalancedCoMAConfig,
    BeyondConfig,
    CMTConfig,
    CoMAConfig,
    DataConfig,
    DecoderConfig,
    MAEConfig,
    OptimizerConfig,
    PretrainConfig,
    TeacherConfig,
    ViTConfig,
)
from coma.config.serialization import read_config, to_plain
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.models.attention_maps import attend
from coma.objectives.teachers import load_teacher, training_objective, with_weights_hash
from pretrain.commands.pretrain import parse
from pretrain.training import pretrain
from pretrain.training.distributed import Processes
from pretrain.training.throughput import Meter, training_flops

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def artifact(resumable, no_pictures, tmp_path_factory) -> Path:
    """The artifact of a DyViT that looks at the whole map."""
    short = replace(resumable, optimizer=replace(resumable.optimizer, steps=1))
    return pretrain(at(short, tmp_path_factory.mktemp("first") / "run")) / "artifact"


def taught_by(config: PretrainConfig, name: str, weights: Path | None = None) -> PretrainConfig:
    method = CMTConfig(teacher=TeacherConfig(name, weights), decoder=DecoderConfig(8, 1, 2))
    return replace(config, objective=method)


# where they begin ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
def test_balanced_coma_begins_with_the_weights_of_coma(encoder, weights):
    data = DataConfig(mean=STATISTICS[0], std=STATISTICS[1])
    teacher = TeacherConfig("test_vit", weights)
    begun = []
    for objective in (CoMAConfig(decoder=DECODER), BalancedCoMAConfig(decoder=DECODER, teacher=teacher)):
        torch.manual_seed(3)
        model = training_objective(PretrainConfig(data=data, model=ENCODERS[encoder], objective=objective))
        begun.append(model.state_dict() | {"next random number": torch.rand(1)})
    assert begun[0].keys() == begun[1].keys()
    assert all(torch.equal(begun[0][name], begun[1][name]) for name in begun[0])


# what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"objective": CMTConfig(mask_ratio=0.99, decoder=DECODER)}, "hiding 99% of 4 mask units"),
        ({"objective": MAEConfig(mask_ratio=0.9, decoder=DECODER)}, "hiding 90% of 4 mask units"),
        ({"objective": CoMAConfig(views=5, decoder=DECODER)}, "5 views are too many for 4 mask units"),
        (
            {"objective": BeyondConfig("zoom-in+coma", views=5, decoder=DECODER)},
            "5 views are too many for 16 mask units",
        ),
        (
            {
                "objective": CMTConfig(decoder=DECODER),
                "model": replace(MODEL, windows=((4, 8), (4,), (4,), (1,))),
            },
            "the last stage of this DyViT does not see the whole map",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_written(resumable, parts, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        pretrain(at(replace(resumable, **parts), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_artifact_that_sees_no_whole_map_is_no_teacher(resumable, tmp_path):
    short = replace(resumable.optimizer, steps=1)
    narrow = replace(resumable, model=replace(MODEL, windows=((4, 8), (4,), (4,), (1,))), optimizer=short)
    folder = pretrain(at(narrow, tmp_path / "run")) / "artifact"
    with pytest.raises(BadInput, match=f"--teacher {folder}: the last stage of this DyViT does not see"):
        load_teacher(TeacherConfig(str(folder)), STATISTICS)


# which teacher it was --------------------------------------------------------------------------


def test_a_run_goes_on_from_another_directory(resumable, artifact, tmp_path, monkeypatch):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(artifact, tmp_path / "teacher")
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    interrupted(at(taught_by(resumable, "teacher"), run), 2)
    monkeypatch.chdir(elsewhere)
    assert read_config(run).objective.teacher.name == str(tmp_path / "teacher")  # type: ignore[union-attr]
    pretrain(read_config(run), resume=True)


def test_another_teacher_is_read_like_the_one_of_the_settings(resumable, tmp_path):
    teacher = TeacherConfig("old", sha256="0" * 64, block=3, query="mean")
    config = replace(resumable, objective=CMTConfig(teacher=teacher, decoder=DecoderConfig(8, 1, 2)))
    (tmp_path / "config.json").write_text(json.dumps(to_plain(config, PretrainConfig)))
    for flags in (["--resume", str(tmp_path)], ["--from", str(tmp_path / "config.json")]):
        given, *_ = parse([*flags, "--teacher", "new"])
        assert given.objective.teacher == replace(teacher, name="new", sha256=None)


@pytest.mark.slow
def test_a_teacher_that_moved_is_given_again(resumable, artifact, tmp_path, monkeypatch):
    run, old, new = tmp_path / "run", tmp_path / "old", tmp_path / "new"
    shutil.copytree(artifact, old)
    interrupted(at(taught_by(resumable, str(old)), run), 2)
    old.rename(new)
    with pytest.raises(
        BadInput, match=f"{old}: no model of timm's, and no artifact; if the artifact was mov"
    ):
        pretrain(read_config(run), resume=True)
    with pytest.raises(BadInput, match=rf"objective\.teacher\.name {old} -> test_vit"):
        pretrain(parse(["--resume", str(run), "--teacher", "test_vit"])[0], resume=True)
    moved, *_ = parse(["--resume", str(run), "--objective.teacher.name", str(new)])
    told = new / "config.json"
    plain = json.loads(told.read_text())
    del plain["checksums"]  # which would notice the changes first
    for name, value in (("mean", [0.1, 0.2, 0.3]), ("image_size", 24)):
        told.write_text(json.dumps(plain | {name: value}))
        with pytest.raises(BadInput, match="these are not the weights of teacher"):
            pretrain(moved, resume=True)
    told.write_text(json.dumps(plain | {"trained": {"note": "does not count"}}))
    monkeypatch.chdir(tmp_path)
    pretrain(parse(["--resume", str(run), "--teacher", "new"])[0], resume=True)
    assert read_config(run).objective.teacher.name == str(new)  # type: ignore[union-attr]


def test_a_new_run_with_old_settings_takes_other_weights(resumable, weights, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other.safetensors"
    torch.manual_seed(6)
    save_file(timm.create_model("test_vit").state_dict(), other)
    interrupted(at(taught_by(resumable, "test_vit", weights), run), 1)
    again = ["--out", str(tmp_path / "second"), "--teacher-weights", str(other)]
    fresh, *_ = parse(["--from", str(run), *again])
    assert with_weights_hash(fresh).objective.teacher == TeacherConfig("test_vit", other, sha256_of(other))  # type: ignore[union-attr]
    same, *_ = parse(["--resume", str(run), "--teacher-weights", str(other)])
    with pytest.raises(BadInput, match="these are not the weights of teacher test_vit"):
        pretrain(same, resume=True)


# what they cost --------------------------------------------------------------------------------


def block(dim: int, ratio: float, tokens: int) -> float:
    """FLOPs of a transformer block, 2 per multiplication and addition."""
    return tokens * 2 * dim * dim * (4 + 2 * ratio) + 2 * 2 * tokens * tokens * dim


TEST_VIT = 100 * 2 * 768 * 64 + 6 * block(64, 3.0, 101)
"""FLOPs of timm's smallest ViT: 160 px, patches of 16, six blocks of 64, a class token."""


def test_all_that_a_step_of_cmt_computes_is_counted():
    """By hand: encoder, decoder and heads as in any method; teacher and average once, without gradients."""
    model = ViTConfig(patch=4, dim=16, depth=2, heads=2, mlp_ratio=2.0)
    method = CMTConfig(TeacherConfig("test_vit"), mask_ratio=0.5, decoder=DecoderConfig(8, 1, 2))
    state = torch.get_rng_state()
    flops = training_flops(model, method, 16)
    assert torch.equal(torch.get_rng_state(), state)
    pixels, units, seen = 48, 16, 8
    stem = units * 2 * pixels * 16
    encoder = stem + 2 * block(16, 2.0, seen + 1)
    decoder = units * 2 * 16 * 8 + block(8, 4.0, units)
    heads = units * 2 * 8 * (64 + 16)
    pixel_head = units * 2 * 8 * pixels  # tells the rest nothing: forward, and the gradient of its weights
    asked = TEST_VIT + stem + 2 * block(16, 2.0, units + 1)
    expected = 3 * (encoder + decoder + heads) - stem + 2 * pixel_head + asked
    assert flops == pytest.approx(expected, rel=1e-6)


def test_balanced_views_cost_what_coma_and_the_teacher_do(artifact):
    """The teacher's part of it on numbers, here on shapes."""
    sizes: list[float] = []
    for name in ("test_vit", str(artifact)):
        balanced = BalancedCoMAConfig(decoder=DECODER, teacher=TeacherConfig(name))
        plain = training_flops(MODEL, CoMAConfig(decoder=DECODER), 16)
        sizes.append(training_flops(MODEL, balanced, 16) - plain)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        attend(build_encoder(MODEL), torch.zeros(1, 3, 16, 16))
    assert sizes == pytest.approx([TEST_VIT, counter.get_total_flops()], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_mfu_of_runs_with_a_teacher_is_shown(method, monkeypatch):
    objective: Any = replace(METHODS[method], teacher=TeacherConfig("test_vit"))
    settings = PretrainConfig(
        data=DataConfig(image_size=ImageSize.of(32)),
        model=ENCODERS["vit"],
        objective=objective,
        optimizer=OptimizerConfig(batch_size=4),
    )
    monkeypatch.setattr("pretrain.training.throughput.device_peak", lambda *_: 1e9)
    meter = Meter(settings, Processes(torch.device("cpu")), "bf16", pytest.fail)
    meter.add(seconds=0.5, waited=0.1, computed=0.4)
    expected = 4 / 0.5 * training_flops(settings.model, objective, 32) / 1e9
    assert meter.take()["mfu"] == pytest.approx(expected, abs=1e-4)
    assert training_flops(settings.model, OBJECTIVE, 32) < training_flops(settings.model, objective, 32)
