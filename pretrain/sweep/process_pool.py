"""A pool of `coma` processes: one that fails or is killed does not affect the others.

Every process holds two locks while it lives: one of its job and one of its slot. A comparison that was killed
and is started again waits for processes that still hold them, instead of starting others beside them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coma.cli import CHILD
from coma.errors import Interrupted
from coma.locks import lock
from coma.signals import StopRequest

_POLL = 0.1  # seconds
_PATIENCE = 120.0  # seconds: a process that is asked to stop may have a large state to save
_SHOW = 1.0  # seconds: progress is read from files


@dataclass(frozen=True)
class Job:
    """One process of `coma`."""

    name: str
    arguments: Callable[[], Sequence[object]]
    """Arguments of `coma`, computed when the process starts, since a run may have to be resumed."""
    done: Callable[[], bool]
    """Whether its results exist, whichever process wrote them."""
    work: float = 1.0
    """Amount of work, in a unit that all jobs share."""
    progress: Callable[[], float] = lambda: 0.0
    """Share of the work that is done, while it runs."""
    after: str | None = None
    """Name of the job whose results it needs."""


@dataclass(frozen=True)
class Failure:
    """A job without results."""

    name: str
    reason: str
    log: Path

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} (see {self.log})"


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    locks: tuple[int, int]


class ProcessPool:
    """Runs jobs; see `run`.

    Args:
        folder: Folder for `logs/` and `locks/`.
        slots: Environment variables of every slot; a slot runs one job at a time.
        tell: Receives events, a line each, and the work that is done.
        stop: Whether to stop.
    """

    def __init__(
        self,
        folder: Path,
        slots: Sequence[dict[str, str]],
        tell: Callable[[str | None, float], object],
        stop: StopRequest,
    ) -> None:
        self._logs, self._locks = folder / "logs", folder / "locks"
        self._slots, self._tell, self.stop = slots, tell, stop
        self._running: list[_Running] = []
        self._finished = 0.0
        self._waits = False
        self.failures: list[Failure] = []

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs the jobs that are not done yet; `failures` lists those that failed.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; every process was asked to stop, and has ended.
        """
        for folder in (self._logs, self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        waiting = []
        for job in jobs:
            if job.done():
                self._finished += job.work
            else:
                waiting.append(job)
        due = 0.0
        try:
            while waiting or self._running:
                if self.stop.asked:
                    self._end(signal.SIGTERM)
                    raise Interrupted("stopped; run the same command again to resume")
                self._collect()
                self._drop_blocked(waiting)
                self._start(waiting)
                if time.monotonic() >= due:
                    self._tell(None, self._work_done())
                    due = time.monotonic() + _SHOW
                time.sleep(_POLL)
        finally:
            self._end(signal.SIGKILL)
        self._tell(None, self._work_done())

    def _start(self, waiting: list[Job]) -> None:
        unfinished = {job.name for job in waiting} | {each.job.name for each in self._running}
        for job in list(waiting):
            if job.after in unfinished:
                continue
            slot, place = self._free_slot()
            if place is None:
                break
            own = self._lock(job.name)
            if own is None:
                os.close(place)
                continue
            waiting.remove(job)
            if job.done():  # by a process that outlived its comparison
                os.close(place)
                os.close(own)
                self._finished += job.work
                continue
            locks = place, own
            self._running.append(_Running(job, self._process(job, slot, locks), slot, locks))
            self._tell(f"started {job.name}", self._work_done())
        if waiting and not self._running and not self._waits:
            self._waits = True
            self._tell("waiting for a run that another process of this comparison started", self._work_done())

    def _free_slot(self) -> tuple[int, int | None]:
        """Returns a free slot and the lock on it, if there is one."""
        own = {each.slot for each in self._running}  # where there are no locks, nothing else tells
        for slot in (slot for slot in range(len(self._slots)) if slot not in own):
            place = self._lock(f"slot-{slot}")
            if place is not None:
                return slot, place
        return -1, None

    def _lock(self, name: str) -> int | None:
        """Returns a lock, or None if a process holds it; an open file alone, if the file system has none."""
        handle = os.open(self._locks / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        if lock(handle, self._locks, "comparison"):
            return handle
        os.close(handle)
        return None

    def _process(self, job: Job, slot: int, locks: tuple[int, int]) -> subprocess.Popen[bytes]:
        command = [*CHILD, *map(str, job.arguments())]
        with self._log(job).open("ab") as log:
            log.write(f"\n$ coma {' '.join(command[len(CHILD) :])}\n".encode(errors="backslashreplace"))
            log.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self._slots[slot],
                start_new_session=True,  # Ctrl-C reaches it once, through this process
                pass_fds=locks,
            )

    def _log(self, job: Job) -> Path:
        return self._logs / f"{job.name}.log"

    def _collect(self) -> None:
        for each in list(self._running):
            code = each.process.poll()
            if code is None:
                continue
            self._running.remove(each)
            _close(each.locks)
            if code == 0 and each.job.done():
                self._finished += each.job.work
                self._tell(f"finished {each.job.name}", self._work_done())
            else:
                self._fail(each.job, _reason(code, self._log(each.job)))

    def _drop_blocked(self, waiting: list[Job]) -> None:
        failed = {failure.name for failure in self.failures}
        for job in list(waiting):
            if job.after in failed:
                waiting.remove(job)
                self._fail(job, f"not run, since {job.after} failed")
                failed.add(job.name)

    def _fail(self, job: Job, reason: str) -> None:
        failure = Failure(job.name, reason, self._log(job))
        self.failures.append(failure)
        self._finished += job.work
        self._tell(f"FAILED {failure}", self._work_done())

    def _work_done(self) -> float:
        return self._finished + sum(
            each.job.work * min(max(each.job.progress(), 0.0), 1.0) for each in self._running
        )

    def _end(self, number: signal.Signals) -> None:
        for each in self._running:
            with suppress(ProcessLookupError):
                os.killpg(each.process.pid, number)
        until = time.monotonic() + _PATIENCE
        for each in self._running:
            try:
                each.process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                self._tell(f"{each.job.name} does not stop; killing it", self._work_done())
                with suppress(ProcessLookupError):
                    os.killpg(each.process.pid, signal.SIGKILL)
                each.process.wait()
            _close(each.locks)
        self._running = []


def _close(handles: Sequence[int]) -> None:
    for handle in handles:
        os.close(handle)


def _reason(code: int, log: Path) -> str:
    """Returns how the last process that wrote to a log ended, and its last message."""
    text = log.read_text(errors="replace").rpartition("\n$ coma ")[2]
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]  # without the command
    messages = [line for line in lines if line.startswith("error:")] or lines or [""]
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{how}, {messages[-1].removeprefix('error: ')}" if messages[-1] else how
