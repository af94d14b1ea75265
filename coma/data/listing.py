"""The names, sizes and labels of a run's images, which are compared when the run is resumed.

    data.json.gz    {"images": {"names": [...], "sizes": [...], "labels": [...]}, ...}, written once

The images of remote files also have an "index": the location and the names, sizes and versions (ETags) of the
files, and where images begin in shards. A resumed run does not read the headers of the shards again.

Dates are not compared, because copies have other ones, and neither is the location of the data. A local file
that was replaced by another one of exactly the same size is not noticed; a remote one is.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coma.atomic_io import write_whole
from coma.data.remote import changed_files
from coma.data.sources.base import Source
from coma.errors import BadInput
from coma.messages import abridged, counted, printable

FILE = "data.json.gz"
FLAG = "--allow-changed-data"

Listing = dict[str, dict[str, Any]]
"""Names, sizes and labels of the images, by their role, such as "test images"."""


def list_data(sources: Mapping[str, Source], *, labels: bool = True) -> Listing:
    """Returns the listing of each source.

    Args:
        sources: Sources by their role, such as "test images", which messages use.
        labels: Whether the labels of the images are used.
    """
    listing: Listing = {}
    for role, source in sources.items():
        names, sizes = source.listing()
        known = None
        if labels and source.labels is not None:
            known = source.labels.tolist()
        elif labels and source.multi_hot is not None:
            known = [row.nonzero()[0].tolist() for row in source.multi_hot]
        listing[role] = {"names": names, "sizes": sizes, "labels": known}
        if source.index is not None:
            listing[role]["index"] = source.index
    return listing


def write_listing(folder: Path, listing: Listing) -> None:
    """Writes a listing into a run directory.

    Raises:
        OSError: It cannot be written.
    """
    text = gzip.compress(json.dumps(listing).encode(), compresslevel=1, mtime=0)
    write_whole(folder / FILE, lambda file: file.write(text))


def read_listing(folder: Path) -> Listing | None:
    """Returns the listing in a run directory; None if there is none.

    Raises:
        BadInput: It is damaged.
    """
    try:
        listing = json.loads(gzip.decompress((folder / FILE).read_bytes()))
        for each in listing.values():
            if not len(each["names"]) == len(each["sizes"]):
                raise ValueError("names and sizes differ in number")
        return listing
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, ValueError, AttributeError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise BadInput(
            f"{folder / FILE}: the list of the run's images is damaged ({reason}); remove it to resume "
            "without comparing them"
        ) from None


def changes(before: Listing, now: Listing) -> list[str]:
    """Returns the changes, one line for each source in both listings."""
    return [
        f"the {role} have changed: {what}"
        for role in before.keys() & now.keys()
        if (what := _difference(before[role], now[role]))
    ]


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    if before == now:
        return ""
    old, new = (dict(zip(each["names"], each["sizes"], strict=True)) for each in (before, now))
    kinds = [
        ("removed", [name for name in old if name not in new]),
        ("added", [name for name in new if name not in old]),
        (
            "of another size",
            [f"{n} {old[n]} -> {new[n]} bytes" for n in new if old.get(n, new[n]) != new[n]],
        ),
    ]
    if before["labels"] is not None and now["labels"] is not None:
        old, new = (dict(zip(each["names"], each["labels"], strict=True)) for each in (before, now))
        kinds.append(("of another class", [name for name in new if old.get(name, new[name]) != new[name]]))
    shown = {kind: abridged([printable(name) for name in names], 3) for kind, names in kinds}
    facts = [f"{len(names)} {kind} ({shown[kind]})" for kind, names in kinds if names]
    if before.get("index") and now.get("index"):
        files = [printable(each) for each in changed_files(before["index"], now["index"])]
        facts += [f"{counted(len(files), 'file')} changed ({abridged(files, 3)})"] if files else []
    same = before["names"] == now["names"] and before["sizes"] == now["sizes"]
    return ", ".join(facts) or ("" if same else "the same images in another order")


def check_listing(folder: Path, now: Listing, warn: Callable[[str], object], *, allow: bool) -> bool:
    """Refuses to resume a run on other images than it was started with.

    Args:
        folder: Run directory.
        now: Listing of the images as they are now.
        warn: Receives a line if images have changed and that is allowed, or if the run has no listing.
        allow: Resume although images have changed.

    Returns:
        Whether images have changed.

    Raises:
        BadInput: Images have changed; the message says which.
    """
    before = read_listing(folder)
    if before is None:
        warn(f"{folder}: has no list of its images, as an older version started it: changes are not noticed")
        return False
    found = changes(before, now)
    if found and not allow:
        raise BadInput(
            f"{folder}: {'; '.join(found)}; give the images that it was started with, start a new run in "
            f"another directory, or resume anyway with {FLAG}"
        )
    for each in found:
        warn(f"{each}; continuing because of {FLAG}")
    return bool(found)
