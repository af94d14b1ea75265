"""What a run has saved stays loadable: kills in the middle of a save, damaged files, full disks."""

import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from short_runs import assert_same, at, interrupted, learned, stop_during

from coma.atomic_io import write_whole
from coma.errors import BadInput, CheckFailed
from pretrain.training import pretrain
from pretrain.training.checkpoint import count_states, read_state, write_state
from pretrain.training.run_plan import check_objective, check_space, disk_space
from pretrain.training.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("no_pictures")

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
        patch.setattr(f"coma.atomic_io.os.{name}", mortal(getattr(os, name)))
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
def test_the_state_before_stands_in_for_a_damaged_one(resumable, whole, tmp_path, capsys, damage):
    run = tmp_path / "run"
    interrupted(at(resumable, run), 4)
    newest_state = run / "state" / "step-000005.pt"
    newest_state.write_bytes(damage(newest_state.read_bytes()))
    pretrain(at(resumable, run), resume=True)
    told = capsys.readouterr().err
    assert "step-000005.pt: this state does not load" in told
    assert "resuming at step 4" in told
    assert_same(run, whole)


def test_every_changed_byte_of_a_state_is_noticed(tmp_path):
    """Also those of the checksum, a file that is cut short anywhere, and something else in its place."""
    folder = tmp_path / "state"
    for step in (1, 2):
        write_state(folder, {"step": step, "weights": torch.arange(8.0) + step}, keep=step - 1)
    newest = folder / "step-000002.pt"
    good = newest.read_bytes()
    cut = [good[:size] for size in (0, 100, len(good) - 100, len(good) - 73, len(good) - 1)]
    for place in [*range(0, len(good), 41), *range(len(good) - 80, len(good))]:
        flipped = bytearray(good)
        flipped[place] ^= 1
        cut.append(bytes(flipped))
    told: list[str] = []
    for damaged in cut:
        newest.write_bytes(damaged)
        told.clear()
        state = read_state(folder, told.append)
        assert state is not None and state["step"] == 1
        assert len(told) == 1 and "step-000002.pt: this state does not load" in told[0]
    newest.unlink()
    newest.mkdir()
    state = read_state(folder, lambda _: None)
    assert state is not None and state["step"] == 1
    write_state(folder, {"step": 3, "weights": torch.zeros(1)}, keep=1)
    newest.rmdir()


def test_a_state_without_a_checksum_loads_with_a_note(tmp_path):
    (tmp_path / "state").mkdir()
    torch.save({"format_version": 1, "step": 1}, tmp_path / "state" / "step-000001.pt")
    told: list[str] = []
    assert read_state(tmp_path / "state", told.append) == {"format_version": 1, "step": 1}
    assert "has no checksum (an older version wrote it)" in told[0]


def test_no_state_that_loads(resumable, tmp_path):
    run = tmp_path / "run"
    interrupted(at(resumable, run), 4)
    for path in (run / "state").iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadInput, match="none of the saved states loads"):
        pretrain(at(resumable, run), resume=True)


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

    patch.setattr("coma.atomic_io.os.open", opened)
    patch.setattr("coma.atomic_io.os.write", write)


