"""Run a function over keys in worker processes, results in order: decoding, indexing and packing alike.

- Transport: every worker answers on a pipe of its own, and what is large in a result travels in an anonymous
  memory file (`Parcel`). Neither needs /dev/shm, which containers keep small (64 MB in Docker). A worker that
  dies closes its pipe, so its end is noticed when its answer is due.
- Start method: forkserver. By the time a run reads data it has threads (CUDA, TensorBoard, the progress
  bar), and forking a process with threads can deadlock the child; the fork server is started clean,
  imports torch once, and its children start in milliseconds. Scripts therefore need the usual
  `if __name__ == "__main__":`.
- Signals: Ctrl-C and SIGTERM often reach every process of a job at once. The trainer wants to finish
  its step and save, so workers ignore both, and stop when they are told to or when their parent is gone.
- Errors about the user's data cross the process border as themselves, in one line.
- The global random generators of the calling process are never touched.
"""

from __future__ import annotations

import atexit
import io
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import DupFd
from multiprocessing.util import get_temp_dir
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from coma.devices import cores
from coma.errors import ComaError
from coma.ranges import PROCESSES

Key = TypeVar("Key")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

_MOST_WORKERS = 32
_PRELOAD = ["torch", "PIL.Image", "coma.data.loader"]
_AHEAD = 2
"""Keys that every worker has been given and not answered yet."""
_SILENCE, _PATIENCE = 60.0, 1800.0
"""Seconds without a result after which a warning is due, and after which a worker is given up."""
_LARGE, _ALIGNED = 1 << 16, 64
"""Bytes from which on a buffer travels in a memory file, and that its place there is a multiple of."""


def default_workers(trainers: int | None = None) -> int:
    """One process per core beside the trainer, 0 on 1 or 2 cores; trainers share the cores.

    Args:
        trainers: on this machine; None: as many as torchrun started.
    """
    share = cores() // (trainers or int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(share - 1, _MOST_WORKERS) if share > 2 else 0


def map_ordered(
    fetch: Callable[[Key], Result], keys: Iterable[Key], workers: int | None, *, pin: bool = False
) -> Generator[Result, None, None]:
    """`fetch(key)` for every key, in order, computed ahead by worker processes.

    Args:
        fetch: a picklable function.
        keys: may be endless.
        workers: number of processes; 0 computes here, on demand; None takes `default_workers()`.
        pin: put tensors in page-locked memory, from which copies to a GPU need not be waited for; the
            result then has a method `pin_memory()`.

    Raises:
        BadInput: a negative number of workers.
        ComaError: while iterating, what `fetch` raised of that kind, or that a worker was killed, hangs, or
            could not be started.
    """
    workers = default_workers() if workers is None else workers
    PROCESSES.check("--workers", workers)
    if workers == 0:
        return _here(fetch, keys, pin)
    return _apart(fetch, keys, workers, pin)


def _here(fetch: Callable[[Key], Any], keys: Iterable[Key], pin: bool) -> Generator[Any, None, None]:
    for key in keys:
        result = fetch(key)
        yield result.pin_memory() if pin else result


def _apart(
    fetch: Callable[[Key], Any], keys: Iterable[Key], workers: int, pin: bool
) -> Generator[Any, None, None]:
    crew: list[_Worker] = []

    def end() -> None:
        _stop(crew)
        atexit.unregister(end)

    atexit.register(end)  # it runs before multiprocessing's own handler, which would wait for them for ever
    with ExitStack() as stack:
        thread = None
        if pin:  # copying to page-locked memory takes long enough to be done ahead of its time
            device = torch.cuda.current_device()
            thread = stack.enter_context(ThreadPoolExecutor(1, "pin", torch.cuda.set_device, (device,)))
        stack.callback(end)  # the first thing at the end: a thread that waits for a worker goes on then
        _start(crew, fetch, workers)
        results = _answers(crew, keys)
        yield from results if thread is None else _pinned(results, thread)


def _answers(crew: list[_Worker], keys: Iterable[Key]) -> Iterator[Any]:
    """What the workers answer, in the order of the keys."""
    rest, asked = iter(keys), deque[_Worker]()

    def ask(worker: _Worker) -> None:
        for key in islice(rest, 1):
            with _dead_or_raised(worker):
                worker.connection.send(key)
            asked.append(worker)

    for worker in crew * _AHEAD:
        ask(worker)
    while asked:
        worker = asked.popleft()
        _wait_for(worker)
        with _dead_or_raised(worker):
            result = worker.connection.recv()
        if isinstance(result, _Failure):
            raise result.error
        ask(worker)
        yield result


def _pinned(results: Iterator[Any], thread: ThreadPoolExecutor) -> Iterator[Any]:
    """The results in page-locked memory, one ahead."""
    pinned = (result.pin_memory() for result in results)
    ahead = thread.submit(next, pinned, None)
    while (result := ahead.result()) is not None:
        ahead = thread.submit(next, pinned, None)
        yield result


class _Worker(NamedTuple):
    process: Any
    connection: Connection


