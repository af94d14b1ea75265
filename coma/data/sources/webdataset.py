"""WebDataset shards (`.tar`) with random access, for exact shuffling and exact resume.

Opening a shard reads the headers of all its members and keeps the place of each image. Members whose names
are equal up to the first dot of the base name form one sample: an image and its label, in `.cls` (an integer
as text) or in the field "label" of `.json`. If a sample has an image with a plain name (`7.jpg`), images with
a word after the first dot (`7.mask.png`) are other fields of the sample and are skipped. Dots that belong to
the name (`IMG_2024.05.01.jpg`) give images of their own, with the label in `IMG_2024.05.01.cls`. Links to
members of the same shard are followed.

`index.json`, which `coma pack` writes beside its shards, adds the class names.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from coma.data.decode import EXTENSIONS, HEAD
from coma.data.inventory import NO_EXTENSION, Inventory, is_system_folder
from coma.data.sources.base import EncodedSource, Names, read_at
from coma.data.worker_pool import map_ordered
from coma.errors import BadInput
from coma.messages import counted, printable

INDEX = "index.json"
_BLOCK = tarfile.BLOCKSIZE
_WITHOUT_CONTENT = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE),
    *(tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
)
_PARALLEL_FROM = 8 << 30  # total bytes of shards from which headers are read in worker processes


class Member(NamedTuple):
    """A regular file in a tar, or a link to one."""

    name: str
    start: int
    size: int
    link: str | None = None
    """Name of the linked member."""


@dataclass(frozen=True)
class Sample:
    """An image in a shard, and its label."""

    image: Member
    label: int | None
    fault: str = ""
    """Error message of a label that cannot be read; empty where the label is readable."""


class ShardSource(EncodedSource):
    """The images of one or more shards, in stored order."""

    def __init__(self, location: Path, shards: Sequence[Path]) -> None:
        """Reads the headers of the shards.

        Raises:
            BadInput: A shard is damaged, compressed or missing, or no shard has an image.
        """
        size = 0
        for shard in shards:
            if not shard.is_file():
                raise BadInput(f"{shard}: this shard is missing")
            size += shard.stat().st_size
        samples, inventory = [], Inventory()
        for each, skipped in map_ordered(index_shard, shards, None if size > _PARALLEL_FROM else 0):
            samples.append(each)
            inventory.merge(skipped)
        counts = [len(each) for each in samples]
        if not sum(counts):
            holds = f"; it holds {inventory.skipped()}" if inventory.skipped() else ""
            looked = f"looked for {' '.join(EXTENSIONS)}"
            raise BadInput(f"{location}: no image in {counted(len(shards), 'shard')} ({looked}){holds}")
        flat = [sample for each in samples for sample in each]
        labels = [sample.label for sample in flat if sample.label is not None]
        names = _class_names(shards[0].parent / INDEX)
        if labels and names and not 0 <= min(labels) <= max(labels) < len(names):
            found = f"labels run from {min(labels)} to {max(labels)}"
            raise BadInput(f"{location}: {found}, but {INDEX} names {len(names)} classes")
        super().__init__(location, np.array(labels) if len(labels) == len(flat) else None, names)
        self.inventory = inventory
        self._shards = [str(shard) for shard in shards]
        self._shard = torch.from_numpy(np.repeat(np.arange(len(shards), dtype=np.int32), counts))
        self._places = torch.tensor([(sample.image.start, sample.image.size) for sample in flat])
        self._names = Names(sample.image.name for sample in flat)
        self.unlabelled_reason = self._why_unlabelled(flat)

    def __len__(self) -> int:
        """Returns the number of samples that have an image."""
        return len(self._shard)

    def describe(self, i: int) -> str:
        """Returns the path of the shard and the name of the image in it."""
        return printable(f"{self._shards[int(self._shard[i])]}[{self._names[i]}]")

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns names as `shard.tar/member`, and sizes in bytes."""
        shards = [os.path.basename(shard) for shard in self._shards]
        names = [f"{shards[k]}/{name}" for k, name in zip(self._shard.tolist(), self._names, strict=True)]
        return names, self._places[:, 1].tolist()

    def read_bytes(self, i: int) -> bytes:
        """Returns the content of an image file."""
        start, size = self._places[i].tolist()
        return read_at(self._shards[int(self._shard[i])], start, size, self.describe(i))

    def _why_unlabelled(self, samples: Sequence[Sample]) -> str:
        """Names a sample without a usable label, if labels seem to be intended."""
        lacking = [i for i, sample in enumerate(samples) if sample.label is None]
        fault = next((samples[i].fault for i in lacking if samples[i].fault), "")
        if not fault and len(lacking) in (0, len(samples)):
            return ""
        what = fault or f"{self.describe(lacking[0])} has no label (a whole number in a .cls file)"
        more = f" (so {len(lacking)} of {len(samples)} samples have none)"
        return f"{what}{more}; add a label to every sample, or remove the samples without one"


