"""Our int8 quantisation beside ONNX Runtime's `quantize_static`, from the same images, for the same layers.

    python benchmarks/quantize_static.py ARTIFACT [ARTIFACT ...] --calibrate FOLDER --verify FOLDER

Each way runs in a process of its own, which says how long it took and how much memory at most (resident, with
the packages that it loads). ONNX Runtime's calibrator holds the activations of all images at once; the way
"strided" makes it read one image after another. Errors are the largest relative errors of an output of an
image against PyTorch; the files are timed in turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import report
from onnxruntime.quantization import CalibrationDataReader

from coma.errors import CheckFailed
from coma.runtimes.model_spec import METADATA, to_json
from coma.runtimes.onnxruntime import OnnxRuntime
from coma.runtimes.preprocessing import resize_image, to_input
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shape, Shapes
from coma.runtimes.tensorrt.profiles import profile_of
from export.graphs.load import load_exportable
from export.image_sets import read_image_set
from export.latency import time_interleaved
from export.onnx_export import load_onnx, read_spec, write_onnx
from export.preprocessing import open_images
from export.quantization import quantize_int8
from export.quantization.qdq import weight_matmuls
from export.tensorrt.rtx import check_rtx
from export.verify.parity import verify

PERCENTILE = 99.99
WAYS = ("ours", "quantize_static", "quantize_static, strided")


class Reader(CalibrationDataReader):
    """The images, one at a time, as a CalibrationDataReader of ONNX Runtime gives them."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.batches, self.rest = batches, iter(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def get_next(self) -> Any:
        """Returns the next image, or None."""
        return next(self.rest, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Continues with these images."""
        self.rest = iter(self.batches[start_index:end_index])


def quantize(way: str, source: Path, target: Path, batches: list[dict[str, np.ndarray]]) -> None:
    """Quantises a file in one of the ways."""
    metadata = {METADATA: to_json(replace(read_spec(source), precision="int8"))}
    if way == "ours":
        quantize_int8(source, target, batches, "percentile", percentile=PERCENTILE, metadata=metadata)
        return
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = load_onnx(source)
    outputs = [each.output for each in weight_matmuls(model.graph)][1:]
    options: dict[str, Any] = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "CalibTensorRangeSymmetric": True,
        "CalibPercentile": PERCENTILE,
        # an activation has a pair only before the layers that are quantised, none behind them
        "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm", "Conv"],
    }
    if "strided" in way:
        options["CalibStridedMinMax"] = 1
    quantize_static(
        source,
        target,
        Reader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=[node.name for node in model.graph.node if node.output[0] in outputs],
        calibrate_method=CalibrationMethod.Percentile,
        extra_options=options,
    )
    written = onnx.load(target)
    onnx.helper.set_model_props(written, metadata)
    onnx.save(written, target)


def child(way: str, source: Path, target: Path, arrays: Path, result: Path) -> None:
    """Quantises, and writes down seconds and peak memory."""
    batches = [{"images": each[None]} for each in np.load(arrays)]
    started = time.perf_counter()
    quantize(way, source, target, batches)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result.write_text(json.dumps({"seconds": round(seconds, 1), "peak MB": peak // 1024}))


def measure(artifact: Path, graph: Any, args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields one row for each way."""
    exportable = load_exportable(artifact, graph)
    rule, unit = exportable.spec.preprocessing, exportable.spec.unit
    sets = [
        read_image_set(open_images(place), len(rule.mean), count).pictures
        for place, count in ((args.calibrate, args.images), (args.verify, args.verify_images))
    ]
    side = -(-args.size // unit) * unit
    arrays = torch.cat([to_input([resize_image(each, rule, (side, side))], rule) for each in sets[0]])
    np.save(folder / "arrays.npy", arrays.numpy())
    shapes = Shapes(Shape(1, side, side), Shape(1, side, side), Shape(2, side, side))
    source = folder / "fp32.onnx"
    write_onnx(exportable, shapes, source)
    files = {"fp32": source}
    rows: dict[str, dict[str, Any]] = {"fp32": {}}
    for number, way in enumerate(WAYS):
        files[way], result = folder / f"{number}.onnx", folder / f"{number}.json"
        spawn = multiprocessing.get_context("spawn")
        job = spawn.Process(target=child, args=(way, source, files[way], folder / "arrays.npy", result))
        job.start()
        job.join()
        rows[way] = json.loads(result.read_text())
    runtimes = {way: OnnxRuntime(file, "cpu", args.threads) for way, file in files.items()}
    latencies = time_interleaved(
        [partial(each, images=arrays[:1]) for each in runtimes.values()], 1, args.seconds
    )
    reference = TorchRuntime(exportable)
    for (way, runtime), latency in zip(runtimes.items(), latencies, strict=True):
        name = artifact.parent.name if artifact.name == "artifact" else artifact.name
        row = {"model": f"{name} {graph}", "way": way, **rows[way]}
        row |= {"MB": round(files[way].stat().st_size / 1e6, 1), "ms": round(latency.p50, 1)}
        errors = verify(reference, runtime, shapes, sets[1]).outputs
        row |= {f"error {name}": f"{each.relative:.2%}" for name, each in errors.items() if each.compared}
        if not args.no_rtx:
            try:
                report = check_rtx(files[way], (profile_of(runtime.spec, shapes),))
                row["RTX"] = f"{report.layers} layers"
            except CheckFailed as error:
                row["RTX"] = str(error)[:200]
        yield row


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path, nargs="+", help="ARTIFACT:GRAPH")
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--verify", type=Path, required=True)
    parser.add_argument("--images", type=int, default=32, help="to calibrate with")
    parser.add_argument("--verify-images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=5.0, help="to time each file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-rtx", action="store_true", help="do not compile the files with TensorRT-RTX")
    parser.add_argument("--out", type=Path, help="also write the results to this file, as JSON")
    args = parser.parse_args()
    images = f"{args.images} images to calibrate with, up to {args.verify_images} others to compare on"
    how = f"{images}; {args.threads} thread(s), {args.size} px"
    rows: list[dict[str, Any]] = []
    for given in args.artifacts:
        artifact, _, graph = str(given).partition(":")
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(Path(artifact), graph, args, Path(folder)):
                print(row, flush=True)
                rows.append(row)
        report(how, rows, args.out)


if __name__ == "__main__":
    main()
