"""A run that was stopped, killed, or ran out of disk goes on to the very same numbers."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.artifact import load_artifact
from pretrain.config import (
    CoMAConfig,
    DataConfig,
    DecoderConfig,
    DyViTConfig,
    MAEConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    to_plain,
)
from pretrain.errors import BadInput, CheckFailed, Interrupted
from pretrain.training import pretrain
from pretrain.training.files import write_whole
from pretrain.training.learner import Learner
from pretrain.training.state import read_state, write_state

ROOT = Path(__file__).resolve().parent.parent
STEPS = 7
MODEL = DyViTConfig(
    patch=1, dim=8, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), windows=((4, 8), (4,), (4,), (0,)), drop_path=0.3
)


@pytest.fixture(autouse=True, scope="module")
def no_pictures() -> Iterator[None]:
    """Drawing takes longer than these runs do."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reconstruction_sheet", "loss_curve"):
            patch.setattr(f"pretrain.training.keeping.{name}", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def settings(photos: Path) -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(images=photos, image_size=16, workers=0),
        model=MODEL,
        objective=CoMAConfig(decoder=DecoderConfig(8, 1, 2)),
        optimizer=OptimizerConfig(steps=STEPS, batch_size=4, micro_batch=2, base_lr=0.1, ema=0.9),
        run=RunConfig(log_steps=3, save_steps=2, sheet_steps=0, device="cpu"),
    )


