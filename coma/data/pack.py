"""Writes any source as WebDataset shards of images no larger than needed: read once, train many times.

An image becomes a member `00000042-name.jpg`, its label `00000042-name.cls`. A JPEG that is small enough is
copied; all other images are reduced and encoded again (see `encode`).

Shard k holds the images k*s to (k+1)*s of the source, and `index.json` lists the finished shards. A shard
gets its name only when it is complete, so a pack that was stopped resumes after its last complete shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from coma.atomic_io import write_json
from coma.config.pack import PackConfig
from coma.data.decode import decode, naming_errors, plain_jpeg_size
from coma.data.encode import encode, reduce_to_short_side
from coma.data.sources.base import Source
from coma.data.sources.webdataset import INDEX
from coma.data.windows import parse_window
from coma.data.worker_pool import map_ordered
from coma.errors import BadImage, BadInput

_FORMAT = "coma-pack 1"
_CHUNK = 16
_IDENTITY = "names_and_sizes_sha256"


@dataclass
class Shard:
    """A finished shard, as `index.json` lists it."""

    file: str
    images: int = 0
    bytes: int = 0
    bytes_before: int = 0
    failures: list[str] = field(default_factory=list)
    filled: int = 0
    """Number of images whose nodata, NaN or infinite values were filled."""


@dataclass(frozen=True)
class PackReport:
    """The result of packing."""

    shards: tuple[Shard, ...]
    resumed: int
    """Number of images of the source that earlier attempts had packed."""

    @property
    def images(self) -> int:
        """Number of images in the shards."""
        return sum(shard.images for shard in self.shards)

    @property
    def failures(self) -> list[str]:
        """`path: reason` of every image that was skipped."""
        return [failure for shard in self.shards for failure in shard.failures]


@dataclass(frozen=True)
class _Packed:
    key: str
    suffix: str
    content: bytes
    label: int | None
    bytes_before: int
    filled: bool


def pack(
    source: Source, config: PackConfig, progress: Callable[[int], None] = lambda done: None
) -> PackReport:
    """Writes the shards and their index; images that fail to decode or encode are skipped and named in it.

    Args:
        source: Images to pack.
        config: Settings. The folder `out` must be new, empty, or contain the same pack unfinished.
        progress: Receives the number of images done so far, including those of an earlier attempt.

    Raises:
        BadInput: The folder contains something else, or no image could be read.
    """
    out = config.out
    wanted = {
        "format": _FORMAT,
        "source": str(source.location.resolve()),
        "images_in_source": len(source),
        _IDENTITY: hashlib.sha256(json.dumps(source.listing()).encode()).hexdigest(),
        "size": config.short_side,
        "quality": config.quality,
        "shard_images": config.shard_images,
        "class_names": None if source.class_names is None else list(source.class_names),
    }
    shards = _finished_shards(out, wanted)
    _save_index(out, wanted, shards, finished=False)
    resumed = min(len(shards) * config.shard_images, len(source))
    progress(resumed)
    todo = list(_chunks(len(source), config.shard_images, len(shards)))
    results = map_ordered(_PackFetcher(source, config), todo, config.workers)
    try:
        for number, chunks in groupby(todo, lambda chunk: chunk.start // config.shard_images):
            with _shard(out / f"shard-{number:06d}.tar") as (shard, tar):
                for chunk, packed in zip(chunks, results, strict=False):
                    for each in packed:
                        _add(shard, tar, each)
                    progress(chunk.stop)
            shards.append(shard)
            _save_index(out, wanted, shards, finished=False)
    finally:
        results.close()
    report = PackReport(tuple(shards), resumed)
    if not report.images:
        first = report.failures[0]
        raise BadInput(f"{source.location}: none of {len(source)} images could be read; the first: {first}")
    _save_index(out, wanted, shards, finished=True)
    return report


@dataclass(frozen=True)
class _PackFetcher:
    source: Source
    config: PackConfig

    def __call__(self, chunk: range) -> list[_Packed | str]:
        return [self._packed(i) for i in chunk]

    def _packed(self, i: int) -> _Packed | str:
        name = self.source.describe(i)
        try:
            original = self.source.read_bytes(i)
            if original is None:
                image = self.source.decode(i)
            else:
                image = decode(original, name, min_side=2 * self.config.short_side)
            small = min(image.pixels.shape[:2]) <= self.config.short_side
            if original is not None and small and plain_jpeg_size(original):
                suffix, content = ".jpg", original
            else:
                with naming_errors(name, "cannot be packed"):
                    reduced = reduce_to_short_side(image, self.config.short_side)
                    suffix, content = encode(reduced, self.config.quality)
        except BadImage as error:
            return str(error)
        label = self.source.label(i)
        before = image.pixels.nbytes if original is None else len(original)
        filled = image.missing is not None
        return _Packed(_key(i, name), suffix, content, label, before, filled)


@contextmanager
def _shard(path: Path) -> Iterator[tuple[Shard, tarfile.TarFile]]:
    """Opens a tar that gets its name only when it is complete and on the disk."""
    partial, shard = path.with_name(f".{path.name}.partial"), Shard(path.name)
    try:
        with open(partial, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                yield shard, tar
            file.flush()
            os.fsync(file.fileno())
        shard.bytes = partial.stat().st_size
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _add(shard: Shard, tar: tarfile.TarFile, result: _Packed | str) -> None:
    if isinstance(result, str):
        shard.failures.append(result)
        return
    members = {result.suffix: result.content}
    if result.label is not None:
        members[".cls"] = str(result.label).encode()
    for suffix, content in members.items():
        info = tarfile.TarInfo(result.key + suffix)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    shard.images += 1
    shard.filled += result.filled
    shard.bytes_before += result.bytes_before


def _finished_shards(out: Path, wanted: dict[str, Any]) -> list[Shard]:
    """Returns the shards that an earlier attempt has finished; creates the folder if there is none."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file; --out is a folder for the shards")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / INDEX).exists():
        if any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise BadInput(f"{out}: already has other files; choose a new folder for --out")
        return []
    try:
        there = json.loads((out / INDEX).read_text())
        shards = [Shard(**fields) for fields in there.pop("shards")]
        finished = there.pop("finished")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BadInput(f"{out / INDEX}: not the index of a pack; choose a new folder for --out") from None
    there.setdefault(_IDENTITY, wanted[_IDENTITY])  # an older version did not store it
    other = [f"{key} {there.get(key)!r}" for key in wanted if there.get(key) != wanted[key]]
    if other == [f"{_IDENTITY} {there[_IDENTITY]!r}"]:
        raise BadInput(
            f"{out}: names or sizes of the images in {wanted['source']} have changed since this pack was "
            "started; choose a new folder for --out"
        )
    if other:
        raise BadInput(f"{out}: is another pack ({', '.join(other)}); choose a new folder for --out")
    if finished:
        raise BadInput(f"{out}: this pack is already finished; delete the folder to make it again")
    whole: list[Shard] = []
    for shard in shards:
        with suppress(OSError):
            if (out / shard.file).stat().st_size == shard.bytes:
                whole.append(shard)
                continue
        break
    return whole


def _save_index(out: Path, wanted: dict[str, Any], shards: list[Shard], *, finished: bool) -> None:
    index = wanted | {"finished": finished, "shards": [asdict(shard) for shard in shards]}
    write_json(out / INDEX, index, indent=1)


def _chunks(n: int, shard_images: int, first_shard: int) -> Iterator[range]:
    for start in range(first_shard * shard_images, n, shard_images):
        stop = min(start + shard_images, n)
        for at in range(start, stop, _CHUNK):
            yield range(at, min(at + _CHUNK, stop))


def _key(i: int, name: str) -> str:
    name, window = parse_window(name) or (name, "")
    stem = os.path.splitext(re.split(r"[/\[\]]", name.rstrip("]"))[-1])[0] + str(window)
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", re.sub(r"^\d{8}-", "", stem))[:60]
    return f"{i:08d}-{plain}" if plain else f"{i:08d}"
