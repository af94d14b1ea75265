"""WebDataset shards (`.tar`) with random access, for exact shuffling and exact resume.

Opening a shard reads the headers of all its members and keeps the place of each image. Members whose names
are equal up to the first dot of the base name form one sample: an image and its label, in `.cls` (an integer
as text) or in the field "label" of `.json`. If a sample has an image with a plain name (`7.jpg`), images with
a word after the first dot (`7.mask.png`) are other fields of the sample and are skipped. Dots that belong to
the name (`IMG_2024.05.01.jpg`) give images of their own, with the label in `IMG_2024.05.01.cls`. Links to
members of the same shard are followed.

Shards may be remote. Their headers are read in windows of `_WINDOW` bytes, several shards at a time, and
their images in ranges, many at a time.

`index.json`, which `coma pack` writes beside its shards, adds the class names.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coma.data.decode import EXTENSIONS, HEAD
from coma.data.inventory import NO_EXTENSION, Inventory, is_system_folder
from coma.data.remote import (
    MAX_IMAGE,
    ReadAhead,
    RemoteFile,
    check_image_size,
    describe_files,
    read_small_file,
)
from coma.data.retries import in_threads
from coma.data.sources.base import EncodedSource, Names, Source, read_at
from coma.data.sources.tar_members import Member, Read, follow_links, read_members
from coma.data.worker_pool import map_ordered
from coma.errors import BadInput
from coma.messages import counted, printable
from coma.paths import Address, Location

log = logging.getLogger(__name__)

INDEX = "index.json"
_WINDOW = 1 << 21
"""Bytes that are read at a time while the headers of a remote shard are read."""
_LONGEST_LABEL = 1 << 24
"""Maximum bytes of a member with a label."""
_SMALL = 1 << 14
"""Bytes up to which the members of a remote shard that may hold a label are kept while it is indexed."""
_PARALLEL_FROM = 8 << 30  # total bytes of shards from which headers are read in worker processes


@dataclass(frozen=True)
class Sample:
    """An image in a shard, and its label."""

    image: Member
    label: int | None
    fault: str = ""
    """Error message of a label that cannot be read; empty where the label is readable."""


class ShardSource(EncodedSource):
    """The images of one or more shards, in stored order."""

    def __init__(self, location: Location, shards: Sequence[Path] | Sequence[RemoteFile]) -> None:
        """Reads the headers of the shards.

        Raises:
            BadInput: A shard is damaged, compressed or missing, or no shard has an image.
        """
        samples, inventory = [], Inventory()
        for each, skipped in _index_all(shards):
            samples.append(each)
            inventory.merge(skipped)
        counts = [len(each) for each in samples]
        if not sum(counts):
            holds = f"; it holds {inventory.skipped()}" if inventory.skipped() else ""
            looked = f"looked for {' '.join(EXTENSIONS)}"
            raise BadInput(f"{location}: no image in {counted(len(shards), 'shard')} ({looked}){holds}")
        flat = [sample for each in samples for sample in each]
        labels = [sample.label for sample in flat if sample.label is not None]
        names = _class_names(shards[0])
        if labels and names and not 0 <= min(labels) <= max(labels) < len(names):
            found = f"labels run from {min(labels)} to {max(labels)}"
            raise BadInput(f"{location}: {found}, but {INDEX} names {len(names)} classes")
        super().__init__(location, np.array(labels) if len(labels) == len(flat) else None, names)
        self.inventory = inventory
        self._keep(shards, counts, [sample.image for sample in flat])
        self.unlabelled_reason = self._why_unlabelled(flat)

    def _keep(
        self, shards: Sequence[Path] | Sequence[RemoteFile], counts: Sequence[int], images: Sequence[Member]
    ) -> None:
        self._shards = [shard if isinstance(shard, RemoteFile) else str(shard) for shard in shards]
        self._shard = torch.from_numpy(np.repeat(np.arange(len(shards), dtype=np.int32), counts))
        self._places = torch.tensor([(image.start, image.size) for image in images])
        self._names = Names(image.name for image in images)
        self._ahead = ReadAhead()
        remote = [shard for shard in shards if isinstance(shard, RemoteFile)]
        if remote:
            self.index = {
                **describe_files(self.location, remote),
                "counts": list(counts),
                "starts": self._places[:, 0].tolist(),
            }

    @classmethod
    def from_listing(
        cls, location: Location, shards: Sequence[RemoteFile], listing: Mapping[str, Any]
    ) -> ShardSource:
        """Returns the images that a listing of the same shards names, without labels and without reads.

        Args:
            location: Address of the shards.
            shards: The shards, unchanged since the listing was made.
            listing: Names, sizes and index; see `coma.data.listing`.

        Raises:
            ValueError: The listing does not fit the shards.
        """
        source = cls.__new__(cls)
        Source.__init__(source, location)
        counts, starts = listing["index"]["counts"], listing["index"]["starts"]
        owners = [shard for shard, count in zip(shards, counts, strict=True) for _ in range(count)]
        images = [
            Member(name.removeprefix(f"{shard.name}/"), start, size)
            for shard, name, start, size in zip(
                owners, listing["names"], starts, listing["sizes"], strict=True
            )
        ]
        if not all(
            0 <= i.start <= i.start + i.size <= s.state.size for i, s in zip(images, owners, strict=True)
        ):
            raise ValueError("an image lies outside its shard")
        source._keep(shards, counts, images)
        return source

    def __len__(self) -> int:
        """Returns the number of samples that have an image."""
        return len(self._shard)

    def describe(self, i: int) -> str:
        """Returns the path of the shard and the name of the image in it."""
        return printable(f"{self._shards[int(self._shard[i])]}[{self._names[i]}]")

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns names as `shard.tar/member`, and sizes in bytes."""
        shards = [s.name if isinstance(s, RemoteFile) else os.path.basename(s) for s in self._shards]
        names = [f"{shards[k]}/{name}" for k, name in zip(self._shard.tolist(), self._names, strict=True)]
        return names, self._places[:, 1].tolist()

    def read_bytes(self, i: int) -> bytes:
        """Returns the content of an image file."""
        shard = self._shards[int(self._shard[i])]
        if isinstance(shard, RemoteFile):
            check_image_size(self._size(i), self.describe(i))
            return self._ahead.get(i, self._read_remote, self._size)
        start, size = self._places[i].tolist()
        return read_at(shard, start, size, self.describe(i))

    def prefetch(self, indices: Sequence[int]) -> None:
        """Prepares remote images that are read next."""
        if self.index is not None:
            self._ahead.expect([i for i in indices if self._size(i) <= MAX_IMAGE])

    def _size(self, i: int) -> int:
        return int(self._places[i, 1])

    def _read_remote(self, i: int) -> bytes:
        shard = self._shards[int(self._shard[i])]
        assert isinstance(shard, RemoteFile)
        return shard.read(*self._places[i].tolist())

    def _why_unlabelled(self, samples: Sequence[Sample]) -> str:
        """Names a sample without a usable label, if labels seem to be intended."""
        lacking = [i for i, sample in enumerate(samples) if sample.label is None]
        fault = next((samples[i].fault for i in lacking if samples[i].fault), "")
        if not fault and len(lacking) in (0, len(samples)):
            return ""
        what = fault or f"{self.describe(lacking[0])} has no label (a whole number in a .cls file)"
        more = f" (so {len(lacking)} of {len(samples)} samples have none)"
        return f"{what}{more}; add a label to every sample, or remove the samples without one"


