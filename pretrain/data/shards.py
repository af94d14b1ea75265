"""WebDataset shards (`.tar`), read at random: exact shuffling and exact resume, which a stream cannot give.

The headers of every shard are walked once and the place of each image is kept. Members that share
everything up to the first dot of their base name are one sample: one image (the first, if there are
more), and its label in `.cls` (an integer in text) or in the field "label" of `.json`.

`index.json`, which `coma pack` writes beside its shards, adds the class names.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pretrain.data.images import EXTENSIONS
from pretrain.data.source import EncodedSource, Names, printable, read_at
from pretrain.data.workers import in_workers
from pretrain.errors import BadInput

INDEX = "index.json"
_BLOCK = tarfile.BLOCKSIZE
_WORTH_WORKERS = 8 << 30  # bytes of shards above which their headers are walked in parallel


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Sample:
    """An image in a shard, with its label if it has one."""

    image: Member
    label: int | None


class ShardSource(EncodedSource):
    """The images of one or more shards, in the order they are stored."""

    def __init__(self, location: Path, shards: Sequence[Path]) -> None:
        """Index the shards.

        Raises:
            BadInput: a shard that is damaged, compressed or missing, or no image in any of them.
        """
        size = 0
        for shard in shards:
            if not shard.is_file():
                raise BadInput(f"{shard}: this shard is missing")
            size += shard.stat().st_size
        samples = list(in_workers(index_shard, shards, None if size > _WORTH_WORKERS else 0))
        counts = [len(each) for each in samples]
        if not sum(counts):
            looked = f"looked for {' '.join(EXTENSIONS)}"
            raise BadInput(f"{location}: no image in {len(shards)} shard(s) ({looked})")
        flat = [sample for each in samples for sample in each]
        labels = [sample.label for sample in flat if sample.label is not None]
        names = _class_names(shards[0].parent / INDEX)
        if labels and names and not 0 <= min(labels) <= max(labels) < len(names):
            found = f"labels run from {min(labels)} to {max(labels)}"
            raise BadInput(f"{location}: {found}, but {INDEX} names {len(names)} classes")
        super().__init__(location, np.array(labels) if len(labels) == len(flat) else None, names)
        self._shards = [str(shard) for shard in shards]
        self._shard = torch.from_numpy(np.repeat(np.arange(len(shards), dtype=np.int32), counts))
        self._places = torch.tensor([(sample.image.start, sample.image.size) for sample in flat])
        self._names = Names(sample.image.name for sample in flat)

    def __len__(self) -> int:
        """Number of samples that have an image."""
        return len(self._shard)

    def describe(self, i: int) -> str:
        """The shard and the image's name in it."""
        return printable(f"{self._shards[int(self._shard[i])]}[{self._names[i]}]")

    def listing(self) -> tuple[list[str], list[int]]:
        """Names as `shard.tar/member`, and sizes."""
        shards = [os.path.basename(shard) for shard in self._shards]
        names = [f"{shards[k]}/{name}" for k, name in zip(self._shard.tolist(), self._names, strict=True)]
        return names, self._places[:, 1].tolist()

    def encoded(self, i: int) -> bytes:
        """The image's file content."""
        start, size = self._places[i].tolist()
        return read_at(self._shards[int(self._shard[i])], start, size, self.describe(i))


def index_shard(path: Path) -> list[Sample]:
    """The samples of a shard, in their order.

    Raises:
        BadInput: not a tar, compressed, truncated, or a label that is not an integer.
    """
    samples: list[Sample] = []
    with open(path, "rb", buffering=0) as shard:
        group: list[Member] = []
        for member in _members(path, shard.fileno()):
            if group and _key(member.name) != _key(group[0].name):
                samples.extend(_sample(path, shard.fileno(), group))
                group = []
            group.append(member)
        samples.extend(_sample(path, shard.fileno(), group))
    return samples


