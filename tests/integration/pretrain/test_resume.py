"""A run that was stopped, killed, or ran out of disk goes on to the very same numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import assert_same, at, everything_in, interrupted, learned, stop_during

from coma import cli
from coma.artifact import load_artifact
from coma.config import (
    DecoderConfig,
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneRunConfig,
    MAEConfig,
)
from coma.config.serialization import read_config, to_plain
from coma.data.batches import TrainingFetcher
from coma.data.listing import FILE
from coma.errors import BadInput, Interrupted
from pretrain.training import pretrain
from pretrain.training.optimizer import learning_rate
from pretrain.training.run_settings import write_config
from pretrain.training.train_step import TrainStep

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("no_pictures")


# the same numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_and_resumed_is_uninterrupted(resumable, whole, tmp_path, workers):
    config = at(resumable, tmp_path / "run")
    config = replace(config, data=replace(config.data, workers=workers))
    for step, number in ((1, signal.SIGINT), (4, signal.SIGTERM)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="--resume"):
            stop_during(patch, step, number)
            pretrain(config, resume=step > 1)
        torch.rand(3)  # numbers drawn by anybody else change nothing
    pretrain(config, resume=True)
    assert_same(config.run.out, whole)


def test_the_comparison_notices_another_seed(resumable, whole, tmp_path):
    pretrain(at(resumable, tmp_path / "run", seed=1))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "run", whole)


def test_lines_of_steps_that_are_done_again_are_dropped(resumable, whole, tmp_path):
    run = tmp_path / "run"
    interrupted(at(resumable, run), 3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 9.9}\n{"step": 7, "lo')  # of a run that went further, then died
    pretrain(at(resumable, run), resume=True)
    assert_same(run, whole)


KILLER = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from coma.config.serialization import read_config
from pretrain.training import pretrain
from pretrain.training import run_directory

torch.set_num_threads(1)
run_directory.reconstruction_sheet = run_directory.loss_curve = lambda *_, **__: None
config, rng, kills = read_config(Path(sys.argv[1])), random.Random(0), 0

def start(out, resume):
    child = os.fork()
    if child == 0:
        pretrain(replace(config, run=replace(config.run, out=out)), resume=resume)
        os._exit(0)
    return child

def newest():
    return max((int(path.stem[5:]) for path in out.glob("state/step-*.pt")), default=0)

os.waitpid(start(Path(sys.argv[2]), False), 0)
out, ended = Path(sys.argv[3]), 0
for _ in range(6):
    child, done = start(out, (out / "config.json").exists()), newest()
    while newest() < done + 2 and not ended:
        ended, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)
    time.sleep(rng.random() * 0.03)
    if ended:
        break
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
assert os.waitpid(start(out, True), 0)[1] == 0
print("killed", kills)
"""