def _index_all(
    shards: Sequence[Path] | Sequence[RemoteFile],
) -> Iterable[tuple[list[Sample], Inventory]]:
    """Indexes local shards in turn, or large ones in worker processes; remote ones many at a time."""
    remote = [shard for shard in shards if isinstance(shard, RemoteFile)]
    if remote:
        size = sum(shard.state.size for shard in remote)
        log.info(
            f"reads the headers of {counted(len(remote), 'remote shard')} ({size / 1e9:,.2f} GB); a resumed "
            "run keeps what was found"
        )
        return in_threads(index_shard, remote)
    local = [shard for shard in shards if isinstance(shard, Path)]
    for shard in local:
        if not shard.is_file():
            raise BadInput(f"{shard}: this shard is missing")
    large = sum(shard.stat().st_size for shard in local) > _PARALLEL_FROM
    return map_ordered(index_shard, local, None if large else 0)


def index_shard(path: Path | RemoteFile) -> tuple[list[Sample], Inventory]:
    """Returns the samples of a shard, in stored order, and the inventory of its files.

    Raises:
        BadInput: The file is not a tar, or is compressed, truncated or damaged.
    """
    if isinstance(path, RemoteFile):
        window = _Window(path)
        return _index(path, path.state.size, window.read, window.keep)
    with open(path, "rb", buffering=0) as shard:
        number = shard.fileno()
        return _index(path, os.fstat(number).st_size, partial(os.pread, number))