def test_a_full_disk_loses_no_training(resumable, whole, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        full(patch, (".pt",))
        with pytest.raises(CheckFailed, match=r"all 7 steps are done, .*: state \(No space left on device\)"):
            pretrain(at(resumable, run))
    told = capsys.readouterr().err
    assert "step 2: could not write state (No space left on device); no state was saved yet" in told
    assert list((run / "state").iterdir()) == []
    assert learned(run)[1].keys() == learned(whole)[1].keys()  # the artifact was written
    pretrain(at(resumable, run), resume=True)
    assert_same(run, whole)


def test_a_full_disk_keeps_the_last_good_state(resumable, whole, tmp_path, capsys):
    run = tmp_path / "run"
    interrupted(at(resumable, run), 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckFailed, match="could not save: state"):
        full(patch, (".pt",))
        stop_during(patch, 5)
        pretrain(at(resumable, run), resume=True)
    assert "the last good state is step 4" in capsys.readouterr().err
    assert [path.name for path in (run / "state").iterdir()] == ["step-000004.pt"]
    pretrain(at(resumable, run), resume=True)
    assert_same(run, whole)


def test_the_oldest_state_makes_room_for_the_newest(tmp_path):
    for step in (1, 2):
        write_state(tmp_path, {"step": step}, keep=step - 1)
    with pytest.MonkeyPatch.context() as patch:
        sync = os.fsync

        def room_for_two(number: int) -> None:
            if len(list(tmp_path.glob("*step-*"))) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(number)

        patch.setattr("coma.atomic_io.os.fsync", room_for_two)
        write_state(tmp_path, {"step": 3}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002.pt", "step-000003.pt"]


def test_the_states_of_a_run_take_no_more_room_than_is_asked_for(resumable, tmp_path):
    run, taken = tmp_path / "run", []
    config = at(resumable, run, save_steps=1)
    sync = os.fsync

    def measure(number: int) -> None:
        sync(number)
        taken.append(sum(path.stat().st_size for path in (run / "state").glob("*step-*")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coma.atomic_io.os.fsync", measure)
        pretrain(config)
    parameters = check_objective(config)
    artifact = (run / "artifact" / "model.safetensors").stat().st_size
    asked, extra = disk_space(config, parameters), 3 * 150_000  # names and settings
    assert max(taken) + artifact < asked + extra
    again = disk_space(config, parameters, saved=2)
    assert again < asked / 2
    assert count_states(run / "state") == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=again))
        check_space(config, parameters)


def test_metrics_wait_for_room(resumable, whole, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        full(patch, ("metrics.jsonl",))
        log = TrainStep.__call__

        def room_after_5(self: TrainStep, n: int, *rest: Any) -> Any:
            if n == 5:
                patch.undo()
            return log(self, n, *rest)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(TrainStep, "__call__", room_after_5)
            pretrain(at(resumable, run))
    assert "step 3: could not write metrics (No space left on device)" in capsys.readouterr().err
    assert_same(run, whole)


@pytest.mark.parametrize(
    "site",
    ["save_artifact", "reconstruction_sheet", "loss_curve", "TensorBoardLog"],
)
def test_a_full_disk_anywhere_else_only_warns(resumable, whole, tmp_path, capsys, site):
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        if site == "TensorBoardLog":
            patch.setattr("pretrain.training.callbacks.TensorBoardLog.on_metrics", no_room)
        else:
            patch.setattr(f"pretrain.training.run_directory.{site}", no_room)
        if site == "save_artifact":
            with pytest.raises(CheckFailed, match="artifact"):
                pretrain(at(resumable, run))
            patch.undo()
            pretrain(at(resumable, run), resume=True)
        else:
            pretrain(at(resumable, run))
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


def test_a_disk_that_is_really_full(resumable, whole, small_disk, capsys):
    run, ballast = small_disk / "run", small_disk / "ballast"

    def fill(self: TrainStep, n: int, *rest: Any) -> Any:
        if n == 5:
            with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
        return take(self, n, *rest)

    take = TrainStep.__call__
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(CheckFailed, match=r"written: artifact \(.*No space"),
    ):
        patch.setattr(TrainStep, "__call__", fill)
        pretrain(at(resumable, run))
    assert "the last good state is step 6" in capsys.readouterr().err
    assert [path.name for path in sorted((run / "state").iterdir())] == ["step-000006.pt", "step-000007.pt"]
    with pytest.raises(BadInput, match=r"needs [\d.]+ MB of disk, and [\d.]+ MB are free; make room"):
        pretrain(at(resumable, run), resume=True)
    ballast.unlink()
    pretrain(at(resumable, run), resume=True)
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
