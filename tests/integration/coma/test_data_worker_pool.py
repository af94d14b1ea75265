"""Worker processes: order, errors, signals, and no orphans."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from coma import devices
from coma.data import worker_pool as workers_module
from coma.data.worker_pool import default_workers, map_ordered
from coma.errors import BadImage, BadInput, ComaError
from coma.ranges import OutOfRange


def fetch(key: int) -> tuple[int, torch.Tensor]:
    if key == 7:
        time.sleep(60)
    if key == 13:
        raise BadImage("thirteen.jpg: unlucky")
    if key == 666:
        raise RuntimeError("a bug")
    if key == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid(), torch.full((4,), key)


def test_results_come_in_the_order_of_the_keys():
    for workers in (0, 2):
        results = map_ordered(fetch, count(20, 3), workers)
        pids, values = zip(*islice(results, 10), strict=True)
        results.close()
        assert [int(value[0]) for value in values] == list(range(20, 50, 3))
        assert len(set(pids)) == max(workers, 1)
        assert (os.getpid() in pids) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_about_the_data_arrive_as_themselves(workers):
    results = map_ordered(fetch, [12, 13, 14], workers)
    next(results)
    with pytest.raises(BadImage) as raised:
        next(results)
    assert str(raised.value) == "thirteen.jpg: unlucky"


@pytest.mark.parametrize("workers", [0, 1])
def test_bugs_are_not_dressed_up(workers):
    with pytest.raises(RuntimeError, match="a bug"):
        next(map_ordered(fetch, [666], workers))


class Peculiar(Exception):
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")  # unpickled with one argument, it fails


def peculiar(key: int) -> None:
    if key:
        raise OutOfRange("--quality", f"{key} must be 1 to 95")
    raise Peculiar("a bug", "of a peculiar class")


def test_errors_of_any_class_arrive():
    with pytest.raises(OutOfRange, match=r"^--quality 99 must be 1 to 95$") as raised:
        next(map_ordered(peculiar, [99], 1))
    assert raised.value.in_file == "quality 99 must be 1 to 95"
    with pytest.raises(RuntimeError, match=r"^Peculiar: a bug: of a peculiar class\n") as raised:
        next(map_ordered(peculiar, [0], 1))
    assert "in a data worker" in raised.value.__notes__[0]


def test_a_killed_worker_is_reported():
    results = map_ordered(fetch, [1, 2, 99, 3, 4], 2)
    with pytest.raises(
        ComaError, match="a data worker was killed by SIGKILL, most likely because memory ran out"
    ):
        list(results)


def mapped() -> list[str]:
    """The shared memory that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line]


def images_and_files(key: int) -> tuple[torch.Tensor, list[str]]:
    """More than a megabyte, and the shared memory of the worker."""
    return torch.full((3, 700, 701), key, dtype=torch.uint8), mapped()


def no_memory_file(_: str) -> int:
    raise OSError(24, "Too many open files")


def images_through_the_pipe(key: int) -> tuple[torch.Tensor, list[str]]:
    os.memfd_create = no_memory_file
    return images_and_files(key)


@pytest.mark.parametrize("fetch_images", [images_and_files, images_through_the_pipe])
def test_images_need_no_shared_memory(fetch_images):
    """Neither side uses /dev/shm, which is 64 MB in Docker; where a memory file fails, a pipe does."""
    before = mapped()  # of other tests
    results = map_ordered(fetch_images, range(4), 2)
    for number, (images, shared) in enumerate(results):
        images += 1  # they may be written to
        assert images.eq(number + 1).all() and images.dtype == torch.uint8
        assert shared == []
        assert set(mapped()) <= set(before)


SMALL = """
import subprocess, sys
import torch
from coma.data.worker_pool import map_ordered

def images(key):
    return torch.full((30 << 20,), key, dtype=torch.uint8)

if __name__ == "__main__":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", "/dev/shm"], check=True)
    source = torch.arange(5 << 20)  # 40 MB of names and offsets, say
    kept = list(map_ordered(images, range(6), 2))
    assert [int(each[-1]) for each in kept] == list(range(6))
    print("all there")
"""


