"""The resumable state: everything that a run needs to continue as if it had never stopped.

    state/step-00001200.pt   the newest
    state/step-00001100.pt   the one before, in case the newest does not load

One file holds whole tensors, so it serves one process, DDP and FSDP2 alike and the number of processes may
change. It holds plain dicts, lists, numbers, strings and tensors and is read with `weights_only`, so loading
a state runs no code from it. It stores neither random states nor the loader's position: both follow from the
number of samples consumed (see `train_step`). It ends with the SHA-256 of its content, so changed bytes are
noticed.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coma.atomic_io import Descriptor, Sealed, seal_holds, sync, write_whole
from coma.errors import BadInput

FORMAT_VERSION = 1

_NAME = re.compile(r"step-(\d+)\.pt")


def write_state(folder: Path, state: dict[str, Any], keep: int | None) -> None:
    """Writes `state` as the newest file, then removes all older ones except that of step `keep`.

    If the disk is full, they are removed first, and the state is written again.

    Raises:
        OSError: the disk is still full; the state of step `keep` is still there.
    """
    step = state["step"]
    state = {"format_version": FORMAT_VERSION, "sealed": True, **state}

    def write(file: Descriptor) -> None:
        sealed = Sealed(file)
        torch.save(state, sealed)  # type: ignore[arg-type] # all that it needs is `write`
        sealed.seal()

    def remove_others() -> None:
        for other, path in _states(folder):
            if other not in (step, keep) and path.is_file():
                path.unlink()

    path = folder / f"step-{step:06d}.pt"
    try:
        write_whole(path, write)
    except OSError as error:
        if keep is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remove_others()
        write_whole(path, write)
    remove_others()
    for half in folder.glob(".step-*.part"):  # of a process that was killed while it wrote
        half.unlink(missing_ok=True)
    sync(folder)


def read_state(folder: Path, warn: Callable[[str], object]) -> dict[str, Any] | None:
    """Returns the newest state that loads, with tensors on the CPU; None where none was ever saved.

    Args:
        folder: `run/state`.
        warn: Receives a message for every state that does not load.

    Raises:
        BadInput: there are states, and none of them loads.
    """
    states = _states(folder)
    for _, path in reversed(states):
        try:
            state = _load(path)
        except Exception as error:
            reason = str(error).partition("\n")[0] or (
                type(error).__name__ if path.stat().st_size else "the file is empty"
            )
            warn(f"{path}: this state does not load ({reason}); trying the previous one")
            continue
        if not state.pop("sealed", False):
            warn(f"{path}: has no checksum (an older version wrote it): damage goes unnoticed")
        return state
    if states:
        raise BadInput(
            f"{folder}: none of the saved states loads; remove the folder to start again from step 0"
        )
    return None


def count_states(folder: Path) -> int:
    """Returns the number of states that are saved in `run/state`."""
    return len(_states(folder))


def has_state(folder: Path) -> bool:
    """Returns whether a state was ever saved in `run/state`."""
    return bool(_states(folder))


def _load(path: Path) -> dict[str, Any]:
    holds = seal_holds(path)
    if holds is False:
        raise ValueError("its checksum does not match, so the file is damaged")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "format_version" not in state:
        raise ValueError("not a training state")
    if state["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format {state['format_version']}, known here: {FORMAT_VERSION}")
    if state.get("sealed") and holds is None:
        raise ValueError("its checksum is missing, so the file is damaged")
    return state


def _states(folder: Path) -> list[tuple[int, Path]]:
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match)
