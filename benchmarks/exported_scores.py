"""AP and mIoU of every file that `coma export` makes of trained models, and what loops cost.

    python benchmarks/exported_scores.py --work W --detector ARTIFACT --segmentor ARTIFACT --data DATA

DATA holds det-bccd and camvid-mini. int8 is calibrated on their training images. Files are verified on some
of their validation images, and scored on all of them, by ONNX Runtime and by OpenVINO, with the limits of the
gate. Detectors are exported twice, with NonMaxSuppression and RoiAlign and, by `--plugin-free`, with loops in
their place. Both of these files in fp32 are then timed in turns at the size that the detector was trained on.
On a CPU, ONNX Runtime emulates fp16 (in fp32, rounded as a GPU rounds it), and OpenVINO computes it in fp32.

Every form of a model is one process of `coma export`. `--work` keeps the exports: what its manifests list is
not exported again. Give another one after changes to the exporter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from machine import describe, table

from coma.artifact import load_artifact
from coma.runtimes.manifest import Entry, Manifest
from coma.runtimes.open import open_onnx
from coma.runtimes.preprocessing import resize_image, to_input
from coma.runtimes.shape_ranges import Shape, Shapes
from export.graphs.load import size_of
from export.image_sets import read_image_set
from export.latency import time_interleaved
from export.preprocessing import open_images

PRECISIONS = ("fp32", "fp16", "int8", "int8+fp16")
OF_LOOPS = ("fp32", "int8")
"""Precisions of plug-in-free detectors: emulating 16 bits in their loops takes very long."""
DEVICES = ("cpu", "openvino")
VERIFIED = 8
"""Images that files are compared with PyTorch on; scores are of all validation images."""
NATIVE, LOOPS = "native", "plug-in-free"
IMAGES = {"detector": ("det-bccd", "{}"), "segmentor": ("camvid-mini", "img_dir/{}")}
"""Data set of each kind, and where in it the images of a split are."""


def images_of(kind: str, data: Path, split: str) -> Path:
    """Returns the folder of the images of a split."""
    dataset, place = IMAGES[kind]
    return data / dataset / place.format(split)


def shapes_of(artifact: Path) -> Shapes:
    """Returns free shapes; the largest holds images of 3:4 whose short side is the size of training."""
    config = load_artifact(artifact).config
    height, width = size_of(config, "detector")
    least = Shape(1, config.model.unit, config.model.unit)
    return Shapes(least, Shape(1, height, width), Shape(2, 4 * height // 3, 4 * width // 3))


def export(kind: str, artifact: Path, form: str, args: argparse.Namespace) -> Path:
    """Exports the missing precisions of a model; returns the folder. A refused file is a result, too."""
    out = args.work / f"{kind}-{form}"
    known = {entry.precision for entry in entries(out)}
    wanted = [each for each in args.precisions if form != LOOPS or each in OF_LOOPS]
    missing = [precision for precision in wanted if precision not in known]
    if missing:
        shapes = shapes_of(artifact)
        least, opt, most = (
            f"{each.batch}x3x{each.height}x{each.width}" for each in (shapes.min, shapes.opt, shapes.max)
        )
        command = [sys.executable, "-m", "coma", "export", artifact, "--out", out, "--benchmark-seconds", 0]
        command += ["--precision", ",".join(missing), "--device", ",".join(DEVICES)]
        command += ["--shapes", f"{least}:{opt}:{most}", "--dataset", args.data / IMAGES[kind][0]]
        command += ["--verify", images_of(kind, args.data, "val"), "--verify-images", VERIFIED]
        if any(precision.startswith("int8") for precision in missing):
            command += ["--calibrate", images_of(kind, args.data, "train")]
        command += ["--plugin-free"] * (form == LOOPS)
        code = subprocess.run([str(each) for each in command], check=False).returncode
        if code not in (0, 1):  # 1: a file was refused
            raise SystemExit(f"coma export ended with {code}")
    return out


def entries(folder: Path) -> list[Entry]:
    """Returns what the manifest of a folder lists, refused files as well."""
    manifest = Manifest.read(folder, "remove it")
    return [*manifest.files, *manifest.rejected] if manifest else []


def scores_of(kind: str, form: str, entry: Entry) -> list[dict[str, Any]]:
    """Returns a row for every runtime of a file."""
    found = {entry.runtime: entry.verification, **entry.also_verified}
    rows = []
    for runtime, verification in found.items():
        outputs = verification["outputs"].values()
        row: dict[str, Any] = {"model": kind, "form": form, "precision": entry.precision}
        row |= {"runtime": runtime, "MB": round(entry.bytes / 1e6, 1), "kept": not verification["failures"]}
        row["largest error"] = max((each["relative"] or 0.0 for each in outputs), default=None)
        row |= entry.metric.get("file" if runtime == entry.runtime else runtime, {})
        row |= {f"PyTorch {name}": value for name, value in entry.metric.get("torch", {}).items()}
        rows.append({**row, "failures": verification["failures"]})
    return rows


def time_loops(artifact: Path, folders: dict[str, Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times a detector's fp32 files, one with operators and one with loops, in turns."""
    rows = []
    height, width = size_of(load_artifact(artifact).config, "detector")
    pictures = read_image_set(open_images(images_of("detector", args.data, "val")), 3, 8).pictures
    files = {form: folder / "detector.onnx" for form, folder in folders.items()}
    for device in DEVICES:
        runtimes = {form: open_onnx(file, device, args.threads) for form, file in files.items()}
        for batch in (1, 2):
            rule = runtimes[NATIVE].spec.preprocessing
            some = islice(cycle(pictures), batch)
            inputs = to_input([resize_image(each, rule, (height, width)) for each in some], rule)
            outputs = {form: runtime(inputs) for form, runtime in runtimes.items()}
            calls = [partial(runtime, inputs) for runtime in runtimes.values()]
            times = dict(zip(runtimes, time_interleaved(calls, batch, args.seconds), strict=True))
            apart = [
                float((outputs[NATIVE][name] - outputs[LOOPS][name]).abs().max())
                for name in ("boxes", "scores")
            ]
            rows.append(
                {
                    "runtime": runtimes[NATIVE].title,
                    "size": f"{batch} x {height} x {width}",
                    "native ms": times[NATIVE].p50,
                    "loops ms": times[LOOPS].p50,
                    "ratio": times[LOOPS].p50 / times[NATIVE].p50,
                    "detections": int((outputs[NATIVE]["scores"] > 0).sum()),
                    "boxes differ by": apart[0],
                    "scores differ by": apart[1],
                    "latency": {form: asdict(each) for form, each in times.items()},
                }
            )
    return rows


