"""Requests to remote storage, many at a time, repeated on failure and limited in time.

A request that fails is repeated after a growing pause. What can never succeed (a missing file, no permission,
no package for the protocol) is an error at once. Error texts of libraries often contain whole addresses, so
these are removed before the texts are shown.
"""

from __future__ import annotations

import itertools
import logging
import queue
import random
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any, TypeVar

from coma.errors import BadInput
from coma.messages import counted, printable
from coma.paths import Address

log = logging.getLogger(__name__)

Result = TypeVar("Result")
THREADS = 16
"""Number of requests of one process at a time."""
_REPORT_SECONDS = 60.0
"""Time between two reports of repeated requests."""
_STATUS_RETRIED = {408, 425, 429}
_NEVER_RETRIED = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, NotImplementedError, ValueError, TypeError, MemoryError),
)
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "'coma-dyvit[remote]'"),
    "hf": "huggingface_hub",
}


@dataclass(frozen=True)
class RetryPolicy:
    """How long requests are tried."""

    attempts: int = 8
    first_pause: float = 0.5
    """Seconds before the first repetition; every further pause is twice as long."""
    seconds: float = 60.0
    """Time limit of one request."""


POLICY = RetryPolicy()


class RepeatedRequests:
    """Counts requests that were repeated; workers hand their counts to the parent, which reports them."""

    def __init__(self) -> None:
        self.in_worker = False
        self._count = self._reported = 0
        self._last = ""
        self._next = 0.0
        self._lock = Lock()

    def add(self, count: int, last: str) -> None:
        """Counts repetitions; `last` says which request was repeated, and why."""
        if not count:
            return
        with self._lock:
            self._count, self._last = self._count + count, last
        if not self.in_worker and time.monotonic() >= self._next:
            self.report()

    def take(self) -> tuple[int, str]:
        """Returns count and last repetition of a worker, and forgets them."""
        with self._lock:
            taken = self._count, self._last
            self._count, self._last = 0, ""
        return taken

    def report(self) -> None:
        """Logs how many requests were repeated so far, unless that was logged already."""
        if self._count == self._reported:
            return
        self._reported, self._next = self._count, time.monotonic() + _REPORT_SECONDS
        were = "was" if self._count == 1 else "were"
        log.warning("%s %s repeated; the last: %s", counted(self._count, "request"), were, self._last)


REPEATED = RepeatedRequests()
"""The counts of this process."""


def in_threads(function: Callable[[Any], Result], items: Sequence[Any]) -> list[Result]:
    """Returns the results of up to `THREADS` calls at a time, in order; the first error ends it.

    Nothing waits for the threads then, nor after Ctrl-C: they may hang as long as a request may take.
    """
    if len(items) < 2:
        return [function(item) for item in items]
    left, answers = deque(enumerate(items)), queue.SimpleQueue[Any]()

    def work() -> None:
        while left:
            try:
                i, item = left.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                answers.put((i, function(item), None))
            except BaseException as error:
                answers.put((i, None, error))

    for _ in range(min(THREADS, len(items))):
        Thread(target=work, daemon=True).start()
    found: dict[int, Any] = {}
    try:
        for _ in items:
            i, result, error = answers.get()
            if error is not None:
                raise error
            found[i] = result
    finally:
        left.clear()
    return [found[i] for i in range(len(items))]


class RemoteMissing(BadInput):
    """A remote file or folder that does not exist, or that this user may not read."""


def request(address: Address, call: Callable[[], Result]) -> Result:
    """Returns what a request gives, repeated as often as the policy allows.

    Raises:
        RemoteMissing: There is no such file, or no permission to read it.
        BadInput: It fails for ever, or as often as it was tried.
    """
    began, pause = time.monotonic(), POLICY.first_pause
    for attempt in itertools.count(1):
        try:
            return _in_time(call)
        except Exception as error:
            reason = _reason(address, error)
            if _is_final(error):
                missing = isinstance(error, FileNotFoundError | PermissionError) or _status(error)
                raise (RemoteMissing if missing else BadInput)(f"{address}: {reason}") from None
            if attempt == POLICY.attempts:
                tried = f"{attempt} attempts in {time.monotonic() - began:.0f} seconds"
                raise BadInput(
                    f"{address}: {reason}; gave up after {tried}: check the address and the network, then "
                    "run it again (a training run with --resume)"
                ) from None
        REPEATED.add(1, f"{address}: {reason}")
        time.sleep(pause * (1 + _JITTER.random()) / 2)
        pause *= 2
    raise AssertionError


_JITTER = random.Random()


def _in_time(call: Callable[[], Result]) -> Result:
    """Returns what `call` returns; a call that outlasts the limit is abandoned in its thread."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    Thread(target=run, daemon=True).start()
    try:
        result, error = answers.get(timeout=POLICY.seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def _status(error: BaseException) -> int | None:
    """Returns the status of a HTTP answer that a repetition would not change, else None."""
    status = getattr(error, "status", None)
    final = isinstance(status, int) and 400 <= status < 500 and status not in _STATUS_RETRIED
    return status if final else None


def _is_final(error: BaseException) -> bool:
    return isinstance(error, _NEVER_RETRIED) or bool(_status(error)) or "Credentials" in type(error).__name__


def _reason(address: Address, error: BaseException) -> str:
    """Returns what is wrong, in one line without addresses and secrets."""
    if isinstance(error, TimeoutError):
        return f"no answer within {POLICY.seconds:g} seconds"
    if isinstance(error, ImportError):
        package = _PACKAGES.get(address.scheme)
        return f"reading {address.scheme}:// needs a package: " + (
            f"pip install {package}" if package else _scrubbed(address, error)
        )
    if isinstance(status := getattr(error, "status", None), int):
        hint = "; check the credentials" if status in (401, 403) else ""
        return f"the server answers {status} {printable(str(getattr(error, 'message', '')))[:80]}{hint}"
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, PermissionError):
        return f"no permission to read it ({_scrubbed(address, error)}); check the credentials"
    return _scrubbed(address, error)


def _scrubbed(address: Address, error: BaseException) -> str:
    text = re.sub(r"\w+://\S+", "...", " ".join(str(error).split()))
    for secret in address.secrets:
        text = text.replace(secret, "***")
    return printable(text[:200]) or type(error).__name__
