"""Worker processes: order, errors, signals, and no orphans."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import count, islice
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from pretrain import machine
from pretrain.data import workers as workers_module
from pretrain.data.workers import default_workers, in_workers
from pretrain.errors import BadImage, BadInput, ComaError


def fetch(key: int) -> tuple[int, torch.Tensor]:
    if key == 13:
        raise BadImage("thirteen.jpg: unlucky")
    if key == 666:
        raise RuntimeError("a bug")
    if key == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid(), torch.full((4,), key)


def test_results_come_in_the_order_of_the_keys():
    for workers in (0, 2):
        results = in_workers(fetch, count(20, 3), workers)
        pids, values = zip(*islice(results, 10), strict=True)
        results.close()
        assert [int(value[0]) for value in values] == list(range(20, 50, 3))
        assert len(set(pids)) == max(workers, 1)
        assert (os.getpid() in pids) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_about_the_data_arrive_as_themselves(workers):
    results = in_workers(fetch, [12, 13, 14], workers)
    next(results)
    with pytest.raises(BadImage) as raised:
        next(results)
    assert str(raised.value) == "thirteen.jpg: unlucky"


@pytest.mark.parametrize("workers", [0, 1])
def test_bugs_are_not_dressed_up(workers):
    with pytest.raises(RuntimeError, match="a bug"):
        next(in_workers(fetch, [666], workers))


def test_a_killed_worker_is_reported():
    results = in_workers(fetch, [1, 2, 99, 3, 4], 2)
    with pytest.raises(
        ComaError, match="a data worker was killed by SIGKILL, most likely because memory ran out"
    ):
        list(results)


def test_workers_ignore_signals_meant_for_the_trainer():
    results = in_workers(fetch, count(100), 2)
    pids = {next(results)[0] for _ in range(4)}
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert {next(results)[0] for _ in range(20)} == pids
    results.close()
    assert all(gone(pid) for pid in pids)


def test_negative_numbers_are_refused():
    with pytest.raises(BadInput, match="--workers -1"):
        in_workers(fetch, [1], -1)


SCRIPT = """
import multiprocessing, os
from itertools import count
from pretrain.data.workers import in_workers
def chatter(key):
    os.write(2, b"a remark of a C library")
if __name__ == "__main__":
    results = in_workers(chatter, count(), 2)
    next(results)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""


def test_a_program_that_ends_takes_its_workers_along_in_silence(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=150,
    )
    assert (done.returncode, done.stderr) == (0, "")
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def start_workers_and_die(connection: Connection) -> None:
    results = in_workers(fetch, count(1000), 2)
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
    assert machine.cores() == cores


def test_the_processor_is_named(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "processor\t: 0\nmodel name\t: A: B\nflags\t: fpu\n")
    assert machine.processor() == "A: B"
    monkeypatch.setattr("platform.processor", lambda: "another")
    monkeypatch.setattr(Path, "read_text", lambda self: "Features\t: fp\n")
    assert machine.processor() == "another"
