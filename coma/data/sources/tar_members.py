"""Members of a tar file and their places, from its headers: POSIX.1-2001 ustar and pax, GNU long names."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from coma.data.inventory import Inventory
from coma.data.remote import RemoteFile
from coma.errors import BadInput
from coma.messages import printable

_BLOCK = tarfile.BLOCKSIZE
_WITHOUT_CONTENT = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE),
    *(tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
)
_LONGEST_NAME = 1 << 20
"""Maximum bytes of a long name or of a pax header, which are read into memory."""
_NAMES = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
Read = Callable[[int, int], bytes]
"""Returns a number of bytes from a position, or fewer at the end, as `os.pread` does."""


class Member(NamedTuple):
    """A regular file in a tar, or a link to one."""

    name: str
    start: int
    size: int
    link: str | None = None
    """Name of the linked member."""


def read_members(path: Path | RemoteFile, length: int, read: Read, inventory: Inventory) -> Iterator[Member]:
    """Reads all headers (POSIX.1-2001 ustar and pax, GNU long names), three times as fast as `tarfile`.

    Raises:
        BadInput: The file is not a tar, or is compressed, truncated or damaged.
    """
    at = 0
    longer: dict[str, str] = {}
    while at < length:
        block = read(_BLOCK, at)
        if block == tarfile.NUL * _BLOCK:
            return
        start = at + _BLOCK
        try:
            name, kind, size, link = _header(block)
            size = 0 if kind in _WITHOUT_CONTENT else int(longer.get("size", size))
            if size < 0 or (size > _LONGEST_NAME and kind in _NAMES):
                raise ValueError("size")
            if start + size > length:
                raise BadInput(f"{path}: truncated in the middle of {printable(name)}")
            if kind == tarfile.XHDTYPE:
                longer |= _pax(read(size, start))
            elif kind == tarfile.GNUTYPE_LONGNAME:
                longer["path"] = os.fsdecode(read(size, start).rstrip(b"\0"))
            elif kind == tarfile.GNUTYPE_LONGLINK:
                longer["linkpath"] = os.fsdecode(read(size, start).rstrip(b"\0"))
        except ValueError:
            raise BadInput(f"{path}: {_not_a_tar(block, at)}") from None
        at = start + -(-size // _BLOCK) * _BLOCK
        if kind not in (*_NAMES, tarfile.XGLTYPE):
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


def follow_links(path: Path | RemoteFile, members: list[Member], inventory: Inventory) -> list[Member]:
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
    """Returns the records `length key=value newline` of a POSIX.1-2001 "pax Extended Header".

    Raises:
        ValueError: A length does not fit, or a key is not UTF-8.
    """
    found, at = {}, 0
    while at < len(records) and records[at]:
        space = records.index(b" ", at)
        length = int(records[at:space])
        if not 0 < length <= len(records) - at:
            raise ValueError("length")
        key, _, value = records[space + 1 : at + length].partition(b"=")
        found[key.decode()] = os.fsdecode(value.removesuffix(b"\n"))
        at += length
    return found


def _not_a_tar(block: bytes, at: int) -> str:
    if block.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "compressed shards cannot be read at random; unpack it to a plain .tar"
    return "not a tar file" if at == 0 else f"damaged at byte {at}"