@pytest.mark.slow
def test_kill_at_random_moments(resumable, tmp_path):
    """Real processes, saving after every step, killed by SIGKILL wherever they happen to be."""
    config = at(resumable, tmp_path / "run", save_steps=1)
    config = replace(config, optimizer=replace(config.optimizer, steps=20))
    (tmp_path / "config.json").write_text(json.dumps(to_plain(config)))
    command = [sys.executable, "-c", KILLER, *(tmp_path / name for name in ("config.json", "whole", "run"))]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) >= 3
    assert_same(tmp_path / "run", tmp_path / "whole")


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused(resumable, whole, photos, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    interrupted(at(resumable, run), 4)
    assert not (run / ".lock").exists()
    message = f"another process is training in {run}; end it or choose another --out"
    command = [sys.executable, "-c", HOLD, str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"locked\n"
        before = everything_in(run)
        for arguments in (["--resume", run], [photos, "--out", run]):
            capsys.readouterr()
            assert cli.main(["pretrain", *map(str, arguments)]) == 2
            assert message in capsys.readouterr().err
        monkeypatch.setattr("pretrain.training.run_settings._check_lock", lambda _: None)
        with pytest.raises(BadInput, match="another process is training in"):  # one that came in between
            pretrain(at(resumable, run), resume=True)
        assert everything_in(run) == before
        other.kill()
    pretrain(at(resumable, run), resume=True)
    assert_same(run, whole)
    assert not (run / ".lock").exists()


def test_longer_runs_and_another_share_out_may_be_resumed(resumable, whole, tmp_path):
    run = tmp_path / "run"
    pretrain(at(resumable, run))
    longer = replace(
        resumable, optimizer=replace(resumable.optimizer, steps=resumable.optimizer.steps + 2, micro_batch=4)
    )
    pretrain(at(longer, run, save_minutes=1.0, log_steps=1), resume=True)
    rows, _ = learned(run)
    assert [row["step"] for row in rows] == [3, 6, 7, 8, 9]
    assert rows[:3] == learned(whole)[0]
    assert load_artifact(run / "artifact").config.trained["steps"] == resumable.optimizer.steps + 2


def test_resuming_what_was_never_saved_starts_again(resumable, whole, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(TrainStep, "__call__", lambda *_: 1 / 0)
        pretrain(at(resumable, run))
    pretrain(at(resumable, run), resume=True)
    assert "starting again from step 0" in capsys.readouterr().err
    assert_same(run, whole)


# what may not change ----------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(resumable, tmp_path):
    run = tmp_path / "run"
    interrupted(at(resumable, run), 2)
    other = replace(
        resumable,
        model=replace(resumable.model, dim=16),
        objective=MAEConfig(decoder=DecoderConfig(8, 1, 2)),
        optimizer=replace(resumable.optimizer, batch_size=8),
    )
    with pytest.raises(BadInput) as raised:
        pretrain(at(other, run, seed=3), resume=True)
    for change in (
        "model.dim 8 -> 16",
        "objective.method coma -> mae",
        "optimizer.batch_size 4 -> 8",
        "run.seed 0 -> 3",
    ):
        assert change in str(raised.value)
    shorter = replace(resumable, optimizer=replace(resumable.optimizer, steps=2))
    with pytest.raises(BadInput, match="has done 3 steps, more than the 2"):
        pretrain(at(shorter, run), resume=True)


def test_other_data_are_refused(resumable, photos, tmp_path):
    run = tmp_path / "run"
    interrupted(at(resumable, run), 2)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(photos.iterdir())[:9]:
        (fewer / path.name).write_bytes(path.read_bytes())
    config = replace(resumable, data=replace(resumable.data, images=fewer))
    with pytest.raises(
        BadInput, match=r"the images have changed: 1 removed \(9\.png\); .*--allow-changed-data"
    ):
        pretrain(at(config, run), resume=True)
    (run / FILE).unlink()  # as an older version left it: their number is known
    with pytest.raises(BadInput, match="has 9 images, but the run was started with 10"):
        pretrain(at(config, run), resume=True)


def test_changed_data_are_gone_on_with_when_asked_and_said(resumable, photos, tmp_path, capsys):
    """Six of ten files are others, as many as before; the list is then that of the new ones."""
    run, own = tmp_path / "run", tmp_path / "photos"
    shutil.copytree(photos, own)
    config = replace(resumable, data=replace(resumable.data, images=own))
    interrupted(at(config, run), 2)
    for number in range(6):
        (own / f"{number}.png").rename(own / f"other {number}.png")
    (own / "9.png").write_bytes((own / "9.png").read_bytes() + b"0")
    with pytest.raises(BadInput) as refused:
        pretrain(at(config, run), resume=True)
    changed = (
        "the images have changed: 6 removed (0.png, 1.png, 2.png and 3 more), 6 added (other 0.png, other "
        "1.png, other 2.png and 3 more), 1 of another size (9.png "
    )
    assert changed in str(refused.value)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_during(patch, 4)
        pretrain(at(config, run), resume=True, allow_changed_data=True)
    assert f"warning: {changed}" in capsys.readouterr().err
    pretrain(at(config, run), resume=True)
    assert "warning" not in capsys.readouterr().err


def test_dates_and_places_of_images_are_free(resumable, whole, photos, tmp_path, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    interrupted(at(resumable, run), 2)
    shutil.copytree(photos, elsewhere)
    for path in elsewhere.iterdir():
        os.utime(path, (0, 0))
    pretrain(at(replace(resumable, data=replace(resumable.data, images=elsewhere)), run), resume=True)
    assert "changed" not in capsys.readouterr().err
    assert_same(run, whole)


def test_a_run_without_a_list_of_its_images_resumes_with_a_note(resumable, whole, tmp_path, capsys):
    run = tmp_path / "run"
    interrupted(at(resumable, run), 2)
    (run / FILE).unlink()
    pretrain(at(resumable, run), resume=True)
    assert "has no list of its images, as an older version started it" in capsys.readouterr().err
    assert_same(run, whole)
    assert (run / FILE).exists()


def test_settings_of_fine_tuning_note_every_path_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, run = FinetuneDataConfig(Path("train")), FinetuneRunConfig(Path("run"))
    config = FinetuneConfig(Path("artifact"), data, run, test=Path("test"), val=Path("val"))
    write_config(config)
    saved = read_config(Path("run"), FinetuneConfig)
    paths = saved.artifact, saved.data.images, saved.test, saved.val
    assert paths == tuple(tmp_path / name for name in ("artifact", "train", "test", "val"))


def test_a_run_resumes_from_any_directory(resumable, whole, photos, tmp_path, monkeypatch):
    """What it reads is noted by absolute paths."""
    monkeypatch.chdir(photos)
    here = replace(resumable, data=replace(resumable.data, images=Path(".")))
    interrupted(at(here, tmp_path / "run"), 2)
    monkeypatch.chdir(tmp_path)
    pretrain(read_config(Path("run")), resume=True)
    assert_same(tmp_path / "run", whole)


# another schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"steps": 14}, {"steps": None, "epochs": 5.5}])
def test_a_longer_schedule_says_what_becomes_of_the_learning_rate(resumable, tmp_path, capsys, change):
    run = tmp_path / "run"
    interrupted(at(resumable, run), 5)
    longer = replace(resumable, optimizer=replace(resumable.optimizer, **change))
    capsys.readouterr()
    pretrain(at(longer, run, log_steps=1), resume=True)
    rates = [learning_rate(*at_step, resumable.optimizer) for at_step in ((5, 7), (6, 14))]
    assert (
        "the schedule now ends at step 14 instead of 7: the learning rate goes from "
        f"{rates[0]:.3g} at step 6 to {rates[1]:.3g} at step 7"
    ) in capsys.readouterr().err
    rows, _ = learned(run)
    assert next(row["lr"] for row in rows if row["step"] == 7) == rates[1] > rates[0]


# waiting for images -----------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 12, 14])  # of a first step, of another, of its second pass
def test_waiting_for_images_ends_when_someone_asks(resumable, whole, tmp_path, capfd, position):
    run = tmp_path / "run"
    read = TrainingFetcher.__call__

    def hangs(self: TrainingFetcher, first: int) -> Any:
        if first == position:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(300)
        return read(self, first)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as told:
        patch.setattr(TrainingFetcher, "__call__", hangs)
        pretrain(at(resumable, run))
    said = "everything is saved" if position else "nothing was learned yet"
    assert f"stopped at step {position // 4} of 7; {said}" in str(told.value)
    assert "stopping now" in capfd.readouterr().err
    pretrain(at(resumable, run), resume=True)
    assert_same(run, whole)
