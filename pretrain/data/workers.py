"""Run a function over keys in worker processes, results in order: decoding, indexing and packing alike.

torch's DataLoader does the transport (shared memory, pinning, prefetch); what it does not do is here.

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
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.errors import BadInput, ComaError
from pretrain.machine import cores

Key = TypeVar("Key")
Result = TypeVar("Result")

_MOST_WORKERS = 32
_PRELOAD = ["torch", "torch.utils.data", "PIL.Image", "pretrain.data.samples"]


def default_workers(trainers: int | None = None) -> int:
    """One process per core beside the trainer, 0 on 1 or 2 cores; trainers share the cores.

    Args:
        trainers: on this machine; None: as many as torchrun started.
    """
    share = cores() // (trainers or int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(share - 1, _MOST_WORKERS) if share > 2 else 0


def in_workers(
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
        ComaError: while iterating, what `fetch` raised of that kind, or that a worker was killed.
    """
    workers = default_workers() if workers is None else workers
    if workers < 0:
        raise BadInput(f"--workers {workers} must be at least 0")
    guarded = _Guarded(fetch)
    if workers == 0:
        return _unwrapped(_here(guarded, keys, pin))
    return _unwrapped(_apart(guarded, keys, workers, pin))


class _Guarded(Dataset, Generic[Key, Result]):
    """Hands errors about the data over as values, so that no traceback of a worker is wrapped around them."""

    def __init__(self, fetch: Callable[[Key], Result]) -> None:
        self.fetch = fetch

    def __getitem__(self, key: Key) -> Result | ComaError:  # type: ignore[override]
        try:
            return self.fetch(key)
        except ComaError as error:
            return error


def _unwrapped(results: Generator[Result | ComaError, None, None]) -> Generator[Result, None, None]:
    try:
        for result in results:
            if isinstance(result, ComaError):
                raise result
            yield result
    finally:
        results.close()


def _here(guarded: _Guarded[Key, Result], keys: Iterable[Key], pin: bool) -> Generator[Any, None, None]:
    for key in keys:
        result: Any = guarded[key]
        yield result.pin_memory() if pin and not isinstance(result, ComaError) else result


def _apart(
    guarded: _Guarded[Key, Result], keys: Iterable[Key], workers: int, pin: bool
) -> Generator[Any, None, None]:
    with warnings.catch_warnings(), _signals_held():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # the number was chosen, not guessed
        loader: DataLoader[Any] = DataLoader(
            guarded,
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=pin,
            generator=torch.Generator(),
            worker_init_fn=_settle,
            multiprocessing_context=_context(),
        )
        iterator: Any = iter(loader)
    stop = partial(_stop, iterator)
    atexit.register(stop)  # before multiprocessing's own handler, which would wait for them for ever
    try:
        yield from iterator
    except Exception as error:  # a dead worker shows as whatever the transport was doing with it
        if (notice := _death_notice(iterator)) is None:
            raise
        raise ComaError(notice) from error
    finally:
        stop()
        atexit.unregister(stop)


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _unchanged(result: Result) -> Result:
    return result


def _settle(_: int) -> None:
    """First thing in a worker: ignore the signals meant for the trainer, outlive it by nothing, be quiet.

    C libraries print remarks on damaged files to file descriptor 2; Python's own stderr is kept.
    """
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


def _stop(iterator: Any) -> None:
    workers = iterator._workers
    if _dead(workers):  # the queues may be locked for ever, so do not ask the others politely
        for worker in workers:
            worker.kill()
    iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _dead(workers: list[Any]) -> list[Any]:
    return [worker for worker in workers if worker.exitcode not in (None, 0)]


def _death_notice(iterator: Any) -> str | None:
    """What became of a dead worker; None if all are alive."""
    wait([worker.sentinel for worker in iterator._workers], timeout=1)
    dead = _dead(iterator._workers)
    if not dead:
        return None
    code = dead[0].exitcode
    if code == -signal.SIGBUS:
        return "a data worker ran out of shared memory: enlarge /dev/shm or use fewer --workers"
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has gone (exit code {code})"
    return f"a data worker {how}, most likely because memory ran out: use fewer --workers or smaller batches"


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
