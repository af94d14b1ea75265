"""Does NVIDIA's parser and compiler take this graph? Asked of TensorRT-RTX, which builds without a GPU."""

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
    "TensorRT-RTX parsed and compiled this graph for RTX cards, without a GPU. It is another product than "
    "TensorRT, with another set of operators: that says nothing of results, of speed, or of other GPUs."
)

NO_PLUGINS = (
    "That proves nothing: without a GPU no plugin can be made, and some operators (RoiAlign) are plugins."
)


SILENCE = 900
"""Seconds without progress after which a compilation counts as hanging."""


@dataclass(frozen=True)
class RtxReport:
    """That TensorRT-RTX took a graph.

    Attributes:
        version: Of TensorRT-RTX.
        seconds: That parsing and compiling took.
        engine_bytes: Size of the engine, which is not kept.
        layers: Of the parsed network.
        proves: What this proves, and what not; to be printed with it.
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
    """Compile `onnx_path` with TensorRT-RTX, in a process of its own: some graphs crash its compiler.

    Raises:
        BadInput: TensorRT-RTX is not installed, or the profiles do not fit the file.
        CheckFailed: it does not take the graph, or died of it.
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
    except (EOFError, OSError, UnpicklingError):  # it died, perhaps in the middle of a word
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
    """Returns what the child says next.

    Raises:
        CheckFailed: it says nothing for too long.
        EOFError: it has ended.
    """
    if not receiver.poll(SILENCE):
        raise CheckFailed(
            f"{onnx_path}: the compiler of TensorRT-RTX made no progress for {SILENCE / 60:.0f} minutes "
            "and was ended"
        )
    return receiver.recv()


def _check(
    sender: Connection, onnx_path: Path, profiles: tuple[Profile, ...], options: EngineOptions
) -> None:
    """In the child: progress as tuples, then the report or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends this process
    told = time.monotonic()

    def tell(phase: str, done: int, steps: int) -> None:
        nonlocal told
        if time.monotonic() - told > 0.1:
            told = time.monotonic()
            sender.send((phase, done, steps))

    try:
        library = load_library("tensorrt_rtx")
        plan = compile_plan(library, onnx_path, profiles, options, tell)
        sender.send(RtxReport(library.version, round(plan.seconds, 1), plan.data.nbytes, plan.layers))
    except ComaError as error:
        sender.send(error)
    except Exception as error:
        sender.send(CheckFailed(f"{onnx_path}: TensorRT-RTX failed: {first_line(error)}"))
