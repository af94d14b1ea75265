"""Paths and addresses as users write them, with clear errors for those that cannot be used."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from coma.errors import BadInput

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://?")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(?:#(.*))?")
_HIDDEN = "***"
SHIPPED = "tiny-64"
"""The weights that come with the package which commands use by default."""
_SHIPPED = Path(__file__).with_name("weights")
_LOCAL_OR_NESTED = (
    *("file", "local", "dir", "data", "reference", "generic", "async_wrapper"),
    *("simplecache", "filecache", "blockcache", "cached"),
    *("zip", "tar", "libarchive", "git"),
)
"""fsspec's protocols that read local files, or other addresses inside an address."""


@dataclass(frozen=True, repr=False)
class Address:
    """The address of remote files, as fsspec takes it: `s3://bucket/photos`, `https://host/a.tar`.

    A user name with a password, or a query string, may hold a secret. `str()` shows `***` in their place, so
    neither messages nor saved settings contain them; only `url` does.
    """

    url: str

    def __post_init__(self) -> None:
        if not _ADDRESS.fullmatch(self.url):
            raise BadInput("this is no address like s3://bucket/folder")

    def __str__(self) -> str:
        scheme, netloc, path, query, _ = self._parts
        if self._user:
            netloc = f"{_HIDDEN}@{netloc.rpartition('@')[2]}"
        column = f"#{self.column}" if self.column else ""
        return f"{scheme}://{netloc}{path}" + (f"?{_HIDDEN}" if query else "") + column

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    @property
    def _parts(self) -> tuple[str, ...]:
        match = _ADDRESS.fullmatch(self.url)
        assert match is not None
        scheme, *rest = (part or "" for part in match.groups())
        return scheme.lower(), *rest

    @property
    def _user(self) -> str:
        """The part before the host that may be secret; empty if there is none."""
        user = self._parts[1].rpartition("@")[0]
        return user if ":" in user or self.scheme in ("http", "https") else ""

    @property
    def secrets(self) -> tuple[str, ...]:
        """The parts of the address that may be secret."""
        return tuple(filter(None, (self._user, self._parts[3])))

    @property
    def scheme(self) -> str:
        """Protocol, such as `s3`."""
        return self._parts[0]

    @property
    def path(self) -> str:
        """What follows the host or bucket, without query string and column."""
        return self._parts[2]

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2] or self._parts[1].rpartition("@")[2]

    @property
    def column(self) -> str:
        """The part after `#`: the column of images in parquet files; empty by default."""
        return self._parts[4]

    @property
    def lost_secret(self) -> bool:
        """Whether the secret of this address was left out when it was saved."""
        _, netloc, _, query, _ = self._parts
        return _HIDDEN in (netloc.rpartition("@")[0], query)

    def with_path(self, path: str) -> Address:
        """Returns the address of another path in the same place, without a column."""
        scheme, netloc, _, query, _ = self._parts
        return Address(f"{scheme}://{netloc}{path}" + (f"?{query}" if query else ""))

    def __truediv__(self, name: str) -> Address:
        return self.with_path(f"{self.path.rstrip('/')}/{name}")

    def with_name(self, name: str) -> Address:
        """Returns the address of another file beside this one."""
        return self.with_path(f"{self.path.rstrip('/').rpartition('/')[0]}/{name}")

    def absolute(self) -> Address:
        """Returns the address itself, which does not depend on the current folder."""
        return self

    resolve = absolute


Location = Path | Address
"""Where images are: a local path, or the address of remote files."""


def local_path(text: str) -> Path:
    """Returns a path as a user wrote it.

    Raises:
        BadInput: it is empty, no file system can have it, its links lead in a circle, or it is the address of
            something remote.
    """
    if not text.strip():
        raise BadInput(f"{text!r} names no file or folder")
    if "\0" in text:
        raise BadInput(f"{text!r}: a path cannot contain a NUL byte")
    try:
        os.stat(text)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadInput(f"{text}: its symbolic links lead in a circle") from None
    if _REMOTE.match(text) and not Path(text).exists():
        shown = Address(text) if _ADDRESS.fullmatch(text) else text
        way = "hf download" if text.startswith("hf:") else "rclone copy, or the tool of that storage"
        raise BadInput(
            f"{shown}: only images are read from remote storage; here, give a path on a local disk ({way})"
        )
    return Path(text)


def parse_location(text: str) -> Location:
    """Returns a local path, or the address of remote files, as a user wrote it.

    Raises:
        BadInput: see `local_path`; or the address is nested in another one, or leads to local files.
    """
    scheme, slashes, _ = text.partition("://")
    nested = "::" in text or scheme.lower() in _LOCAL_OR_NESTED
    if slashes and nested and not Path(text).exists():
        raise BadInput(
            f"{re.split('[:]+', text)[0]}: addresses inside addresses and addresses of local files are not "
            "read; give the plain address of the storage, or a path without ://"
        )
    if not _ADDRESS.fullmatch(text):
        return local_path(text)
    return Address(text)


def shipped_weights() -> tuple[str, ...]:
    """Returns the names of the artifacts that come with the package."""
    return tuple(sorted(path.parent.name for path in _SHIPPED.glob("*/config.json")))


def is_shipped(artifact: str | Path) -> bool:
    """Returns whether this is one of the names in `shipped_weights`, and no path in the current folder."""
    return not os.path.lexists(artifact) and str(artifact) in shipped_weights()


def artifact_directory(artifact: str | Path) -> Path:
    """Returns the directory of an artifact, given as a path or as one of the names in `shipped_weights`.

    A file or folder of that name in the current folder comes first.
    """
    return _SHIPPED / artifact if is_shipped(artifact) else Path(artifact)


def exports_beside(artifact: Path) -> Path:
    """Returns the folder that `coma export` writes the files of an artifact into by default."""
    return artifact.resolve().parent / "export"
