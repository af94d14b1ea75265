"""Saves artifacts atomically: a kill at any moment leaves one that loads.

The new directory is written beside the old one and synced; the old one is renamed to `.NAME.previous`, the
new one to `NAME`, then the old one is removed. Loading looks for `.NAME.previous` when there is no `NAME`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from coma.artifact.schema import CONFIG, TENSORS, with_checksums
from coma.atomic_io import sync
from coma.config.artifact import ArtifactConfig
from coma.config.serialization import to_plain
from coma.errors import BadArtifact


def save_artifact(directory: Path, *, tensors: Mapping[str, Tensor], config: ArtifactConfig) -> None:
    """Write an artifact, replacing the one that is there; whenever this is killed, one of the two loads.

    Tensors may be on any device, shared or non-contiguous. Other files inside the old artifact are kept.

    Raises:
        BadArtifact: `directory` holds something else than an artifact.
        OSError: the disk is full or not writable; the old artifact is untouched.
    """
    directory = Path(os.path.realpath(directory))  # beside what a link points to, not beside the link
    _restore(directory)
    if directory.exists() and not _replaceable(directory):
        raise BadArtifact(f"{directory}: holds other things than an artifact; give another directory")
    partial, previous = sibling(directory, "partial"), sibling(directory, "previous")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        _write(partial, tensors, config)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if directory.exists():
        directory.rename(previous)
    partial.rename(directory)  # killed before this line: loading finds `previous`
    sync(directory.parent)
    _restore(directory)


def _write(partial: Path, tensors: Mapping[str, Tensor], config: ArtifactConfig) -> None:
    plain = to_plain(config)
    json.dumps(plain, allow_nan=False)  # refused before anything large is written
    facts = {"format": "pt", "format_version": str(config.format_version), "kind": config.kind}
    try:
        save_file(_own_storage(tensors), partial / TENSORS, metadata=facts)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, str(error), str(partial / TENSORS)) from error
    _sort_metadata(partial / TENSORS)
    text = json.dumps(with_checksums(plain, partial / TENSORS), indent=2) + "\n"
    (partial / CONFIG).write_text(text, encoding="utf-8")
    (partial / TENSORS).chmod((partial / CONFIG).stat().st_mode)  # safetensors lets only the owner read
    for path in (partial / CONFIG, partial / TENSORS, partial):
        sync(path)


def _sort_metadata(path: Path) -> None:
    """Gives the metadata of a safetensors file, whose order safetensors leaves to chance, one order.

    Equal artifacts are equal files then. The header keeps its length; the format allows spaces at its end.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the same values on the CPU, contiguous, no two in one storage: what safetensors can write."""
    taken: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    return own


def sibling(directory: Path, role: str) -> Path:
    """Returns where a replacement keeps the new artifact (`partial`) and the old one (`previous`)."""
    real = Path(os.path.realpath(directory))
    return real.with_name(f".{real.name}.{role}")


def _replaceable(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    held = {entry.name for entry in directory.iterdir()}
    return not held or {CONFIG, TENSORS} <= held


def _restore(directory: Path) -> None:
    """Undo or finish a replacement that was cut short."""
    previous = sibling(directory, "previous")
    if not previous.exists():
        return
    if not directory.exists():
        previous.rename(directory)
        return
    for entry in list(previous.iterdir()):
        if entry.name in (CONFIG, TENSORS):
            entry.unlink()
        else:
            entry.rename(directory / entry.name)
    previous.rmdir()