def test_a_small_dev_shm_is_enough(tmp_path):
    (tmp_path / "script.py").write_text(SMALL)
    command = ["unshare", "--mount", sys.executable, str(tmp_path / "script.py")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("needs the right to mount a tmpfs")
    assert (done.returncode, done.stdout, done.stderr) == (0, "all there\n", "")


def test_a_worker_that_hangs_is_named_and_given_up(monkeypatch, caplog):
    monkeypatch.setattr(workers_module, "_WARN_AFTER", 0.2)
    monkeypatch.setattr(workers_module, "_TIMEOUT", 0.4)
    results = map_ordered(fetch, [7], 1)
    with pytest.raises(ComaError, match=r"no images for 0 seconds: data worker \d+ does not answer"):
        list(results)
    assert "is the disk slow?" in caplog.text


def test_a_stopped_worker_holds_nobody_up():
    """Neither who waits for it, when a signal comes, nor the end."""
    from coma.signals import StopNow, StopRequest  # not for the workers, which import this file

    results = map_ordered(fetch, count(20), 2)
    for pid in {next(results)[0] for _ in range(4)}:
        os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with StopRequest(quiet=True) as stop, pytest.raises(StopNow), stop.at_once():
        list(results)
    results.close()


def test_workers_that_cannot_be_started_are_an_error_in_one_line(monkeypatch):
    def full(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", full)
    with pytest.raises(ComaError, match=r"data workers cannot be started here .*; use --workers 0"):
        list(map_ordered(fetch, [1], 1))


@dataclass
class Pinned:
    key: int
    pinned: bool = False

    def pin_memory(self) -> "Pinned":
        return Pinned(self.key, pinned=True)


def to_be_pinned(key: int) -> Pinned:
    if key == 13:
        raise BadImage("thirteen.jpg: unlucky")
    return Pinned(key)


def test_results_for_a_gpu_are_pinned_in_order(monkeypatch):
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    assert list(map_ordered(to_be_pinned, range(5), 2, pin=True)) == [Pinned(key, True) for key in range(5)]
    assert devices == [3]  # the thread that pins would make itself at home on the first GPU
    results = map_ordered(to_be_pinned, count(11), 2, pin=True)
    assert [next(results).key for _ in range(2)] == [11, 12]
    with pytest.raises(BadImage, match="unlucky"):
        next(results)
    endless = map_ordered(to_be_pinned, count(14), 1, pin=True)
    next(endless)
    endless.close()


def unsendable(key: int) -> object:
    return lambda: key


def test_what_cannot_be_sent_is_an_error():
    with pytest.raises(Exception, match="unsendable"):
        list(map_ordered(unsendable, [1], 1))


def test_workers_ignore_signals_meant_for_the_trainer():
    results = map_ordered(fetch, count(100), 2)
    pids = {next(results)[0] for _ in range(4)}
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert {next(results)[0] for _ in range(20)} == pids
    results.close()
    assert all(gone(pid) for pid in pids)


def test_negative_numbers_are_refused():
    with pytest.raises(BadInput, match="--workers -1"):
        map_ordered(fetch, [1], -1)


SCRIPT = """
import multiprocessing, os
from itertools import count
import torch
from coma.data.worker_pool import map_ordered
def chatter(key):
    os.write(2, b"a remark of a C library")
    return torch.zeros(1 << 20)  # large enough for a memory file
if __name__ == "__main__":
    results = map_ordered(chatter, count(), 2)
    next(results)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""


def test_a_program_that_ends_takes_its_workers_along_in_silence(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = tempfile.mkdtemp()  # a short path: those of sockets are limited
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "TMPDIR": folder},
        timeout=150,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(folder) == []
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def start_workers_and_die(connection: Connection) -> None:
    results = map_ordered(fetch, count(1000), 2)
    connection.send([next(results)[0] for _ in range(4)])
    os.kill(os.getpid(), signal.SIGKILL)


def test_no_worker_outlives_a_killed_parent():
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=start_workers_and_die, args=(theirs,))
    process.start()
    pids = set(ours.recv())
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def gone(pid: int, patience: float = 10) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat")
            if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # dead, waiting for its parent to notice
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 0), (2, 1, 0), (3, 1, 2), (16, 1, 15), (16, 8, 0), (32, 4, 7), (256, 1, 32)],
)
def test_default_number_of_workers(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(workers_module, "cores", lambda: cores)
    assert default_workers(processes) == workers
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == workers


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("nonsense", 8)]
)
def test_cores_respect_the_containers_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self: quota)
    assert devices.cores() == cores


def test_the_processor_is_named(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "processor\t: 0\nmodel name\t: A: B\nflags\t: fpu\n")
    assert devices.processor() == "A: B"
    monkeypatch.setattr("platform.processor", lambda: "another")
    monkeypatch.setattr(Path, "read_text", lambda self: "Features\t: fp\n")
    assert devices.processor() == "another"