def index_shard(path: Path) -> tuple[list[Sample], Inventory]:
    """Returns the samples of a shard, in stored order, and the inventory of its files.

    Raises:
        BadInput: The file is not a tar, or is compressed, truncated or damaged.
    """
    inventory = Inventory()
    with open(path, "rb", buffering=0) as shard:
        members = list(_members(path, shard.fileno(), inventory))
        if any(member.link is not None for member in members):
            members = _linked(path, members, inventory)
        groups = groupby((m for m in members if _is_shown(path, m.name, inventory)), lambda m: _key(m.name))
        samples = [
            sample for _, group in groups for sample in _samples(path, shard.fileno(), list(group), inventory)
        ]
    return samples, inventory


def _members(path: Path, file: int, inventory: Inventory) -> Iterator[Member]:
    """Reads all headers (POSIX.1-2001 ustar and pax, GNU long names), three times as fast as `tarfile`."""
    length, at = os.fstat(file).st_size, 0
    longer: dict[str, str] = {}
    while at < length:
        block = os.pread(file, _BLOCK, at)
        if block == tarfile.NUL * _BLOCK:
            return
        try:
            name, kind, size, link = _header(block)
        except ValueError:
            raise BadInput(f"{path}: {_not_a_tar(block, at)}") from None
        start = at + _BLOCK
        size = 0 if kind in _WITHOUT_CONTENT else int(longer.get("size", size))
        at = start + -(-size // _BLOCK) * _BLOCK
        if start + size > length:
            raise BadInput(f"{path}: truncated in the middle of {printable(name)}")
        if kind == tarfile.XHDTYPE:
            longer |= _pax(os.pread(file, size, start))
        elif kind == tarfile.GNUTYPE_LONGNAME:
            longer["path"] = os.fsdecode(os.pread(file, size, start).rstrip(b"\0"))
        elif kind == tarfile.GNUTYPE_LONGLINK:
            longer["linkpath"] = os.fsdecode(os.pread(file, size, start).rstrip(b"\0"))
        elif kind != tarfile.XGLTYPE:
            name, link = longer.get("path", name), longer.get("linkpath", link)
            if kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                yield Member(name, start, size)
            elif kind == tarfile.LNKTYPE:
                yield Member(name, start, size, link)
            elif kind == tarfile.SYMTYPE:
                yield Member(name, start, size, posixpath.join(posixpath.dirname(name), link))
            elif kind != tarfile.DIRTYPE:
                inventory.skip("special file", "special files", f"{path.name}[{name}]")
            longer = {}


def _linked(path: Path, members: list[Member], inventory: Inventory) -> list[Member]:
    """Returns the members, with links replaced by the files they lead to; other links are skipped."""
    by_name = {posixpath.normpath(member.name): member for member in members}
    found = []
    for member in members:
        target, seen = member, {member.name}
        while target.link is not None and target.link not in seen:
            seen.add(target.link)
            target = by_name.get(posixpath.normpath(target.link), target)
        if target.link is None:
            found.append(target._replace(name=member.name))
        else:
            name = f"{path.name}[{member.name}]"
            inventory.skip("link to no file of its shard", "links to no file of their shard", name)
    return found


def _is_shown(path: Path, name: str, inventory: Inventory) -> bool:
    """Returns whether a member is neither hidden nor in a system folder."""
    *folders, base = [part for part in name.split("/") if part not in ("", ".", "..")] or [name]
    if base.startswith(".") or any(folder.startswith(".") for folder in folders):
        inventory.skip_hidden(f"{path.name}[{name}]")
        return False
    if any(map(is_system_folder, folders)):
        inventory.skip_system_folder(f"{path.name}[{name}]")
        return False
    return True


def _header(block: bytes) -> tuple[str, bytes, int, str]:
    """Returns name, type, size and linked name of a header (POSIX.1-2001, pax, "ustar Interchange Format").

    Raises:
        ValueError: The block is not a header, or its checksum is wrong.
    """
    checksum = int(block[148:156].rstrip(b"\0 ") or b"-1", 8)
    if len(block) < _BLOCK or sum(block) - sum(block[148:156]) + 8 * ord(" ") != checksum:
        raise ValueError("checksum")
    name, size, kind = block[:100].partition(b"\0")[0], block[124:136], block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    large = size[0] == 0x80  # GNU: sizes of 8 GiB and more are in base 256
    length = int.from_bytes(size[1:]) if large else int(size.rstrip(b"\0 ") or b"0", 8)
    return os.fsdecode(name), kind, length, os.fsdecode(block[157:257].partition(b"\0")[0])


def _pax(records: bytes) -> dict[str, str]:
    """Returns the records `length key=value newline` of a POSIX.1-2001 "pax Extended Header"."""
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


def _samples(path: Path, file: int, group: list[Member], inventory: Inventory) -> list[Sample]:
    """Returns the images among members with one key, and their labels."""
    images, others = [], []
    for member in group:
        base = member.name.rpartition("/")[2]
        kind, is_image = inventory.identify(base, lambda _, at=member.start: os.pread(file, HEAD, at))
        (images if is_image else others).append((member, kind, base.partition(".")[2]))
    if not images:
        for _, kind, _ in others:
            inventory.unread[kind] += 1
        return []
    plain = [member for member, kind, rest in images if not rest or f".{rest.lower()}" == kind]
    samples = []
    for member, kind, rest in images:
        if plain and member is not plain[0] and not rest[:1].isdigit():
            name = f"{path.name}[{member.name}]"
            inventory.skip("further image of a sample", "further images of samples", name)
            continue
        inventory.images[kind] += 1
        stem = member.name if kind == NO_EXTENSION else member.name[: -len(kind)]
        samples.append(Sample(member, *_label(path, file, group, (stem, _key(member.name)))))
    return samples


def _label(path: Path, file: int, group: list[Member], stems: Iterable[str]) -> tuple[int | None, str]:
    """Returns the first label in the members of an image, and what is wrong if there is none."""
    fault = ""
    for stem in dict.fromkeys(stems):
        for member in group:
            if member.name.lower() in (f"{stem}.cls".lower(), f"{stem}.json".lower()):
                try:
                    label = _parsed_label(member, os.pread(file, member.size, member.start))
                except (ValueError, RecursionError):
                    fault = f"{path}: the label in {printable(member.name)} is not a whole number from 0"
                    continue
                if label is not None:
                    return label, ""
    return None, fault


def _parsed_label(member: Member, text: bytes) -> int | None:
    """Returns the label in a `.cls` or `.json` file; None if there is none.

    Raises:
        ValueError: The label is not a whole number from 0.
        RecursionError: The JSON is nested too deep.
    """
    label: Any = text.decode().strip()
    if not member.name.lower().endswith(".cls"):
        fields = json.loads(label)
        label = fields.get("label") if isinstance(fields, dict) else None
        if label is None:
            return None
    if not re.fullmatch("[0-9]{1,18}", str(label)):
        raise ValueError(label)
    return int(label)


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