@pytest.fixture(scope="module")
def whole(settings: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(at(settings, tmp_path_factory.mktemp("whole") / "run"))


def at(config: PretrainConfig, out: Path, **changes: Any) -> PretrainConfig:
    return replace(config, run=replace(config.run, out=out, **changes))


def learned(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What must not depend on interruptions: metrics without timings, published weights."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["images_per_s"], row["data_wait"]
    return rows, load_artifact(run / "artifact").tensors


def assert_same(run: Path, other: Path) -> None:
    (rows, weights), (other_rows, other_weights) = learned(run), learned(other)
    assert rows == other_rows
    assert list(weights) == list(other_weights)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    state, other_state = (read_state(folder / "state", warn=pytest.fail) for folder in (run, other))
    assert same(state, other_state)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def stop_during(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of a step."""
    take = Learner.step

    def step_and_signal(self: Learner, n: int, *rest: Any) -> Any:
        if n == step:
            os.kill(os.getpid(), number)
        return take(self, n, *rest)

    patch.setattr(Learner, "step", step_and_signal)


# the same numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_and_resumed_is_uninterrupted(settings, whole, tmp_path, workers):
    config = at(settings, tmp_path / "run")
    config = replace(config, data=replace(config.data, workers=workers))
    for step, number in ((1, signal.SIGINT), (4, signal.SIGTERM)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="--resume"):
            stop_during(patch, step, number)
            pretrain(config, resume=step > 1)
        torch.rand(3)  # numbers drawn by anybody else change nothing
    pretrain(config, resume=True)
    assert_same(config.run.out, whole)


def test_the_comparison_notices_another_seed(settings, whole, tmp_path):
    pretrain(at(settings, tmp_path / "run", seed=1))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "run", whole)


def test_lines_of_steps_that_are_done_again_are_dropped(settings, whole, tmp_path):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_during(patch, 3)
        pretrain(at(settings, run))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 9.9}\n{"step": 7, "lo')  # of a run that went further, then died
    pretrain(at(settings, run), resume=True)
    assert_same(run, whole)


KILLER = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from pretrain.config import read_config
from pretrain.training import keeping, pretrain

torch.set_num_threads(1)
keeping.reconstruction_sheet = keeping.loss_curve = lambda *_, **__: None
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


def test_kill_at_random_moments(settings, tmp_path):
    """Real processes, saving after every step, killed by SIGKILL wherever they happen to be."""
    config = at(settings, tmp_path / "run", save_steps=1)
    config = replace(config, optimizer=replace(config.optimizer, steps=20))
    (tmp_path / "config.json").write_text(json.dumps(to_plain(config)))
    command = [sys.executable, "-c", KILLER, *(tmp_path / name for name in ("config.json", "whole", "run"))]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) >= 3
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_longer_runs_and_another_share_out_may_be_resumed(settings, whole, tmp_path):
    run = tmp_path / "run"
    pretrain(at(settings, run))
    longer = replace(settings, optimizer=replace(settings.optimizer, steps=STEPS + 2, micro_batch=4))
    pretrain(at(longer, run, save_minutes=1.0, log_steps=1), resume=True)
    rows, _ = learned(run)
    assert [row["step"] for row in rows] == [3, 6, 7, 8, 9]
    assert rows[:3] == learned(whole)[0]
    assert load_artifact(run / "artifact").config.trained["steps"] == STEPS + 2


def test_resuming_what_was_never_saved_starts_again(settings, whole, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Learner, "step", lambda *_: 1 / 0)
        pretrain(at(settings, run))
    pretrain(at(settings, run), resume=True)
    assert "starting again from step 0" in capsys.readouterr().err
    assert_same(run, whole)


# the state file ---------------------------------------------------------------------------------


class Dead(BaseException):
    """Stands for kill -9: from here on the process touches nothing."""


def die_at(patch: pytest.MonkeyPatch, call: int) -> None:
    calls = itertools.count()

    def mortal(real: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= call:
                raise Dead
            return real(*args, **kwargs)

        return function

    for name in ("open", "write", "fsync", "replace"):
        patch.setattr(f"pretrain.training.files.os.{name}", mortal(getattr(os, name)))
    patch.setattr(Path, "unlink", mortal(Path.unlink))


def test_whenever_a_save_is_killed_a_state_loads(tmp_path):
    """Killed at each of its calls to the system in turn."""
    weights = torch.arange(1000.0)
    for call in itertools.count():
        folder = tmp_path / str(call)
        for step in (1, 2):
            write_state(folder, {"step": step, "weights": weights + step}, keep=step - 1)
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, call)
            try:
                write_state(folder, {"step": 3, "weights": weights + 3}, keep=2)
                died = False
            except Dead:
                died = True
        state = read_state(folder, warn=pytest.fail)
        assert state is not None
        assert torch.equal(state["weights"], weights + state["step"])
        write_state(folder, {"step": 4, "weights": weights}, keep=state["step"])
        assert len(list(folder.iterdir())) == 2  # nothing is left lying about
        if not died:
            assert call > 6
            assert state["step"] == 3
            return


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"junk" * 99]
)
def test_the_state_before_stands_in_for_a_damaged_one(settings, whole, tmp_path, capsys, damage):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_during(patch, 4)
        pretrain(at(settings, run))
    newest_state = run / "state" / "step-000005.pt"
    newest_state.write_bytes(damage(newest_state.read_bytes()))
    pretrain(at(settings, run), resume=True)
    told = capsys.readouterr().err
    assert "step-000005.pt: this state does not load" in told
    assert "resuming at step 4" in told
    assert_same(run, whole)


def test_no_state_that_loads(settings, tmp_path):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_during(patch, 4)
        pretrain(at(settings, run))
    for path in (run / "state").iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadInput, match="none of the saved states loads"):
        pretrain(at(settings, run), resume=True)


def test_a_state_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "state").mkdir()
    torch.save({"format_version": 1, "step": 1, "model": Trap()}, tmp_path / "state" / "step-000001.pt")
    warnings: list[str] = []
    with pytest.raises(BadInput):
        read_state(tmp_path / "state", warnings.append)
    assert "does not load" in warnings[0]
    assert not (tmp_path / "sprung").exists()


# what may not change ----------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(settings, tmp_path):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_during(patch, 2)
        pretrain(at(settings, run))
    other = replace(
        settings,
        model=replace(MODEL, dim=16),
        objective=MAEConfig(decoder=DecoderConfig(8, 1, 2)),
        optimizer=replace(settings.optimizer, batch_size=8),
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
    shorter = replace(settings, optimizer=replace(settings.optimizer, steps=2))
    with pytest.raises(BadInput, match="has done 3 steps, more than the 2"):
        pretrain(at(shorter, run), resume=True)


def test_other_data_are_refused(settings, photos, tmp_path):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_during(patch, 2)
        pretrain(at(settings, run))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(photos.iterdir())[:9]:
        (fewer / path.name).write_bytes(path.read_bytes())
    config = replace(settings, data=replace(settings.data, images=fewer))
    with pytest.raises(BadInput, match="has 9 images, but the run was started with 10"):
        pretrain(at(config, run), resume=True)


# full disks -------------------------------------------------------------------------------------


def full(patch: pytest.MonkeyPatch, suffixes: tuple[str, ...]) -> None:
    """Files with these endings take half of what is written to them, once, then the disk is full."""
    doomed: dict[int, int] = {}
    real_open, real_write = os.open, os.write

    def opened(path: Any, *rest: Any) -> int:
        number = real_open(path, *rest)
        doomed.pop(number, None)
        if str(path).removesuffix(".part").endswith(suffixes):
            doomed[number] = 0
        return number

    def write(number: int, data: Any) -> int:
        if number not in doomed:
            return real_write(number, data)
        doomed[number] += 1
        if doomed[number] % 2:
            return real_write(number, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr("pretrain.training.files.os.open", opened)
    patch.setattr("pretrain.training.files.os.write", write)


def test_a_full_disk_loses_no_training(settings, whole, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        full(patch, (".pt",))
        with pytest.raises(CheckFailed, match=r"all 7 steps are done, .*: state \(No space left on device\)"):
            pretrain(at(settings, run))
    told = capsys.readouterr().err
    assert "step 2: could not write state (No space left on device); no state was saved yet" in told
    assert list((run / "state").iterdir()) == []
    assert learned(run)[1].keys() == learned(whole)[1].keys()  # the artifact was written
    pretrain(at(settings, run), resume=True)
    assert_same(run, whole)


def test_a_full_disk_keeps_the_last_good_state(settings, whole, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_during(patch, 3)
        pretrain(at(settings, run))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckFailed, match="could not save: state"):
        full(patch, (".pt",))
        stop_during(patch, 5)
        pretrain(at(settings, run), resume=True)
    assert "the last good state is step 4" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "state").iterdir()) == ["step-000002.pt", "step-000004.pt"]
    pretrain(at(settings, run), resume=True)
    assert_same(run, whole)


def test_metrics_wait_for_room(settings, whole, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        full(patch, ("metrics.jsonl",))
        log = Learner.step

        def room_after_5(self: Learner, n: int, *rest: Any) -> Any:
            if n == 5:
                patch.undo()
            return log(self, n, *rest)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Learner, "step", room_after_5)
            pretrain(at(settings, run))
    assert "step 3: could not write metrics (No space left on device)" in capsys.readouterr().err
    assert_same(run, whole)


@pytest.mark.parametrize(
    "site",
    ["save_artifact", "reconstruction_sheet", "loss_curve", "TensorBoardLog.add"],
)
def test_a_full_disk_anywhere_else_only_warns(settings, whole, tmp_path, capsys, site):
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"pretrain.training.keeping.{site}", no_room)
        if site == "save_artifact":
            with pytest.raises(CheckFailed, match="artifact"):
                pretrain(at(settings, run))
            patch.undo()
            pretrain(at(settings, run), resume=True)
        else:
            pretrain(at(settings, run))
    assert "(No space left on device)" in capsys.readouterr().err
    assert_same(run, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_is_really_full(settings, whole, small_disk, capsys):
    run, ballast = small_disk / "run", small_disk / "ballast"

    def fill(self: Learner, n: int, *rest: Any) -> Any:
        if n == 5:
            with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
        return take(self, n, *rest)

    take = Learner.step
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(CheckFailed, match=r"written: state \(No space"),
    ):
        patch.setattr(Learner, "step", fill)
        pretrain(at(settings, run))
    assert "the last good state is step 4" in capsys.readouterr().err
    with pytest.raises(OSError, match=r"No space left on device: .*config\.json"):
        pretrain(at(settings, run), resume=True)
    ballast.unlink()
    pretrain(at(settings, run), resume=True)
    assert_same(run, whole)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"old"))
    with pytest.MonkeyPatch.context() as patch:
        full(patch, ("file",))
        with pytest.raises(OSError, match="No space"):
            write_whole(path, lambda file: file.write(b"new and longer"))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
