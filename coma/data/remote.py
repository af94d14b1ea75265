"""Remote files through fsspec: their size and version, and ranges of their bytes.

Random access needs a storage that serves ranges of bytes; one that sends whole files instead is refused.
Connections belong to the process that opened them: a `RemoteFile` that is sent to a worker holds the address
alone. Requests are repeated as `coma.data.retries` says.
"""

from __future__ import annotations

import io
import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from coma.data import retries
from coma.errors import BadImage, BadInput
from coma.paths import Address, Location

log = logging.getLogger(__name__)

MAX_IMAGE = 1 << 28
"""Maximum number of bytes of an encoded image that is read into memory."""
_AHEAD = 1 << 26
"""Bytes of the images that `ReadAhead` holds."""

_REQUEST = 1 << 24
"""Bytes of one request; longer ranges are read in several."""
_VERSIONS = (
    *("ETag", "etag", "blob_id", "md5Hash", "content_md5", "Content-MD5", "generation"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created"),
)
"""Names that file systems give to what changes with the content of a file."""


class FileState(NamedTuple):
    """What identifies the content of a remote file."""

    size: int
    version: str
    """ETag, checksum or date, as the storage calls it; empty if it tells none."""


class RemoteFile(NamedTuple):
    """A remote file of known size."""

    address: Address
    state: FileState

    def __str__(self) -> str:
        return str(self.address)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.address.name

    def read(self, start: int, size: int) -> bytes:
        """Returns `size` bytes from `start`.

        Raises:
            BadInput: They cannot be read, however often it is tried.
        """
        if size <= 0:
            return b""
        if start + size > self.state.size:
            raise BadInput(f"{self}: is shorter than the {start + size:,} bytes that are to be read of it")
        if size <= _REQUEST:
            return retries.request(self.address, lambda: _read_range(self.address, start, size))
        parts = [(at, min(_REQUEST, start + size - at)) for at in range(start, start + size, _REQUEST)]
        return b"".join(retries.in_threads(lambda part: self.read(*part), parts))


def describe_files(location: Location, files: Sequence[RemoteFile]) -> dict[str, Any]:
    """Returns what identifies remote files, for JSON: their location, names, sizes and versions."""
    return {"location": str(location), "files": [[file.name, *file.state] for file in files]}


def same_files(before: Any, now: dict[str, Any]) -> bool:
    """Returns whether two descriptions are of the same files, unchanged; see `changed_files`."""
    if not isinstance(before, dict):
        return False
    names = [[file[0] for file in each["files"]] for each in (before, now)]
    return names[0] == names[1] and not changed_files(before, now)


def changed_files(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the files that have another size or version than before, with both.

    Versions are compared only if the location is the same: other storages call them otherwise.
    """
    compared = 3 if before["location"] == now["location"] else 2
    old = {file[0]: file[1:compared] for file in before["files"]}
    return [
        f"{file[0]} ({_told(old[file[0]])} -> {_told(file[1:compared])})"
        for file in now["files"]
        if file[0] in old and old[file[0]] != file[1:compared]
    ]


def _told(state: list[Any]) -> str:
    return ", ".join([f"{state[0]:,} bytes", *filter(None, state[1:])])


class RemoteReader(io.RawIOBase):
    """A remote file as a binary file object, without a buffer."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the position and returns it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.state.size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Returns up to `size` bytes."""
        left = max(self._file.state.size - self._at, 0)
        data = self._file.read(self._at, left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer and returns the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class ReadAhead:
    """Reads images that are wanted next many at a time; holds up to `_AHEAD` bytes of them.

    It is empty again when it is sent to another process.
    """

    def __init__(self) -> None:
        self._wanted: deque[int] = deque()
        self._ready: dict[int, bytes] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadAhead, ()

    def expect(self, indices: Sequence[int]) -> None:
        """Notes the images that are wanted next, in this order, in place of those noted before."""
        self._wanted, self._ready = deque(indices), {}

    def get(self, i: int, read: Callable[[int], bytes], size: Callable[[int], int]) -> bytes:
        """Returns image `i`, and reads those that are wanted after it.

        Args:
            i: Number of the image.
            read: Returns the bytes of an image.
            size: Returns their number.
        """
        if i not in self._ready and i in self._wanted:
            while self._wanted[0] != i:  # wanted once, and not read
                self._wanted.popleft()
            batch, total = [], 0
            while self._wanted and (not batch or total + size(self._wanted[0]) <= _AHEAD):
                batch.append(self._wanted.popleft())
                total += size(batch[-1])
            self._ready = dict(zip(batch, retries.in_threads(read, batch), strict=True))
        return self._ready.pop(i, None) or read(i)


def list_folder(address: Address) -> list[str]:
    """Returns the sorted names of files and folders directly in a remote folder; those of folders end in /.

    Raises:
        BadInput: The folder does not exist or cannot be listed.
    """

    def names() -> list[str]:
        filesystem, path = _filesystem(address)
        filesystem.invalidate_cache()
        entries = filesystem.ls(path, detail=True)
        return [
            entry["name"].rstrip("/").rpartition("/")[2] + "/" * (entry["type"] == "directory")
            for entry in entries
            if entry["name"].rstrip("/") != path.rstrip("/")
        ]

    return sorted(set(retries.request(address, names)) - {"", "/"})


def open_file(address: Address) -> RemoteFile:
    """Returns a remote file with its size and version.

    Raises:
        BadInput: It does not exist or cannot be read, or the storage does not tell its size.
    """
    return RemoteFile(address, retries.request(address, lambda: _state(address)))


def read_small_file(address: Address, most: int = 1 << 24) -> bytes | None:
    """Returns the content of a file; None if there is none that may be read.

    Raises:
        BadInput: It is larger than `most`, or the storage does not answer.
    """
    try:
        file = open_file(address)
    except retries.RemoteMissing:
        return None
    if file.state.size > most:
        raise BadInput(f"{file}: {file.state.size:,} bytes are more than the {most:,} that are expected")
    return file.read(0, file.state.size)


def check_image_size(size: int, name: str) -> None:
    """Refuses encoded images that are too large to be held in memory.

    Raises:
        BadImage: The image has more than `MAX_IMAGE` bytes.
    """
    if size > MAX_IMAGE:
        raise BadImage(f"{name}: {size:,} bytes are more than the limit of {MAX_IMAGE:,} for one image")


def _filesystem(address: Address) -> tuple[Any, str]:
    """Returns fsspec's file system and path; fsspec keeps one file system for each place and process."""
    import fsspec

    options: dict[str, Any] = {}
    if address.scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"timeout": ClientTimeout(total=retries.POLICY.seconds), "trust_env": True}
    return fsspec.core.url_to_fs(address.url.partition("#")[0], **options)


def _state(address: Address) -> FileState:
    filesystem, path = _filesystem(address)
    if address.scheme in ("http", "https"):
        _, total, version = _http_range(filesystem, path, 0, 1)
        return FileState(total, version)
    facts = filesystem.info(path)
    if facts.get("type") == "directory":
        raise IsADirectoryError("is a folder")
    if not isinstance(facts.get("size"), int):
        raise ValueError("the storage does not tell the size of this file")
    found = next((f"{name}: {facts[name]}" for name in _VERSIONS if facts.get(name)), "")
    return FileState(facts["size"], found)


def _read_range(address: Address, start: int, size: int) -> bytes:
    filesystem, path = _filesystem(address)
    if address.scheme in ("http", "https"):
        data = _http_range(filesystem, path, start, size)[0]
    else:
        data = filesystem.cat_file(path, start=start, end=start + size)
    if len(data) != size:
        raise ConnectionError(f"{len(data):,} of {size:,} bytes arrived")
    return data


def _http_range(filesystem: Any, url: str, start: int, size: int) -> tuple[bytes, int, str]:
    """Returns the bytes, the size of the file and its version (RFC 9110, section 14).

    fsspec's own HTTP reads take the whole body of a server that ignores the range.
    """
    from fsspec.asyn import sync

    async def get() -> tuple[bytes, int, str]:
        session = await filesystem.set_session()
        headers = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        async with session.get(filesystem.encode_url(url), headers=headers) as response:
            version = next((f"{k}: {response.headers[k]}" for k in _VERSIONS if k in response.headers), "")
            given = re.fullmatch(
                r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", response.headers.get("Content-Range", "").strip()
            )
            if response.status == 416 and given and int(given[3]) == 0:
                return b"", 0, version
            if response.status == 404:
                raise FileNotFoundError("not found (404)")
            response.raise_for_status()
            if response.status != 206 or given is None or given[1] is None or int(given[1]) != start:
                raise ValueError(
                    "the server ignores requests for ranges of bytes, which random access needs; copy the "
                    "files to a local disk, or to a server that has ranges"
                )
            wanted = min(size, int(given[3]) - start)
            return await response.content.readexactly(wanted), int(given[3]), version

    answer: Any = sync(filesystem.loop, get)
    return answer
