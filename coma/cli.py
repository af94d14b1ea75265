"""`coma COMMAND ...`: finds the commands, runs one, turns errors into exit codes.

Rooms announce their commands as entry points of the group `coma.commands`, so nothing here names a room.
`coma --help` reads the first line of each command's module without running it: no torch, a few hundredths
of a second. Exit codes: 0 done, 1 failed check, 2 bad input, 130 interrupted. A user's error is one line on
stderr; `coma --traceback COMMAND ...` shows where it came from. A fault of ours is one line as well, with the
name of the file that its traceback was written to. Logging is set up here and nowhere else.
"""

from __future__ import annotations

import ast
import difflib
import errno
import importlib.util
import io
import logging
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import TextIO

import coma
from coma.errors import ComaError, Interrupted, is_out_of_gpu_memory
from coma.rooms import DISTRIBUTION, entry_points, load

GROUP = "coma.commands"
"""Entry points of the commands; one may name extras that it needs: `demo = "demo.commands:run [demo]"`."""

CHILD = (sys.executable, "-P", "-m", "coma")
"""Starts `coma` as a child process; -P, so that no file of the current folder takes the place of ours."""

SPINS = "1000"
"""Turns that a waiting thread of GNU OpenMP makes before it sleeps: libgomp's own value where threads
outnumber cores. Its default is 300,000: milliseconds that other processes lack."""

BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell reports for a program that writes to a closed pipe

OUTSIDE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS}
"""Errors of the machine: full or failing disks, missing permissions."""

PATHS = {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors of a path: it is missing, exists already, or is no folder."""

USAGE = """usage: coma [--traceback] COMMAND ...
       coma COMMAND --help
       coma --version

{about}

commands:
{commands}

  --traceback  print the full traceback on errors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `coma` with these arguments (default: the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ["PYTHONSAFEPATH"] = "1"  # worker processes: no file of the current folder is imported there
    if "OMP_WAIT_POLICY" not in os.environ:  # libgomp reads both when torch loads it
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    _print_all_names()
    show_traceback = arguments[:1] == ["--traceback"]
    try:
        code = _dispatch(arguments[show_traceback:])
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # tyro, on --help and on arguments that do not fit
        return (
            stop.code if isinstance(stop.code, int) else 0 if stop.code is None else _fail(str(stop.code), 1)
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered has nowhere to go
        return BROKEN_PIPE
    except (ComaError, KeyboardInterrupt) as error:
        if show_traceback:
            traceback.print_exc()
        if isinstance(error, Interrupted | KeyboardInterrupt):
            sys.stderr.write(f"{str(error) or 'interrupted'}\n")  # as asked: not an error
            return Interrupted.exit_code
        return _fail(str(error), error.exit_code)
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    """Report an error that nobody raised on purpose: of the machine, of a path, or a fault of ours."""
    text = str(error)
    if is_out_of_gpu_memory(error):
        what = text.partition(" Of the allocated memory")[0].partition("\n")[0]
        way_out = "Try a smaller --batch-size or --micro-batch, end what else runs there, or --device cpu"
        return _fail(f"{what.rstrip('.')}. {way_out}", 2)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return _fail("not enough memory; try a smaller --batch-size, --image-size or model", 2)
    if isinstance(error, OSError) and error.errno in OUTSIDE:
        return _fail(f"{error.filename or 'output'}: {error.strerror}", 1)
    if isinstance(error, OSError) and error.errno in PATHS and error.filename is not None:
        return _fail(f"{error.filename}: {error.strerror}", 2)
    summary = f"{type(error).__name__}: {text}".partition("\n")[0]
    try:
        number, path = tempfile.mkstemp(prefix="coma-traceback-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exc(file=file)
    except OSError:  # no disk takes it, so the terminal has to
        traceback.print_exc()
        path = "the traceback above"
    return _fail(f"this is a fault of coma ({summary}); please report it with {path}", 1)


def _print_all_names() -> None:
    """Lets names of files that are not UTF-8 be printed as escapes, where they would end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _dispatch(arguments: list[str]) -> int:
    commands = find_commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        usage = USAGE.format(about=coma.__doc__, commands=_listing(commands))
        (sys.stdout if arguments else sys.stderr).write(usage)
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        sys.stdout.write(_versions() + "\n")
        return 0
    if not commands:
        return _fail(f"{DISTRIBUTION} is not installed, so it has no commands; run: pip install -e .", 2)
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(commands)}"
        return _fail(f"no command {name!r}; {hint}", 2)
    command = commands[name]
    _configure_logging(command.module.partition(".")[0])
    try:
        load(command)(rest)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", *(each.module.partition(".")[0] for each in commands.values())):
            raise  # not a missing package: a fault of ours
        return _fail(f"coma {name} needs {package}; install it with: {_install(package, command.extras)}", 2)
    return 0


def _install(package: str, extras: Sequence[str]) -> str:
    """Returns the command that installs a package that is missing."""
    offered = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    own = [extra for extra in offered if extra.partition("-")[0] == package][:1]  # onnxruntime, mmcv-lite
    names = ",".join([*extras, *(extra for extra in own if extra not in extras)])
    return f"pip install '{DISTRIBUTION}[{names}]'" if names else f"pip install {DISTRIBUTION}"


def find_commands() -> dict[str, metadata.EntryPoint]:
    """Returns the commands of all installed rooms by name, in alphabetical order."""
    return entry_points(GROUP)


def help_line(module: str) -> str:
    """First line of a module's docstring, read from its source: neither it nor its imports are run."""
    try:
        spec = importlib.util.find_spec(module)
        source = spec.loader.get_source(module) if spec and spec.loader else None  # type: ignore[attr-defined]
    except ImportError:
        source = None
    if source is None:
        return "(not installed)"
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _listing(commands: dict[str, metadata.EntryPoint]) -> str:
    width = max(map(len, commands), default=0)
    return "\n".join(f"  {name:{width}}  {help_line(entry.module)}" for name, entry in commands.items())


def _versions() -> str:
    ours, torch, timm = (metadata.version(name) for name in (DISTRIBUTION, "torch", "timm"))
    return f"{DISTRIBUTION} {ours} (torch {torch}, timm {timm}, Python {platform.python_version()})"


def _configure_logging(room: str) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[_CurrentStderr()])
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _CurrentStderr):
            handler.said.clear()
    main = os.environ.get("RANK", "0") == "0"  # torchrun sets it; the first process speaks for all
    for name in {"coma", "pretrain", room}:
        logging.getLogger(name).setLevel(logging.INFO if main else logging.WARNING)


class _CurrentStderr(logging.StreamHandler):
    """Writes to what is `sys.stderr` at the time: a progress bar puts itself there while it is shown.

    Lines of level WARNING and above begin with their level. A line that is logged with `extra={"once": True}`
    is written once in a command, however often it comes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line: `warning: MESSAGE`, or the message alone."""
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, unless it came before and was not to come again."""
        if getattr(record, "once", False):
            text = record.getMessage()
            if text in self.said:
                return
            self.said.add(text)
        super().emit(record)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Fixed; the base class sets it once."""


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code
