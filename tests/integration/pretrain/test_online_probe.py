"""Labelled images looked at during training: the same numbers as afterwards, and nothing else changes."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from class_folders import class_folders
from PIL import Image
from short_runs import MODEL, Killed, assert_same, at, killed_in, learned, rows, stop_during

from coma import cli
from coma.artifact import load_encoder
from coma.config import ProbeConfig
from coma.data import ArraySource, balanced_subset, normalize, open_source
from coma.errors import BadInput, CheckFailed, Interrupted
from coma.models import build_encoder
from coma.models.attention import WindowGate
from pretrain.evaluate import effective_rank, evaluate, feature_spread, open_probe, watched_gates
from pretrain.evaluate.online_probe import Probe
from pretrain.training import pretrain
from pretrain.visualize.curves import loss_curve


@pytest.fixture
def probed(resumable, labelled, no_pictures):
    """The run of seven steps, probed before it, at steps 2, 4, 6 and at the end."""
    return replace(resumable, probe=ProbeConfig(probe=labelled, probe_steps=2))


def probe_rows(run: Path) -> list[dict]:
    return [row for row in rows(run) if "probe_knn" in row]


# the run -----------------------------------------------------------------------------------------


def test_a_probe_changes_nothing_else_and_finds_what_evaluate_finds(
    probed, whole, labelled, tmp_path, capsys
):
    run = pretrain(at(probed, tmp_path / "run"))
    measured = (
        f"probe: accuracy on 12 images of {labelled}/test, by neighbours among 24 images of {labelled}/train"
    )
    told = capsys.readouterr().err
    assert f"{measured} or a classifier trained on them; it has no influence on training" in told
    rows, weights = learned(run)
    plain_rows, plain_weights = learned(whole)
    assert [row for row in rows if "loss" in row] == plain_rows
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)
    found = probe_rows(run)
    assert [row["step"] for row in found] == [0, 2, 4, 6, 7]
    assert [row["images_seen"] for row in found] == [0, 8, 16, 24, 28]
    encoder = load_encoder(run / "artifact")
    about = encoder.artifact
    scores = evaluate(encoder, about, open_source(labelled, "train"), open_source(labelled, "test"))
    assert {f"probe_{score.protocol}": score.top1 for score in scores}.items() <= found[-1].items()
    assert found[0]["probe_stage1_window1"] == pytest.approx(0.5)
    assert found[0]["probe_stage1_entropy"] == pytest.approx(1)
    assert found[-1]["probe_stage1_entropy"] < 1 - 1e-9


def test_published_weights_are_probed(probed, whole, tmp_path):
    """Those at hand give other features than their moving average."""
    run = pretrain(at(probed, tmp_path / "average"))
    plain = replace(probed, optimizer=replace(probed.optimizer, ema_decay=0.0))
    other = pretrain(at(plain, tmp_path / "plain"))
    ranks = [probe_rows(folder)[-1]["probe_effective_rank"] for folder in (run, other)]
    assert ranks[0] != ranks[1]


def test_interrupted_and_resumed_with_probes_is_uninterrupted(probed, tmp_path):
    uninterrupted = pretrain(at(probed, tmp_path / "whole"))
    config = at(probed, tmp_path / "run", save_steps=1)
    for step in (1, 4):  # the first stop comes at a step that a probe is due at
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            stop_during(patch, step)
            pretrain(config, resume=step > 1)
    pretrain(at(probed, tmp_path / "run"), resume=True)
    assert_same(config.run.out, uninterrupted)


def test_a_run_that_is_killed_after_a_probe_repeats_no_row(probed, tmp_path):
    """Before the first save, after a probe that was made up for, and after one that is in the state."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    uninterrupted = pretrain(at(probed, tmp_path / "whole"))
    config = at(probed, tmp_path / "run", save_steps=4)
    for resume, end, step in (
        (False, killed_in, 0),
        (True, killed_in, 1),
        (True, stop_during, 1),
        (True, killed_in, 2),
        (True, killed_in, 5),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises((Killed, Interrupted)):
            end(patch, step)
            pretrain(config, resume=resume)
        steps = [row["step"] for row in probe_rows(config.run.out)]
        assert steps == sorted(set(steps)) and steps[0] == 0
    pretrain(at(probed, config.run.out), resume=True)
    assert_same(config.run.out, uninterrupted)
    events = EventAccumulator(str(config.run.out / "tensorboard"))
    events.Reload()
    rows, _ = learned(config.run.out)
    for name in ("probe_knn", "loss"):
        drawn = [(event.step, event.value) for event in events.Scalars(name)]
        assert drawn == [(row["step"], pytest.approx(row[name])) for row in rows if name in row]


def test_a_probe_may_be_given_to_a_run_that_began_without(resumable, labelled, no_pictures, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_during(patch, 2)
        pretrain(at(resumable, tmp_path / "run"))
    probed = replace(resumable, probe=ProbeConfig(probe=labelled, probe_epochs=0.8))
    pretrain(at(probed, tmp_path / "run"), resume=True)
    assert [row["step"] for row in probe_rows(tmp_path / "run")] == [4, 6, 7]


@pytest.mark.parametrize(
    "error",
    [
        CheckFailed("no features"),
        torch.linalg.LinAlgError("no features"),
        torch.OutOfMemoryError("no features"),
    ],
)
def test_a_probe_that_fails_on_the_way_ends_no_run(probed, tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Probe, "measure", fail)
    run = pretrain(at(probed, tmp_path / "run"))
    assert "step 2: the probe failed (no features); training continues" in capsys.readouterr().err
    assert learned(run)[0][-1]["step"] == 7


def test_the_command_shows_and_draws_what_a_probe_found(photos, labelled, tmp_path, capsys):
    run = tmp_path / "run"
    flags = (
        "--image-size 32 --model.dim 8 --model.depths 1 1 1 1 --model.heads 2 2 2 2 --objective.decoder.dim 8"
    )
    flags += (
        " --objective.decoder.depth 1 --objective.decoder.heads 2 --workers 0 --device cpu --save-minutes 9"
    )
    flags += " --steps 2 --batch-size 2 --reconstruction-every 0 --probe-steps 1 --probe-train 22"
    flags += f" --probe {labelled}"
    assert cli.main(["pretrain", str(photos), "--out", str(run), "--model", "tiny", *flags.split()]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("probe: kNN ") == 3
    assert "kNN" in next(line for line in shown.err.splitlines() if line.startswith("step 2/2  epoch"))
    assert "2 steps, 4 images seen, loss" in shown.out
    loss_curve(run / "metrics.jsonl", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (1080, 120 * 12)  # three panels below those of any run
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    assert events.count(b"probe_linear") == 3


# bad data ----------------------------------------------------------------------------------------


def test_bad_labelled_images_are_refused_before_training(resumable, photos, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.training.train_step.TrainStep.__call__", lambda *_: pytest.fail("trained"))
    few = class_folders(tmp_path / "few", train=6)
    foreign = class_folders(tmp_path / "foreign")
    (foreign / "train" / "class1").rename(foreign / "train" / "class7")
    broken = class_folders(tmp_path / "broken", test=4)
    for path in (broken / "test").rglob("*.png"):
        path.write_bytes(b"no picture")
    cases = [
        (ProbeConfig(tmp_path / "nothing"), "no such file"),
        (ProbeConfig(photos), "no split"),
        (ProbeConfig(few), "k = 20 neighbours must be 1 to 6.* smaller --k"),
        (ProbeConfig(foreign), "class1"),
        (ProbeConfig(broken), "no image could be read"),
        (ProbeConfig(labelled, probe_train=1), "--probe-train 1: too few for the classes"),
        (ProbeConfig(labelled, probe_train=2, probe_protocols=("linear",)), "two training images"),
    ]
    for number, (probe, complaint) in enumerate(cases):
        out = tmp_path / f"run{number}"
        with pytest.raises(BadInput, match=complaint):
            pretrain(at(replace(resumable, probe=probe), out))
        assert not out.exists()
    for wrong in (
        lambda: ProbeConfig(labelled, probe_epochs=0.0),
        lambda: ProbeConfig(labelled, probe_steps=0),
        lambda: ProbeConfig(labelled, probe_test=-1),
    ):
        with pytest.raises(BadInput, match="must be"):
            wrong()


def test_limits_draw_alike_from_every_class():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 3)
    source = ArraySource([np.full((20, 20, 3), i, np.uint8) for i in range(83)], labels)
    part = balanced_subset(source, 23)
    assert part.labels is not None
    assert np.bincount(part.labels).tolist() == [10, 10, 3]
    assert np.array_equal(part.labels, labels[[int(part.read(i)[0, 0, 0]) for i in range(23)]])
    assert balanced_subset(source, 0) is balanced_subset(source, 83) is source


# statistics --------------------------------------------------------------------------------------


def test_spread_and_rank_of_known_features():
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(4000, 16, generator=generator)
    assert feature_spread(even) == pytest.approx(1, abs=0.01)
    assert feature_spread(torch.ones(10, 16)) == pytest.approx(0, abs=1e-9)
    assert effective_rank(even) == pytest.approx(16, abs=0.1)
    assert effective_rank(torch.ones(10, 16)) == 1
    directions = torch.zeros(30, 8)
    directions[torch.arange(30), torch.arange(30) % 3] = 1.0  # three corners: a plane once the mean is away
    assert effective_rank(5 + directions) == pytest.approx(2, abs=1e-6)


def test_gates_are_those_of_a_slow_loop():
    torch.manual_seed(0)
    encoder = build_encoder(MODEL).eval()
    gate = next(module for module in encoder.modules() if isinstance(module, WindowGate))
    torch.nn.init.normal_(gate.out.weight, std=3.0)
    seen = []
    gate.register_forward_hook(lambda _, __, out: seen.append(out))
    images = normalize(torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8), (0.5,) * 3, (0.25,) * 3)
    with torch.inference_mode(), watched_gates(encoder) as watch:
        encoder.pool(images[:3])
        encoder.pool(images[3:])
    found = watch.summary()
    weights = torch.cat([out.reshape(len(out), 2, 4) for out in seen]) / 2  # n g c
    assert found["stage1_window2"] == pytest.approx(weights[:, 1].mean().item())
    entropies = [
        -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2) for p in weights[:, 0].flatten().tolist()
    ]
    assert found["stage1_entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    assert set(found) == {"stage1_window1", "stage1_window2", "stage1_entropy"}  # the others have one window
    count = len(seen)
    encoder.pool(images)
    assert len(seen) == count + 1 and watch.summary() == found


def test_no_probe_without_a_path():
    assert open_probe(ProbeConfig()) is None