def _index(
    path: Path | RemoteFile, length: int, read: Read, keep: Callable[[int, int], None] | None = None
) -> tuple[list[Sample], Inventory]:
    inventory, members = Inventory(), []
    for member in read_members(path, length, read, inventory):
        members.append(member)
        if keep is not None and member.link is None:
            base = member.name.rpartition("/")[2].lower()
            if base.endswith((".cls", ".json")):
                keep(min(member.size, _SMALL), member.start)
            elif "." not in base:
                keep(min(member.size, HEAD), member.start)
    if any(member.link is not None for member in members):
        members = follow_links(path, members, inventory)
    groups = groupby((m for m in members if _is_shown(path, m.name, inventory)), lambda m: _key(m.name))
    samples = [sample for _, group in groups for sample in _samples(path, read, list(group), inventory)]
    return samples, inventory


class _Window:
    """Reads a remote shard from its beginning on, `_WINDOW` bytes at a time."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._start, self._data = file, 0, b""
        self._kept: dict[int, bytes] = {}

    def read(self, size: int, at: int) -> bytes:
        """Returns up to `size` bytes from `at`, as `os.pread` does; what `keep` kept is read once."""
        if (kept := self._kept.get(at, b"")) and len(kept) >= size:
            return kept[:size]
        size = min(size, self._file.state.size - at)
        if not self._start <= at <= at + size <= self._start + len(self._data):
            self._start = at
            self._data = self._file.read(at, min(max(size, _WINDOW), self._file.state.size - at))
        return self._data[at - self._start : at - self._start + size]

    def keep(self, size: int, at: int) -> None:
        """Reads what is needed again after the window has moved on."""
        self._kept[at] = self.read(size, at)


def _is_shown(path: Path | RemoteFile, name: str, inventory: Inventory) -> bool:
    """Returns whether a member is neither hidden nor in a system folder."""
    *folders, base = [part for part in name.split("/") if part not in ("", ".", "..")] or [name]
    if base.startswith(".") or any(folder.startswith(".") for folder in folders):
        inventory.skip_hidden(f"{path.name}[{name}]")
        return False
    if any(map(is_system_folder, folders)):
        inventory.skip_system_folder(f"{path.name}[{name}]")
        return False
    return True


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _samples(path: Path | RemoteFile, read: Read, group: list[Member], inventory: Inventory) -> list[Sample]:
    """Returns the images among members with one key, and their labels."""
    images, others = [], []
    for member in group:
        base = member.name.rpartition("/")[2]
        kind, is_image = inventory.identify(base, lambda _, at=member.start: read(HEAD, at))
        (images if is_image else others).append((member, kind, base.partition(".")[2]))
    if not images:
        for _, kind, _ in others:
            inventory.unread[kind] += 1
        return []
    plain = [member for member, kind, rest in images if not rest or f".{rest.lower()}" == kind]
    labels: dict[str, list[Member]] = {}
    for member in group:
        stem, _, suffix = member.name.rpartition(".")
        if suffix.lower() in ("cls", "json"):
            labels.setdefault(stem.lower(), []).append(member)
    samples = []
    for member, kind, rest in images:
        if plain and member is not plain[0] and not rest[:1].isdigit():
            name = f"{path.name}[{member.name}]"
            inventory.skip("further image of a sample", "further images of samples", name)
            continue
        inventory.images[kind] += 1
        stem = member.name if kind == NO_EXTENSION else member.name[: -len(kind)]
        samples.append(Sample(member, *_label(path, read, labels, (stem, _key(member.name)))))
    return samples


def _label(
    path: Path | RemoteFile, read: Read, labels: Mapping[str, Sequence[Member]], stems: Iterable[str]
) -> tuple[int | None, str]:
    """Returns the first label in the members of an image, and what is wrong if there is none.

    `labels` has the `.cls` and `.json` members of the sample by their names without extension, in lower case.
    """
    fault = ""
    for stem in dict.fromkeys(stems):
        for member in labels.get(stem.lower(), ()):
            try:
                if member.size > _LONGEST_LABEL:
                    raise ValueError("size")
                label = _parsed_label(member, read(member.size, member.start))
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


def _class_names(shard: Path | RemoteFile) -> tuple[str, ...] | None:
    """Returns the class names in the index beside a shard; None if there are none."""
    remote = isinstance(shard, RemoteFile)
    index = shard.address.with_name(INDEX) if remote else shard.with_name(INDEX)
    try:
        text = read_small_file(index) if isinstance(index, Address) else index.read_bytes()
        fields = {} if text is None else json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadInput(f"{index}: not a readable index ({error})") from None
    if not isinstance(fields, dict):
        return None
    if fields.get("finished") is False:
        raise BadInput(f"{index}: this pack is unfinished; run the same `coma pack` again")
    names = fields.get("class_names")
    return tuple(map(str, names)) if isinstance(names, list) else None
