"""Every kind of model exported: how far from PyTorch, how fast beside it, and beside timm's encoders.

    python benchmarks/exports.py --work /tmp/exports --calibrate IMAGES --out exports.json
    python benchmarks/exports.py --work W --pretrained runs/a/artifact --segmentor S --detector D
    python benchmarks/exports.py --work W --preset tiny --seconds 0.5 --peers hiera_tiny_224

Encoder, reconstructor and classifier of `--preset`, with random weights unless artifacts are given (the
classifier of a pre-trained encoder has its weights under a random head), segmentor and detector where given;
each at the size it was trained on, in fp32, fp16 and, with `--calibrate`, int8. All of it runs on a CPU, by
PyTorch eagerly, by ONNX Runtime and, with `--devices cpu openvino`, by OpenVINO. With `--rtx` the compiler of
TensorRT-RTX, which needs no GPU, compiles every file too. A detector comes in both of its forms: with
NonMaxSuppression and RoiAlign, and plug-in-free, which is timed at the first batch alone: with eight images
its loops took 13 GB and a quarter of an hour.

Errors are those of `coma export`: every file against PyTorch in fp32, on images, at several batches, held to
the limits of its precision. "least cosine" and "largest error" are the worst of all outputs and images.
Peers, 1,000-class classifiers of timm with random weights, take the same way: torch.onnx.export (dynamo,
opset 18, dynamic batch), the same check, the same runtimes.

Every model has a process of its own, so that the memory is that of one model. In it all runtimes of the model
run in turns, warm, at every batch; speed is relative to PyTorch's median. `--work` keeps artifacts, exports
and what compiler and check said of them: a run that was stopped, or is repeated, takes up what is finished,
and `--seconds 0` prepares all of it without timing. Give another one after changes to the exporter. Rows in
`--out` with the same versions, clock and batches are not measured again while `--work` holds their files.
Exporting takes a minute or two for each file of `small` on two cores. On cores that others use too,
`--threads 1` or OMP_WAIT_POLICY=passive gives steadier numbers: PyTorch's threads wait actively for each
other. There `--cpu-time`, with one thread, counts only the seconds that the process computed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import timm
import torch
from exported_models import KINDS, PEERS, Model, Peer, models_of
from machine import table
from torch import Tensor

from coma.config import ENCODER_PRESETS
from coma.errors import CheckFailed
from coma.runtimes.base import Runtime
from coma.runtimes.manifest import machine, versions
from coma.runtimes.model_spec import METADATA, ModelSpec, Precision, read_model_spec, to_json
from coma.runtimes.open import open_onnx
from coma.runtimes.preprocessing import resize_image, to_input
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shape, Shapes
from coma.runtimes.tensorrt.profiles import profile_of
from export.benchmark import busy_note
from export.graphs.detector import AFTER_BACKBONE
from export.graphs.load import named_examples
from export.image_sets import read_image_set
from export.latency import Latency, time_interleaved
from export.onnx_export import cast_weights, write_onnx
from export.preprocessing import open_images
from export.quantization import quantize_int8
from export.tensorrt.rtx import check_rtx
from export.verify.parity import verify

PRECISIONS = ("fp32", "fp16", "int8")
CLOCKS = {False: time.perf_counter, True: time.process_time}
COMPILING = 1200
"""Seconds after which a compilation with TensorRT-RTX is stopped."""


@dataclass(frozen=True)
class Entrant:
    """A model in one precision, by one runtime.

    Attributes:
        model: Which one.
        precision: Of its products.
        runtime: Who computes.
        file: None of PyTorch's.
        verification: How far it is from PyTorch; None of PyTorch itself.
        seconds: That exporting took; None where it was done before.
    """

    model: Model
    precision: Precision
    runtime: Runtime
    file: Path | None = None
    verification: dict[str, Any] | None = None
    seconds: float | None = None


def entrants_of(model: Model, args: argparse.Namespace) -> list[Entrant]:
    """PyTorch and every file of a model, the files made where they are not there yet, and checked."""
    pictures = read(model.verify, 3, args.verify_images)
    reference = TorchRuntime(model.load())
    found = [Entrant(model, "fp32", reference)]
    shapes = shapes_of(model.side, args)
    for precision in model.precisions:
        images = f"-{named(model.calibrate, args.calibrate_images)}" if precision == "int8" else ""
        path = file_of(model, reference.spec, precision + images, shapes, args.work)
        seconds = None
        if not path.exists():
            print(f"{model.name} {precision}: exporting", flush=True)
            started = time.perf_counter()
            plain = file_of(model, reference.spec, "fp32", shapes, args.work)
            export(model, precision, shapes, path, plain, args)
            seconds = time.perf_counter() - started
        for device in args.devices:
            runtime = open_onnx(path, device, args.threads)
            kept_in = path.with_suffix(f".{device}-{named(model.verify, args.verify_images)}.json")
            if not kept_in.exists():
                print(f"{model.name} {precision}, {device}: comparing with PyTorch", flush=True)
                verdict = verify(reference, runtime, shapes, pictures).to_dict()
                kept_in.write_text(json.dumps(verdict), encoding="utf-8")
            verification = json.loads(kept_in.read_text(encoding="utf-8"))
            found.append(Entrant(model, precision, runtime, path, verification, seconds))
    return found


def shapes_of(side: int, args: argparse.Namespace) -> Shapes:
    """What files of this size take: every batch between the least and the most."""
    least, most = (Shape(batch, side, side) for batch in (min(args.batches), max(args.batches)))
    return Shapes(least, most, most)


def named(place: Path | None, count: int) -> str:
    """Images of a folder, for the names of files that depend on them."""
    return f"{count}-of-{'-'.join(place.parts[-2:]) if place else 'scikit-image'}"


def compiled_by_rtx(path: Path, shapes: Shapes) -> str:
    """What TensorRT-RTX's compiler, in a process of its own, says of a file; kept beside it."""
    kept_in = path.with_suffix(".rtx.txt")
    ends = time.monotonic() + COMPILING

    def stop_when_late(*_: object) -> None:
        if time.monotonic() > ends:
            raise CheckFailed(f"{path}: not compiled after {COMPILING} s")

    if not kept_in.exists():
        print(f"{path.name}: compiling with TensorRT-RTX", flush=True)
        try:
            profile = profile_of(read_model_spec(onnx.load(path), path.name), shapes)
            report = check_rtx(path, (profile,), progress=stop_when_late)
            said = f"compiled in {report.seconds:.0f} s"
        except CheckFailed as error:
            said = f"refused: {str(error).removeprefix(f'{path}: ')}"
        kept_in.write_text(said, encoding="utf-8")
    return kept_in.read_text(encoding="utf-8")


def file_of(model: Model, spec: ModelSpec, how: str, shapes: Shapes, work: Path) -> Path:
    """Where a file lies: its name says of which weights it was made, for which shapes and by which torch."""
    source = spec.source[:8] if " " not in spec.source else f"timm-{timm.__version__}"
    batches = "-".join(str(each.batch) for each in (shapes.min, shapes.max))
    made_by = f"torch-{torch.__version__.partition('+')[0]}"
    return work / f"{model.name}-{source}-{model.side}-batch-{batches}-{made_by}-{how}.onnx"


def export(
    model: Model,
    precision: Precision,
    shapes: Shapes,
    path: Path,
    plain: Path,
    args: argparse.Namespace,
) -> None:
    """Write one file; it appears whole or not at all. `plain` is the fp32 one, made for int8 if need be."""
    exportable = model.load()
    if isinstance(exportable.module, Peer):
        exportable.module.spell_out()
    if precision != "int8":
        write_onnx(cast_weights(exportable, precision), shapes, path, model.plugin_free)
        return
    if not plain.exists():
        write_onnx(exportable, shapes, plain, model.plugin_free)
    spec = replace(read_model_spec(onnx.load(plain), plain.name), precision=precision)
    pictures = read(model.calibrate, cast(int, spec.inputs[0].axes[1]), args.calibrate_images)
    batches = (inputs_of(spec, [picture], model.side, 1) for picture in pictures)
    arrays = ({name: tensor.numpy() for name, tensor in inputs.items()} for inputs in batches)
    exclude = AFTER_BACKBONE if spec.graph == "detector" else ()
    quantize_int8(plain, path, arrays, metadata={METADATA: to_json(spec)}, exclude=exclude)


@cache
def read(place: Path | None, channels: int, most: int) -> list[np.ndarray]:
    """Some of the images there, or scikit-image's photographs."""
    return list(read_image_set(open_images(place), channels, most).pictures)


def inputs_of(spec: ModelSpec, pictures: list[np.ndarray], side: int, batch: int) -> dict[str, Tensor]:
    """A batch as a model takes it."""
    rule, size = spec.preprocessing, (side, side)
    inputs = named_examples(spec, batch, *size)
    shown = [resize_image(picture, rule, size) for picture in pictures[:batch]]
    return inputs | {"images": to_input([shown[i % len(shown)] for i in range(batch)], rule)}


def measure(model: Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a model; its runtimes are timed in turns."""
    torch.set_num_threads(args.threads)
    entrants = entrants_of(model, args)
    latencies: list[dict[int, Latency]] = [{} for _ in entrants]
    for batch in args.batches[: 1 if model.plugin_free else None] if args.seconds else ():
        print(f"{model.name}: timing {len(entrants)} runtimes in turns at batch {batch}", flush=True)
        pictures = read(model.verify, 3, args.verify_images)
        calls = [
            partial(entrant.runtime, **inputs_of(entrant.runtime.spec, pictures, model.side, batch))
            for entrant in entrants
        ]
        timed = time_interleaved(calls, batch, args.seconds, clock=CLOCKS[args.cpu_time])
        for found, latency in zip(latencies, timed, strict=True):
            found[batch] = latency
    return [as_plain(*each) for each in zip(entrants, latencies, strict=True)]


def as_plain(entrant: Entrant, latencies: dict[int, Latency]) -> dict[str, Any]:
    """A row, in numbers."""
    outputs = list(entrant.verification["outputs"].values()) if entrant.verification else []

    def known(name: str) -> list[float]:
        return [each[name] for each in outputs if each[name] is not None]

    return {
        "model": entrant.model.name,
        "weights": entrant.model.weights,
        "side": entrant.model.side,
        "precision": entrant.precision,
        "runtime": entrant.runtime.title,
        "file": entrant.file and entrant.file.name,
        "megabytes": entrant.file and entrant.file.stat().st_size / 1e6,
        "export_seconds": entrant.seconds,
        "least_cosine": min(known("cosine"), default=None),
        "largest_error": max(known("max"), default=None),
        "rtx": "",
        "verification": entrant.verification,
        "latency": {str(batch): vars(latency) for batch, latency in latencies.items()},
    }


def matrix(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A line for every model and precision: milliseconds of PyTorch, and how much faster the others are."""
    eager = {row["model"]: row for row in rows if row["verification"] is None}
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in (row for row in rows if row["verification"]):
        first = eager[row["model"]]
        fresh = {"model": row["model"], "px": str(row["side"]), "weights": row["weights"]}
        fresh |= {"precision": row["precision"], "MB": f"{row['megabytes']:.1f}"}
        line = lines.setdefault((row["model"], row["precision"]), fresh)
        runtime = row["runtime"].partition(",")[0]
        for batch, latency in row["latency"].items():
            eager_ms = first["latency"][batch]["p50"]
            line[f"PyTorch, {batch}: ms"] = f"{eager_ms:.3g}" if eager_ms < 100 else f"{eager_ms:.0f}"
            line[f"{runtime}, {batch}: speed"] = f"{eager_ms / latency['p50']:.2f}"
        said = "; ".join(row["verification"]["failures"]) or f"{row['least_cosine']:.7f}"
        line[f"{runtime}: cosine"] = said
        line["RTX"] = row["rtx"][:40]
    return list(lines.values())


def measured_before(args: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of models in `--out` that this run would measure in the same way, of the same files."""
    if not (args.out and args.out.exists()):
        return []
    known = json.loads(args.out.read_text(encoding="utf-8"))
    same = ("machine", "versions", "threads", "clock", "seconds", "batches")
    if any(known.get(name) != facts[name] for name in same):
        return []
    lost = {row["model"] for row in known["rows"] if row["file"] and not (args.work / row["file"]).exists()}
    return [row for row in known["rows"] if row["model"] not in lost]


def main() -> None:
    """Export what is missing, compare, time, print; `--out` keeps all numbers as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for artifacts and exports")
    parser.add_argument("--preset", default="small", choices=ENCODER_PRESETS)
    parser.add_argument("--size", type=int, default=224, help="of the preset's images, in pixels")
    parser.add_argument("--visible-units", type=int, help="of graphs that compute listed units")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    for kind in ("pretrained", "classifier", "segmentor", "detector"):
        parser.add_argument(f"--{kind}", type=Path, metavar="ARTIFACT")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default: those possible")
    parser.add_argument("--devices", nargs="+", choices=("cpu", "openvino"), default=["cpu"])
    parser.add_argument("--rtx", action="store_true", help="compile every file with TensorRT-RTX too")
    parser.add_argument("--calibrate", type=Path, metavar="IMAGES", help="int8 needs it")
    parser.add_argument("--calibrate-images", type=int, default=64)
    parser.add_argument("--verify", type=Path, metavar="IMAGES", help="default: scikit-image's photographs")
    for kind in ("segmentor", "detector"):
        parser.add_argument(
            f"--{kind}-images", type=Path, nargs=2, metavar=("CALIBRATE", "VERIFY"), help="of its own kind"
        )
    parser.add_argument("--verify-images", type=int, default=16)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help="names of timm's models for 224 px")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each runtime at each batch")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds of one thread")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    precisions = tuple(args.precisions or (PRECISIONS if args.calibrate else PRECISIONS[:-1]))
    if "int8" in precisions and not args.calibrate:
        parser.error("int8 needs --calibrate IMAGES")
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time adds up what threads compute at once: it needs --threads 1")

    started = time.perf_counter()
    note = busy_note(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    facts = {
        "machine": machine(),
        "versions": versions(),
        "threads": args.threads,
        "clock": CLOCKS[args.cpu_time].__name__,
        "seconds": args.seconds,
        "batches": args.batches,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "busy": note,
        "verified_on": f"up to {args.verify_images} images of {args.verify or 'scikit-image'}",
    }
    rows = measured_before(args, facts)
    done = {row["model"] for row in rows}

    def save() -> None:
        facts["seconds_in_all"] = time.perf_counter() - started
        if args.out:
            args.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        waiting = (model for model in models_of(args, precisions) if model.name not in done)
        for found in pool.map(partial(measure, args=args), waiting):
            rows += found
            save()
    for row in (row for row in rows if args.rtx and row["file"]):  # after all that is timed
        row["rtx"] = compiled_by_rtx(args.work / row["file"], shapes_of(row["side"], args))
        save()
    print(
        f"\n{facts['machine']}, {args.threads} thread(s); torch {torch.__version__}, "
        f"timm {timm.__version__}; {facts['verified_on']}; {args.seconds:g} s each, "
        f"{facts['seconds_in_all']:.0f} s in all"
    )
    if note:
        print(f"note: {note}")
    print("\n" + table(matrix(rows)))


if __name__ == "__main__":
    main()
