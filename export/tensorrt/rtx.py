"""Checks a graph with the parser and compiler of TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import multiprocessing
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from coma.errors import CheckFailed, ComaError
from coma.library_errors import first_line
from coma.runtimes.tensorrt.callbacks import Progress
from coma.runtimes.tensorrt.discovery import find_driver, load_library, require_package
from coma.runtimes.tensorrt.profiles import Profile
from coma.runtimes.tensorrt.sidecar import EngineOptions
from export.tensorrt.builder import compile_plan

PROVES = (
    "TensorRT-RTX parsed and compiled this graph for RTX cards, without a GPU. TensorRT is another product "
    "with other operators; this check does not cover its support, nor results, speed or other GPUs."
)

NO_PLUGINS = (
    "This is inconclusive: without a GPU no plugin can be created, and some operators (RoiAlign) are plugins."
)


SILENCE = 900
"""Seconds without progress after which a compilation is stopped."""


@dataclass(frozen=True)
class RtxReport:
    """Result of a check that passed.

    Attributes:
        version: Version of TensorRT-RTX.
        seconds: Time for parsing and compiling.
        engine_bytes: Size of the engine, which is not kept.
        layers: Number of layers of the parsed network.
        proves: What the check covers and what not; printed with the result.
    """

    version: str
    seconds: float
    engine_bytes: int
    layers: int
    proves: str = PROVES


def check_rtx(
    onnx_path: Path,
    profiles: tuple[Profile, ...],
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> RtxReport:
    """Compiles `onnx_path` with TensorRT-RTX in a separate process, because some graphs crash its compiler.

    Raises:
        BadInput: TensorRT-RTX is not installed, or the profiles do not fit the file.
        CheckFailed: it refuses the graph or crashes.
    """
    require_package("tensorrt_rtx")
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    child = spawn.Process(
        target=_check, args=(sender, onnx_path, profiles, options or EngineOptions()), daemon=True
    )
    child.start()
    sender.close()
    try:
        while isinstance(answer := _receive(receiver, onnx_path), tuple):
            if progress is not None:
                progress(*answer)
    except (EOFError, OSError, UnpicklingError):  # it crashed, perhaps within a message
        child.join()
        code = child.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise CheckFailed(
            f"{onnx_path}: the compiler of TensorRT-RTX crashed on this graph (its process {how})"
        ) from None
    finally:
        child.kill()
        child.join()
        receiver.close()
    if isinstance(answer, CheckFailed) and "plugin" in str(answer) and find_driver() is None:
        raise CheckFailed(f"{answer} {NO_PLUGINS}")
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _receive(receiver: Connection, onnx_path: Path) -> Any:
    """Returns the next message of the child process.

    Raises:
        CheckFailed: there was no message for too long.
        EOFError: the child process has ended.
    """
    if not receiver.poll(SILENCE):
        raise CheckFailed(
            f"{onnx_path}: the compiler of TensorRT-RTX made no progress for {SILENCE / 60:.0f} minutes "
            "and was stopped"
        )
    return receiver.recv()


def _check(
    sender: Connection, onnx_path: Path, profiles: tuple[Profile, ...], options: EngineOptions
) -> None:
    """Runs in the child process: sends progress as tuples, then the report or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops this process
    sent = time.monotonic()

    def send_progress(phase: str, done: int, steps: int) -> None:
        nonlocal sent
        if time.monotonic() - sent > 0.1:
            sent = time.monotonic()
            sender.send((phase, done, steps))

    try:
        library = load_library("tensorrt_rtx")
        plan = compile_plan(library, onnx_path, profiles, options, send_progress)
        sender.send(RtxReport(library.version, round(plan.seconds, 1), plan.data.nbytes, plan.layers))
    except ComaError as error:
        sender.send(error)
    except Exception as error:
        sender.send(CheckFailed(f"{onnx_path}: TensorRT-RTX failed: {first_line(error)}"))
