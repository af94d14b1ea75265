"""Exceptions of this toolkit, as a small tree.

    ComaError                exit code 1
    ├── BadInput             exit code 2: something the user passed in; the message names it and the fix
    │   ├── BadImage         a file that will not decode, or has the wrong channels
    │   └── BadArtifact      a directory that is not an artifact, or one of another model
    ├── CheckFailed          exit code 1: a gate said no (non-finite loss, failed verification)
    └── Interrupted          exit code 130: Ctrl-C or SIGTERM, after everything was saved

Only `coma.cli` turns these into exit codes; library code raises them and never exits.
"""

from __future__ import annotations

import sys


class ComaError(Exception):
    """Base of every error this toolkit raises on purpose."""

    exit_code = 1


class BadInput(ComaError):
    """Something the user passed in cannot be used; the message names it and says what to do."""

    exit_code = 2


class BadImage(BadInput):
    """A file that will not decode as an image, or whose channels do not fit."""


class BadArtifact(BadInput):
    """A directory that is not an artifact, is damaged, or belongs to another model."""


class CheckFailed(ComaError):
    """A check on results failed: a non-finite loss, a verification gate."""


class Interrupted(ComaError):
    """The user asked to stop; the state was saved before this was raised."""

    exit_code = 130


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Returns whether a GPU's memory did not suffice: for torch itself, cuBLAS or cuDNN, or the driver.

    The latter two raise a RuntimeError that only its text tells from others.
    """
    if isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ())):
        return True
    signs = ("_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