def main() -> None:
    """Exports, times, prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the exports")
    parser.add_argument("--data", type=Path, required=True, help="det-bccd and camvid-mini lie here")
    parser.add_argument("--detector", type=Path, metavar="ARTIFACT")
    parser.add_argument("--segmentor", type=Path, metavar="ARTIFACT")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each file and batch size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the results to this file, as JSON")
    args = parser.parse_args()
    scores: list[dict[str, Any]] = []
    timed: list[dict[str, Any]] = []
    folders: dict[str, Path] = {}

    def save() -> None:
        if args.out:
            facts = {"machine": describe(), "threads": args.threads, "scores": scores, "loops": timed}
            args.out.write_text(json.dumps(facts, indent=1) + "\n")

    for kind, form in (("segmentor", NATIVE), ("detector", NATIVE), ("detector", LOOPS)):
        if artifact := getattr(args, kind):
            folders[form] = export(kind, artifact, form, args)
            scores += [row for entry in entries(folders[form]) for row in scores_of(kind, form, entry)]
            save()
    if args.detector and "fp32" in args.precisions:
        timed += time_loops(args.detector, folders, args)
        save()
    print(f"\n{describe()}")
    for rows in filter(None, (scores, timed)):
        print("\n" + table([_as_text(row) for row in rows]))


def _as_text(row: dict[str, Any]) -> dict[str, str]:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return "; ".join(value)[:80] if isinstance(value, list) else str(value)

    return {name: text(value) for name, value in row.items() if name != "latency"}


if __name__ == "__main__":
    main()
