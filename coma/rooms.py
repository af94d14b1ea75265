"""Entry points of rooms: found by group and name, imported on use.

`coma` imports no room. A room that supplies a command, a name of `import coma` or a loader lists it in
pyproject.toml, and whoever needs it asks here.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

from coma.errors import BadInput

DISTRIBUTION = "coma-dyvit"


def entry_points(group: str) -> dict[str, metadata.EntryPoint]:
    """Returns the entry points of a group by name, in alphabetical order."""
    return {entry.name: entry for entry in sorted(metadata.entry_points(group=group), key=lambda e: e.name)}


def load(entry: metadata.EntryPoint) -> Any:
    """Imports what an entry point names.

    Raises:
        BadInput: Python finds a file or folder of the user's in place of the room, such as a `pretrain.py`.
    """
    room = entry.module.partition(".")[0]
    if entry.dist is not None and entry.dist.name == DISTRIBUTION:
        spec = importlib.util.find_spec(room)
        home = Path(__file__).resolve().parents[1] / room / "__init__.py"
        if spec is not None and (spec.origin is None or Path(spec.origin).resolve() != home):
            place = spec.origin or next(iter(spec.submodule_search_locations or ()), room)
            raise BadInput(
                f"{place}: hides the package {room!r} of {DISTRIBUTION}; rename it, or take its folder out "
                "of PYTHONPATH"
            )
    return entry.load()
