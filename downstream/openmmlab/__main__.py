"""Runs OpenMMLab's own tools with our backbones and with stand-ins for mmcv's compiled operators.

    python -m downstream.openmmlab mmdet/tools/test.py runs/detector/config.py runs/detector/iter_320.pth
    torchrun --nproc-per-node 8 -m downstream.openmmlab mmdet/tools/train.py CONFIG --launcher pytorch

The first argument is a tool of the installed mmdet or mmseg, or any Python file; the others are the tool's.
The tool runs as it would by itself (`runpy`), but after the import of `downstream.openmmlab`.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

from coma.errors import BadInput, ComaError


def main(arguments: list[str]) -> int:
    """Runs the tool that the first of the arguments names with the others; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        path = find_tool(arguments[0])
        sys.argv = [str(path), *arguments[1:]]
        sys.path[0] = str(path.parent)  # as if Python had been given the file
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="(mmcv|mmdet|mmengine|mmseg)")  # about each other
            runpy.run_path(str(path), run_name="__main__")
    except ComaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    return 0


def find_tool(name: str) -> Path:
    """Returns the file of a tool: the file itself, or `PACKAGE/tools/TOOL` of an installed package.

    Raises:
        BadInput: there is no such file.
    """
    if Path(name).is_file():
        return Path(name).resolve()
    package, _, tool = name.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(f"{name}: no such file; name a file, or mmdet/tools/train.py and the like")
    home = Path(spec.submodule_search_locations[0], ".mim")
    if not (home / tool).is_file():
        tools = sorted(str(path.relative_to(home)) for path in home.glob("tools/*.py"))
        raise BadInput(f"{name}: {package} has no such tool; it has {', '.join(tools) or 'none'}, ...")
    return home / tool


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