def _members(path: Path, file: int) -> Iterator[Member]:
    """Walk the headers (POSIX.1-2001 ustar and pax, GNU long names): three times as fast as `tarfile`."""
    length, at = os.fstat(file).st_size, 0
    longer: dict[str, str] = {}
    while at < length:
        block = os.pread(file, _BLOCK, at)
        if block == tarfile.NUL * _BLOCK:
            return
        try:
            name, kind, size = _header(block)
        except ValueError:
            raise BadInput(f"{path}: {_not_a_tar(block, at)}") from None
        start = at + _BLOCK
        size = int(longer.get("size", size))
        at = start + -(-size // _BLOCK) * _BLOCK
        if start + size > length:
            raise BadInput(f"{path}: truncated in the middle of {printable(name)}")
        if kind == tarfile.XHDTYPE:
            longer |= _pax(os.pread(file, size, start))
        elif kind == tarfile.GNUTYPE_LONGNAME:
            longer["path"] = os.fsdecode(os.pread(file, size, start).rstrip(b"\0"))
        elif kind not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            if kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                yield Member(longer.get("path", name), start, size)
            longer = {}


def _header(block: bytes) -> tuple[str, bytes, int]:
    """Name, type and size in a header block (POSIX.1-2001, pax, "ustar Interchange Format").

    Raises:
        ValueError: its checksum is wrong, or it is not a header at all.
    """
    checksum = int(block[148:156].rstrip(b"\0 ") or b"-1", 8)
    if len(block) < _BLOCK or sum(block) - sum(block[148:156]) + 8 * ord(" ") != checksum:
        raise ValueError("checksum")
    name, size, kind = block[:100].partition(b"\0")[0], block[124:136], block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    large = size[0] == 0x80  # GNU: sizes from 8 GiB on are written in base 256
    return os.fsdecode(name), kind, int.from_bytes(size[1:]) if large else int(size.rstrip(b"\0 ") or b"0", 8)


def _pax(records: bytes) -> dict[str, str]:
    """Records `length key=value newline` of a pax header (POSIX.1-2001, pax, "pax Extended Header")."""
    found = {}
    while records and records[0]:
        length = int(records.partition(b" ")[0])
        key, _, value = records[:length].partition(b" ")[2].partition(b"=")
        found[key.decode()] = os.fsdecode(value.removesuffix(b"\n"))
        records = records[length:]
    return found


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _suffix(name: str) -> str:
    return "." + name.rpartition("/")[2].partition(".")[2].lower()


def _sample(path: Path, file: int, group: list[Member]) -> list[Sample]:
    images = [member for member in group if _suffix(member.name) in EXTENSIONS]
    if not images or images[0].name.rpartition("/")[2].startswith("."):
        return []
    label = None
    for member in group:
        if _suffix(member.name) in (".cls", ".json") and label is None:
            label = _label(path, member, os.pread(file, member.size, member.start))
    return [Sample(images[0], label)]


def _label(path: Path, member: Member, text: bytes) -> int | None:
    try:
        if member.name.lower().endswith(".cls"):
            return int(text)
        fields = json.loads(text)
        label = fields.get("label") if isinstance(fields, dict) else None
        return None if label is None else int(label)
    except (ValueError, TypeError):
        raise BadInput(f"{path}: the label in {printable(member.name)} is not an integer") from None


def _class_names(index: Path) -> tuple[str, ...] | None:
    try:
        fields = json.loads(index.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadInput(f"{index}: not a readable index ({error})") from None
    if not isinstance(fields, dict):
        return None
    if fields.get("finished") is False:
        raise BadInput(f"{index.parent}: this pack is unfinished; run the same `coma pack` again")
    names = fields.get("class_names")
    return tuple(map(str, names)) if isinstance(names, list) else None


def _not_a_tar(block: bytes, at: int) -> str:
    if block.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "compressed shards cannot be read at random; unpack it to a plain .tar"
    return "not a tar file" if at == 0 else f"damaged at byte {at}"