class _Failure(NamedTuple):
    """What `fetch` raised."""

    error: Exception


def _start(crew: list[_Worker], fetch: Callable[[Key], Any], workers: int) -> None:
    """Add workers to the crew, one after the other."""
    context, parcel = _context(), Parcel(fetch)
    try:
        get_temp_dir()  # made here, it is removed here; workers are killed, and would leave theirs behind
        with _signals_held():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, parcel), daemon=True)
                process.start()
                theirs.close()
                crew.append(_Worker(process, ours))
    except (OSError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ComaError(f"data workers cannot be started here ({reason}); use --workers 0") from error


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _serve(connection: Connection, fetch: Callable[[Key], Any]) -> None:
    """A worker's life: answer every key until the other end is closed."""
    _settle()
    while True:
        try:
            key: Any = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Any = Parcel(fetch(key))
        except Exception as error:
            if not isinstance(error, ComaError):  # a bug, or memory that ran out
                error.add_note(f"in a data worker:\n{traceback.format_exc()}")
            answer = _Failure(_sendable(error))
        try:
            connection.send(answer)
        except OSError:  # nobody listens any more
            return


def _sendable(error: Exception) -> Exception:
    """Returns the error itself, or one with its text where its class cannot be pickled and unpickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        dummy_teacher = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            dummy_teacher.add_note(note)
        return dummy_teacher
    return error


def _settle() -> None:
    """First thing in a worker: ignore the signals meant for the trainer, outlive it by nothing, be quiet.

    C libraries print remarks on damaged files to file descriptor 2; Python's own stderr is kept.
    """
    torch.set_num_threads(1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _stop(crew: list[_Worker]) -> None:
    """End all workers, whatever they are at: they only read."""
    for worker in crew:
        worker.process.kill()
    for worker in crew:
        worker.process.join()
    crew.clear()


def _wait_for(worker: _Worker) -> None:
    """Wait until a worker has answered, or is dead.

    Raises:
        ComaError: it does neither.
    """
    waited = 0.0
    while not worker.connection.poll(_SILENCE):
        waited += _SILENCE
        what = f"no images for {waited:.0f} seconds: data worker {worker.process.pid} does not answer"
        if waited >= _PATIENCE:
            raise ComaError(
                f"{what}; look whether the disk that holds the images does, and whether all of them are files"
            )
        log.warning("%s (is the disk slow?); still waiting, Ctrl-C stops", what)


@contextmanager
def _dead_or_raised(worker: _Worker) -> Iterator[None]:
    """Say what became of a worker if it died; whatever the transport was doing with it shows otherwise."""
    try:
        yield
    except (EOFError, OSError) as error:
        worker.process.join(1)
        code = worker.process.exitcode
        if code is None:
            raise
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has gone (exit code {code})"
        raise ComaError(
            f"a data worker {how}, most likely because memory ran out: use fewer --workers or smaller batches"
        ) from error


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started inside inherit the block, so that no signal can hit them before `_settle`."""
    resource_tracker.ensure_running()  # it would lift the block when started inside
    held = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Parcel:
    """An object on its way to another process, where it is unpickled as the object itself.

    Large buffers (arrays, tensors) are copied once into an anonymous memory file that both processes map. It
    counts as memory of the processes alone, not of /dev/shm. Where there are no such files (macOS), or no
    more may be opened, the buffers go through the pipe with the rest.
    """

    def __init__(self, content: object) -> None:
        self._places: list[tuple[int, int]] = []
        self._file: io.BufferedWriter | None = None
        buffers: list[memoryview] = []

        def leave_in(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes < _LARGE:
                return True
            buffers.append(raw)
            return False

        self._pickled = _pickled(content, leave_in)
        if not buffers:
            return
        try:
            file = os.fdopen(os.memfd_create("coma"), "wb")
            for buffer in buffers:
                start = file.tell()
                file.write(buffer)
                file.write(bytes(-buffer.nbytes % _ALIGNED))
                self._places.append((start, start + buffer.nbytes))
            file.flush()
            self._file = file
        except (AttributeError, OSError):
            self._pickled = _pickled(content, None)

    def __reduce__(self) -> tuple[Any, ...]:
        handle = None if self._file is None else DupFd(self._file.fileno())
        return _opened, (self._pickled, self._places, handle)


def _opened(pickled: bytes, places: list[tuple[int, int]], handle: Any) -> Any:
    if handle is None:
        return pickle.loads(pickled)
    with os.fdopen(handle.detach(), "rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0))
    return pickle.loads(pickled, buffers=[memory[start:end] for start, end in places])


def _pickled(content: object, leave_in: Callable[[pickle.PickleBuffer], bool] | None) -> bytes:
    file = io.BytesIO()
    _Pickler(file, 5, buffer_callback=leave_in).dump(content)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Tensors as arrays: torch's own way of passing them takes shared memory, or copies twice."""

    def reducer_override(self, value: Any) -> Any:
        """How `value` is pickled; other things than tensors are as ever."""
        if isinstance(value, Tensor) and value.dtype != torch.bfloat16:  # which numpy does not know
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented
