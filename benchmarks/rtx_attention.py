"""How many attentions TensorRT-RTX fuses into one kernel, by precision of the file; needs no GPU.

    python benchmarks/rtx_attention.py --presets small vit-small --out rtx_attention_cpu.json

Encoders of random weights are written for a batch of 1 to 8, quantised from one random batch, and compiled.
Engines of TensorRT-RTX 1.7 hold the source of every kernel; one of fused attention names
`_gemm_mha_v2_params_t` four times.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from exported_models import random_pretrained
from machine import report

from coma.runtimes.model_spec import METADATA, Precision, eight_bit_part, float_part, to_json
from coma.runtimes.shape_ranges import Shape, Shapes
from coma.runtimes.tensorrt.discovery import load_library
from coma.runtimes.tensorrt.profiles import profile_of
from coma.runtimes.tensorrt.sidecar import EngineOptions
from export.graphs.load import load_exportable
from export.onnx_export import cast_weights, read_spec, write_onnx
from export.quantization import quantize_fp8, quantize_int8
from export.tensorrt.builder import compile_plan

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int8+fp16", "fp8", "fp8+fp16")


def measure(preset: str, side: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields one row for each precision."""
    artifact = random_pretrained(folder, preset, side)
    shapes = Shapes(Shape(1, side, side), Shape(8, side, side), Shape(8, side, side))
    batch = {"images": np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32)}
    library = load_library("tensorrt_rtx")
    for precision in PRECISIONS:
        file, base = (folder / f"{preset}-{each}.onnx" for each in (precision, float_part(precision)))
        if eight := eight_bit_part(precision):
            metadata = {METADATA: to_json(replace(read_spec(base), precision=precision))}
            quantize = quantize_int8 if eight == "int8" else quantize_fp8
            quantize(base, file, [batch], metadata=metadata)
        else:
            write_onnx(cast_weights(load_exportable(artifact, "encoder"), precision), shapes, file)
        plan = compile_plan(library, file, (profile_of(read_spec(file), shapes),), EngineOptions())
        operators = [node.op_type for node in onnx.load(file).graph.node]
        yield {
            "model": preset,
            "precision": precision,
            "file, MB": round(file.stat().st_size / 1e6, 1),
            "pairs": operators.count("QuantizeLinear"),
            "layers": plan.layers,
            "seconds": round(plan.seconds, 1),
            "fused attentions": bytes(plan.data).count(b"_gemm_mha_v2_params_t") // 4,
        }


def main() -> None:
    """Compiles and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["small", "vit-small"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, help="also write the results to this file, as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for preset in args.presets:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(preset, args.size, Path(folder)):
                print(row, flush=True)
                rows.append(row)
    report(load_library("tensorrt_rtx").title, rows, args.out)


if __name__ == "__main__":
    main()
