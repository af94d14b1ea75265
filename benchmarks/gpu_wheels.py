"""Download the small wheels that a GPU machine without a network may lack, for `benchmarks/gpu.py`.

    python benchmarks/gpu_wheels.py                         # into wheels/, for CPython 3.12 on Linux x86-64
    python benchmarks/gpu_wheels.py --limit 200             # megabytes, this repository's files included

Such a machine is taken to have PyTorch with CUDA and what often comes with it: torchvision, timm, einops,
safetensors, numpy, scipy, pillow, tifffile, scikit-image, matplotlib, tensorboard, rich, onnx, onnxruntime,
onnxscript, opencv and pytest. There, without a network:

    python3 -m pip install --no-index --no-deps --target SITE wheels/*.whl
    PYTHONPATH=SITE python3 benchmarks/gpu.py --minutes 9

What matters most comes first; what would go over the limit is left out and named.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUPS = {  # in order of importance
    "settings and command line": ("tyro", "docstring-parser", "typeguard", "cattrs", "attrs"),
    "mmdet and mmseg": (
        *("mmengine", "mmcv-lite", "mmdet", "mmsegmentation", "addict", "termcolor", "yapf", "platformdirs"),
        *("terminaltables", "pycocotools", "shapely", "prettytable", "wcwidth", "ftfy", "six", "setuptools"),
    ),
    "16-bit PNG files": ("imagecodecs",),
    "ONNX Runtime's CUDA provider": ("onnxruntime-gpu",),
    "TensorRT-RTX": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
}
LARGE = {"onnxruntime-gpu": 244.0, "tensorrt-rtx-cu13-libs": 91.0}
"""MiB of what is not downloaded in vain (versions 1.31.1 and 1.7.1)."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def pinned() -> dict[str, str]:
    """Versions of `requirements.lock` by package."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = (re.match(r"([\w.-]+)==([^\s;\\]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def repository_size() -> float:
    """Megabytes of the files that git knows here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    paths = (ROOT / name for name in listed.decode().split("\0") if name)
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


def download(packages: list[str], folder: Path, python: str) -> list[Path]:
    """Wheels of these requirements, without what they need themselves."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    command += [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run([*command, *packages], check=True)
    return sorted(folder.glob("*.whl"))


def main() -> int:
    """Download group by group; 1 if the essential ones do not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "wheels")
    parser.add_argument("--python", default="3.12", help="version on that machine")
    parser.add_argument("--limit", type=float, default=64.0, help="MiB that may travel, repository included")
    args = parser.parse_args()

    versions, room = pinned(), args.limit - repository_size()
    print(f"{args.limit - room:.1f} MiB of {args.limit:g} are this repository's files")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    left_out, total = [], 0.0
    for number, (what, packages) in enumerate(GROUPS.items()):
        known = sum(LARGE.get(name, 0.0) for name in packages)
        if known > room - total:
            left_out.append(f"{what} (about {known:.0f} MiB)")
            continue
        wanted = [f"{name}=={versions[name]}" if name in versions else name for name in packages]
        with tempfile.TemporaryDirectory() as folder:
            found = download(wanted, Path(folder), args.python)
            size = sum(path.stat().st_size for path in found) / 2**20
            if total + size > room:
                if number == 0:
                    print(f"error: {what} alone takes {size:.1f} MiB; give a larger --limit", file=sys.stderr)
                    return 1
                left_out.append(f"{what} ({size:.1f} MiB)")
                continue
            for path in found:
                shutil.move(path, args.out / path.name)
        total += size
        print(f"{what}: {len(found)} wheels, {size:.1f} MiB")
    print(f"{total:.1f} MiB of wheels in {args.out}, {args.limit - room + total:.1f} MiB with the repository")
    if left_out:
        print(f"left out, over the limit: {', '.join(left_out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
