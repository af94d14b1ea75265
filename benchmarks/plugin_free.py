"""What detectors cost in ONNX Runtime without NonMaxSuppression and RoiAlign (`coma export --plugin-free`).

    python benchmarks/plugin_free.py DETECTOR [DETECTOR ...] --images FOLDER --out plugin_free.json

Every detector is written twice, with those operators and with loops in their place, in fp32. Both files run
in turns on the same images, one at a time and four at a time, at the size that the detector was trained for.
The table says how much longer the loops take, and how far their detections are from the operators'.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from machine import report

from coma.runtimes.onnxruntime import OnnxRuntime
from coma.runtimes.preprocessing import resize_image, to_input
from coma.runtimes.shape_ranges import Shape, Shapes
from export.graphs.load import load_exportable
from export.image_sets import read_image_set
from export.latency import time_interleaved
from export.onnx_export import write_onnx
from export.preprocessing import open_images


def measure(detector: Path, args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """One row for each batch size."""
    exportable = load_exportable(detector, "detector")
    rule, unit = exportable.spec.preprocessing, exportable.spec.unit
    pictures = read_image_set(open_images(args.images), len(rule.mean), 8).pictures
    resized = [resize_image(each, rule) for each in pictures]
    height, width = (min(each.shape[axis] for each in resized) for axis in (1, 2))
    shapes = Shapes(Shape(1, unit, unit), Shape(1, height, width), Shape(4, 2 * height, 2 * width))
    files = [folder / f"{name}.onnx" for name in ("operators", "loops")]
    for file, plugin_free in zip(files, (False, True), strict=True):
        write_onnx(exportable, shapes, file, plugin_free)
    runtimes = [OnnxRuntime(file, "cpu", args.threads) for file in files]
    rows = []
    for batch in (1, 4):
        some = list(islice(cycle(resized), batch))
        inputs = to_input([each[:, :height, :width] for each in some], rule)
        found = [runtime(inputs) for runtime in runtimes]
        native, loops = time_interleaved(
            [partial(runtime, inputs) for runtime in runtimes], batch, args.seconds
        )
        error = max(float((found[0][name] - found[1][name]).abs().max()) for name in ("boxes", "scores"))
        rows.append(
            {
                "detector": detector.parent.name,
                "size": f"{height} x {width}",
                "batch": batch,
                "operators_ms": round(native.p50, 1),
                "loops_ms": round(loops.p50, 1),
                "ratio": round(loops.p50 / native.p50, 3),
                "detections": int((found[0]["scores"] > 0).sum()),
                "largest_difference": error,
            }
        )
    return rows


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("detectors", type=Path, nargs="+", help="artifacts of detectors")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each file and batch size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the results to this file, as JSON")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for detector in args.detectors:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(detector, args, Path(folder))
    report(f"{args.threads} threads", rows, args.out)


if __name__ == "__main__":
    main()
