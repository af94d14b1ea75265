"""Small comparisons whose runs start at once."""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coma import cli
from pretrain.commands.compare import entry
from pretrain.sweep import CompareConfig, process_pool

SMALL = shlex.split(
    "--model.dim 8 --model.depths 1 1 1 1 --model.heads 2 2 2 2 --image-size 16 --batch-size 4 --log-steps 2 "
    "--objective.decoder.dim 8 --objective.decoder.depth 1 --objective.decoder.heads 2"
)


class Forked:
    """In place of subprocess.Popen: a process that need not import torch again."""

    def __init__(
        self, command: list[str], *, stdout: Any, env: dict[str, str], pass_fds: tuple[int, ...], **_: Any
    ):
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self.code: int | None = None
        if self.pid:
            return
        code = 70
        try:
            os.setsid()
            for number in (1, 2):
                os.dup2(stdout.fileno(), number)
            for handle in set(range(3, 1000)) - set(pass_fds):
                with suppress(OSError):
                    os.close(handle)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.environ |= env
            torch.set_num_threads(1)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            code = cli.main(command[len(cli.CHILD) :])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout: float = math.inf) -> None:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a run", timeout)
            time.sleep(0.01)


def light(patch: pytest.MonkeyPatch) -> None:
    """Processes that start at once, and no pictures of runs."""
    patch.setattr(process_pool, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Forked}))
    patch.setattr(process_pool, "_POLL", 0.01)
    patch.setattr("pretrain.training.throughput.flops_per_image", lambda _: 1e6)  # autograd, then no forks
    for name in ("loss_curve", "reconstruction_sheet"):
        patch.setattr(f"pretrain.training.run_directory.{name}", lambda *_, **__: None)


def asked(labelled: Path, out: Path, **changes: Any) -> CompareConfig:
    """Two methods, a backbone, two seeds, six steps."""
    found = [entry(labelled / "train", name, "small: tiny", SMALL, (0, 1)) for name in ("mae", "coma")]
    comparison = CompareConfig(
        images=labelled / "train",
        test=labelled,
        budget=("images", 24),
        entries=tuple(found),
        protocols=("knn", "linear"),
        out=out,
        reference="mae",
        device="cpu",
        jobs=2,
        probes=2,
    )
    return replace(comparison, **changes)
