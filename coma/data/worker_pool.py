"""Runs a function over keys in worker processes and returns the results in order.

- Transport: each worker answers through its own pipe, and large buffers travel in an anonymous memory file
  (`SharedPickle`). Neither uses /dev/shm, which is small in containers (64 MB in Docker). A worker that dies
  closes its pipe, so its death is noticed when its result is due.
- Start method: forkserver. When a run starts to read data, it already has threads (CUDA, TensorBoard, the
  progress bar), and forking a process with threads can deadlock the child. The fork server has no threads,
  imports torch once, and starts children in milliseconds. Scripts therefore need the usual
  `if __name__ == "__main__":`.
- Signals: Ctrl-C and SIGTERM often reach every process of a job at once. The trainer must finish its step and
  save, so workers ignore both signals; they exit when they are killed or when their parent exits.
- Errors: errors about the user's data are raised in the parent process as they are, in one line.
- Random numbers: the global generators of the calling process are never used.
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

from coma.data.retries import REPEATED
from coma.devices import cores
from coma.errors import ComaError
from coma.ranges import PROCESSES

Key = TypeVar("Key")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

_MAX_WORKERS = 32
_PRELOAD = ["torch", "PIL.Image", "coma.data.loader"]
_PREFETCH = 2
"""Number of keys that each worker has been sent and has not answered yet."""
_WARN_AFTER, _TIMEOUT = 60.0, 1800.0
"""Seconds without a result until a warning, and until the worker is given up."""
_LARGE, _ALIGNMENT = 1 << 16, 64
"""Minimum size in bytes of buffers that travel in a memory file, and their alignment in it."""


def default_workers(trainers: int | None = None) -> int:
    """Returns the default number of workers: one per core beside the trainer, 0 on 1 or 2 cores.

    Args:
        trainers: Number of training processes on this machine, which share its cores; by default the number
            that torchrun started.
    """
    share = cores() // (trainers or int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(share - 1, _MAX_WORKERS) if share > 2 else 0


def map_ordered(
    fetch: Callable[[Key], Result], keys: Iterable[Key], workers: int | None, *, pin: bool = False
) -> Generator[Result, None, None]:
    """Yields `fetch(key)` for every key, in order, computed ahead by worker processes.

    Args:
        fetch: Picklable function.
        keys: Keys; may be endless.
        workers: Number of processes; 0 computes in this process, on demand; None uses `default_workers()`.
        pin: Put tensors in page-locked memory, for asynchronous copies to a GPU. The results must have a
            method `pin_memory()`.

    Raises:
        BadInput: The number of workers is negative.
        ComaError: While iterating: `fetch` raised it, or a worker died, hangs or cannot be started.
    """
    workers = default_workers() if workers is None else workers
    PROCESSES.check("--workers", workers)
    if workers == 0:
        return _reported((result.pin_memory() if pin else result) for result in map(fetch, keys))  # type: ignore[attr-defined]
    return _reported(_map_in_processes(fetch, keys, workers, pin))


def _reported(results: Generator[Result, None, None]) -> Generator[Result, None, None]:
    """Yields the results, and reports at the end how many requests for remote files were repeated."""
    try:
        yield from results
    finally:
        REPEATED.report()


def _map_in_processes(
    fetch: Callable[[Key], Any], keys: Iterable[Key], count: int, pin: bool
) -> Generator[Any, None, None]:
    workers: list[_Worker] = []

    def stop() -> None:
        """Kills all workers, whatever they do: they only read."""
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
        workers.clear()
        atexit.unregister(stop)

    atexit.register(
        stop
    )  # runs before multiprocessing's own handler, which would wait for the workers for ever
    with ExitStack() as stack:
        thread = None
        if pin:  # copying to page-locked memory is slow, so it is done ahead
            device = torch.cuda.current_device()
            thread = stack.enter_context(ThreadPoolExecutor(1, "pin", torch.cuda.set_device, (device,)))
        stack.callback(stop)  # runs first, so that a thread that waits for a worker continues
        _start(workers, fetch, count)
        results = _ordered_results(workers, keys)
        yield from results if thread is None else _pin_ahead(results, thread)


def _ordered_results(workers: list[_Worker], keys: Iterable[Key]) -> Iterator[Any]:
    """Sends the keys to the workers in turn, and yields the results in the order of the keys."""
    rest, asked = iter(keys), deque[_Worker]()

    def ask(worker: _Worker) -> None:
        for key in islice(rest, 1):
            with _death_reported(worker):
                worker.connection.send(key)
            asked.append(worker)

    for worker in workers * _PREFETCH:
        ask(worker)
    while asked:
        worker = asked.popleft()
        _wait_for(worker)
        with _death_reported(worker):
            result = worker.connection.recv()
        REPEATED.add(*result.repeated)
        if isinstance(result, _Failure):
            raise result.error
        ask(worker)
        yield result.content


def _pin_ahead(results: Iterator[Any], thread: ThreadPoolExecutor) -> Iterator[Any]:
    """Yields the results in page-locked memory; the thread prepares the next one."""
    pinned = (result.pin_memory() for result in results)
    ahead = thread.submit(next, pinned, None)
    while (result := ahead.result()) is not None:
        ahead = thread.submit(next, pinned, None)
        yield result


class _Worker(NamedTuple):
    process: Any
    connection: Connection


class _Failure(NamedTuple):
    """The error that `fetch` raised."""

    error: Exception
    repeated: tuple[int, str]


class _Answer(NamedTuple):
    """What `fetch` returned, and the requests for remote files that were repeated for it."""

    content: Any
    repeated: tuple[int, str]


def _start(workers: list[_Worker], fetch: Callable[[Key], Any], count: int) -> None:
    """Starts `count` workers and appends each of them to the list."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    shared = SharedPickle(fetch)
    try:
        get_temp_dir()  # created here, it is removed here; killed workers would not remove theirs
        with _signals_blocked():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_worker_loop, args=(theirs, shared), daemon=True)
                process.start()
                theirs.close()
                workers.append(_Worker(process, ours))
    except (OSError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ComaError(f"data workers cannot be started here ({reason}); use --workers 0") from error


def _worker_loop(connection: Connection, fetch: Callable[[Key], Any]) -> None:
    """Answers every key until the other end of the connection is closed."""
    _init_worker()
    while True:
        try:
            key: Any = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Any = SharedPickle(_Answer(fetch(key), REPEATED.take()))
        except Exception as error:
            if not isinstance(error, ComaError):  # a bug, or not enough memory
                error.add_note(f"in a data worker:\n{traceback.format_exc()}")
            answer = _Failure(_picklable(error), REPEATED.take())
        try:
            connection.send(answer)
        except OSError:  # the parent no longer listens
            return


def _picklable(error: Exception) -> Exception:
    """Returns the error, or a RuntimeError with its text if it cannot be pickled and unpickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        substitute = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            substitute.add_note(note)
        return substitute
    return error


def _init_worker() -> None:
    """Ignores the trainer's signals, exits with the parent, and silences C libraries.

    C libraries print warnings about damaged files to file descriptor 2; Python's own stderr is kept.
    """
    torch.set_num_threads(1)
    REPEATED.in_worker = True
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _wait_for(worker: _Worker) -> None:
    """Waits until a worker has answered or is dead.

    Raises:
        ComaError: It has done neither for `_TIMEOUT` seconds.
    """
    waited = 0.0
    while not worker.connection.poll(_WARN_AFTER):
        waited += _WARN_AFTER
        what = f"no images for {waited:.0f} seconds: data worker {worker.process.pid} does not answer"
        if waited >= _TIMEOUT:
            raise ComaError(
                f"{what}; check that the disk with the images responds and that all of them are regular files"
            )
        log.warning("%s (is the disk slow?); still waiting, Ctrl-C stops", what)


@contextmanager
def _death_reported(worker: _Worker) -> Iterator[None]:
    """Turns the errors of a broken connection into one that says how the worker died."""
    try:
        yield
    except (EOFError, OSError) as error:
        worker.process.join(1)
        code = worker.process.exitcode
        if code is None:
            raise
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        raise ComaError(
            f"a data worker {how}, most likely because memory ran out: use fewer --workers or smaller batches"
        ) from error


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks signals; processes started inside inherit this, so none reaches them before `_init_worker`."""
    resource_tracker.ensure_running()  # started inside, it would unblock them
    blocked = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SharedPickle:
    """An object that is sent to another process, where it is unpickled as the object itself.

    Large buffers (arrays, tensors) are copied once into an anonymous memory file that both processes map. It
    counts as memory of the processes, not of /dev/shm. If there are no such files (macOS) or no more can be
    opened, the buffers are sent through the pipe with the rest.
    """

    def __init__(self, content: object) -> None:
        self._slices: list[tuple[int, int]] = []
        self._file: io.BufferedWriter | None = None
        buffers: list[memoryview] = []

        def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes < _LARGE:
                return True
            buffers.append(raw)
            return False

        self._pickled = _pickle(content, keep_in_band)
        if not buffers:
            return
        try:
            file = os.fdopen(os.memfd_create("coma"), "wb")
            for buffer in buffers:
                start = file.tell()
                file.write(buffer)
                file.write(bytes(-buffer.nbytes % _ALIGNMENT))
                self._slices.append((start, start + buffer.nbytes))
            file.flush()
            self._file = file
        except (AttributeError, OSError):
            self._pickled = _pickle(content, None)

    def __reduce__(self) -> tuple[Any, ...]:
        handle = None if self._file is None else DupFd(self._file.fileno())
        return _unpickle, (self._pickled, self._slices, handle)


def _unpickle(pickled: bytes, slices: list[tuple[int, int]], handle: Any) -> Any:
    if handle is None:
        return pickle.loads(pickled)
    with os.fdopen(handle.detach(), "rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0))
    return pickle.loads(pickled, buffers=[memory[start:end] for start, end in slices])


def _pickle(content: object, keep_in_band: Callable[[pickle.PickleBuffer], bool] | None) -> bytes:
    file = io.BytesIO()
    _Pickler(file, 5, buffer_callback=keep_in_band).dump(content)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays; torch's own way uses shared memory or copies twice."""

    def reducer_override(self, value: Any) -> Any:
        """Returns how a tensor is pickled; everything else is pickled as usual."""
        if isinstance(value, Tensor) and value.dtype != torch.bfloat16:  # unknown to numpy
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented
