"""Measure the latency of an artifact in PyTorch and in all files exported from it, side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from coma.arguments import parse_arguments
from coma.atomic_io import write_json
from coma.errors import BadInput
from coma.paths import Location
from coma.preflight import require_file, require_packages
from coma.ranges import BATCH, SIDE, Range, Ranged
from coma.runtimes.names import is_openvino, parse_devices
from coma.runtimes.shape_ranges import Shape, check_pixels
from coma.signals import sigterm_interrupts
from export.output import disk_errors

if TYPE_CHECKING:
    from rich.table import Table

    from coma.artifact import ArtifactConfig
    from coma.runtimes.model_spec import GraphKind
    from export.benchmark import LoadedModel, NotRun, Row
    from export.image_sets import ImageSet

FORMAT_VERSION = 2


@dataclass(frozen=True)
class BenchmarkConfig(Ranged):
    """Measure the latency of an artifact in PyTorch and in all files exported from it, side by side.

    All models run warm and in turns, so that disturbances affect them alike. "Compute" is the time from
    tensors on the device to outputs; "end to end" is the time from the bytes of image files, with decoding
    and resizing in one thread. Models that cannot run are listed with the reason.
    """

    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact directory of any kind: backbone, pretrained, classifier, segmentor or detector; or tiny-64,
    which comes with the package."""
    exports: Path | None = None
    """Folder that coma export wrote (default: the folder export beside the artifact, if it exists)."""
    graph: Literal["encoder", "reconstructor"] | None = None
    """Graph of a pre-trained artifact (default: encoder)."""
    visible_units: Annotated[int | None, Range(1, 10**6)] = None
    """Time the graph that takes a list of this many visible units, as coma export --visible-units writes it,
    beside PyTorch that computes these alone."""
    device: str = "cpu"
    """Where .onnx files run, separated by commas: cpu, cuda and tensorrt (execution providers of ONNX
    Runtime), openvino (a CPU), openvino-gpu (an Intel GPU). PyTorch runs beside them, and engines on any
    GPU."""
    batch: str = "1,8"
    """Batch sizes, separated by commas."""
    size: str | None = None
    """Image height and width in pixels, HxW (default: the training size)."""
    benchmark_seconds: Annotated[float, Range(0, 86400, above=True)] = 2.0
    """Seconds to time each model at each batch size, once for compute and once end to end; at least five
    runs."""
    compile: bool = False
    """Also time PyTorch with torch.compile, which compiles for a minute or more per batch size."""
    threads: Annotated[int | None, Range(1, 4096)] = None
    """CPU threads of PyTorch, ONNX Runtime and OpenVINO (default: PyTorch's number)."""
    images: Location | None = None
    """Input images: a folder, .npz or .tar shards (default: photographs bundled with scikit-image)."""
    out: Path | None = None
    """JSON file for the results, the machine and the versions."""


def run(argv: list[str]) -> None:
    """Parses the arguments, loads the models, times them and prints a table.

    Raises:
        BadInput: settings, an artifact, images or files that cannot be used.
    """
    config = parse_arguments(BenchmarkConfig, argv, prog="coma benchmark")
    batches, devices = parse_batches(config.batch), parse_devices(config.device)
    if any(map(is_openvino, devices)):
        require_packages("openvino")
    if config.out:
        require_file(config.out)  # now, not after minutes of measuring

    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        with sigterm_interrupts("no results were written"), disk_errors(config.out or config.artifact):
            _benchmark(config, batches)
    finally:
        torch.set_num_threads(before)


def parse_batches(text: str) -> tuple[int, ...]:
    """Parses batch sizes such as `1,8` and drops repetitions.

    Raises:
        BadInput: something other than positive integers separated by commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise BadInput(f"--batch {text!r}: give whole numbers separated by commas, for example 1,8")
    batches = tuple(dict.fromkeys(map(int, parts)))
    BATCH.check("--batch", batches)
    return batches


def parse_size(text: str | None, config: ArtifactConfig, graph: GraphKind) -> tuple[int, int]:
    """Parses a height and width such as `224x224`; without a text, returns the training size of the graph.

    Raises:
        BadInput: something other than two numbers, or a side smaller than a mask unit.
    """
    from export.graphs.load import size_of

    unit = config.model.unit
    if text is None:
        return size_of(config, graph)
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
        raise BadInput(f"--size {text!r}: give HxW in pixels, for example 224x224")
    height, width = map(int, parts)
    SIDE.check("--size", (height, width))
    if min(height, width) < unit:
        raise BadInput(f"--size {text}: the encoder's mask unit is {unit} x {unit} px; give at least that")
    return height, width


def choose_graph(wanted: str | None, artifact: Path, kind: str) -> GraphKind:
    """Returns the graph to time: the wanted one, or the first of the artifact.

    Raises:
        BadInput: the artifact has no such graph.
    """
    from coma.runtimes.model_spec import GRAPH_KINDS

    for graph in GRAPH_KINDS[kind]:
        if wanted in (None, graph):
            return graph
    raise BadInput(f"--graph {wanted}: {artifact} is a {kind}; its graph is {' or '.join(GRAPH_KINDS[kind])}")


def _benchmark(config: BenchmarkConfig, batches: tuple[int, ...]) -> None:
    from rich.console import Console

    from coma.artifact import load_artifact
    from coma.artifact.load import artifact_hash
    from coma.runtimes.manifest import machine, versions
    from export.benchmark import busy_note
    from export.graphs.load import check_takes_list, check_visible_units

    artifact = load_artifact(config.artifact).config
    graph = choose_graph(config.graph, config.artifact, artifact.kind)
    size = parse_size(config.size, artifact, graph)
    check_pixels(Shape(max(batches), *size), "--batch and --size")
    if config.visible_units:
        check_takes_list(config.artifact, graph, artifact)
        check_visible_units(config.visible_units, *size, artifact.model.unit)
    models, images, absent = _load(config, graph, artifact.model.channels, max(batches))
    note = busy_note(_threads())
    rows: list[Row] = []
    for batch in batches:
        found, left_out = _measure(config, models, images, batch, size)
        rows += found
        absent += left_out
    if not rows:
        raise BadInput(f"{config.artifact}: no model could run; " + "; ".join(_lines(absent)))
    shown = str(images.selection)
    if len(images.pictures) < max(batches):
        shown += ", repeated in larger batches"
    results: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "artifact": config.artifact.resolve().name,
        "source": artifact_hash(config.artifact),
        "kind": artifact.kind,
        "graph": graph,
        "visible_units": config.visible_units,
        "device": config.device,
        "size": list(size),
        "threads": _threads(),
        "seconds": config.benchmark_seconds,
        "images": shown,
        "left_out": images.selection.left_out,
        "rows": [row.to_dict() for row in rows],
        "not_run": [asdict(each) for each in absent],
        "note": note,
        "machine": machine(),
        "versions": versions(),
    }
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)  # a file or a pipe takes long lines
    listed = f", {config.visible_units} visible units" if config.visible_units else ""
    title = f"{config.artifact}: {graph}{listed}, {size[0]} x {size[1]} px, {shown}"
    console.print(
        f"{title}\n{results['machine']}, {results['threads']} thread(s)", soft_wrap=True, markup=False
    )
    for batch in dict.fromkeys(row.batch for row in rows):
        console.print(_table([row for row in rows if row.batch == batch], batch))
    for line in _lines(absent):
        console.print(f"not run  {line}", soft_wrap=True, markup=False)
    if note:
        console.print(f"note     {note}", soft_wrap=True, markup=False)
    if config.out:
        write_json(config.out, results, indent=1)
        console.print(f"results  {config.out}", soft_wrap=True, markup=False)


def _load(
    config: BenchmarkConfig, graph: GraphKind, channels: int, most: int
) -> tuple[list[LoadedModel], ImageSet, list[NotRun]]:
    from coma.paths import exports_beside
    from coma.progress import Progress
    from export.benchmark import MOST_IMAGES, NotRun, list_exports, open_exports, open_torch
    from export.image_sets import TIMING, read_image_set
    from export.preprocessing import open_images

    folder = config.exports or exports_beside(config.artifact)
    with Progress() as progress:
        progress.step("reading images and file hashes")
        entries, absent = list_exports(
            folder, config.artifact, graph, config.exports is not None, config.visible_units
        )
        images = read_image_set(open_images(config.images), channels, min(most, MOST_IMAGES), TIMING)
        if not images.files and graph != "reconstructor" and not config.visible_units:
            absent.append(NotRun("end to end", f"{images.selection.location} holds no image files to decode"))
        progress.step("loading the PyTorch model")
        devices = parse_devices(config.device)
        models, more = open_torch(config.artifact, graph, devices, config.compile, config.visible_units)
        others, unfit = open_exports(folder, entries, devices, _threads(), progress)
    return [*models, *others], images, [*absent, *more, *unfit]


def _measure(
    config: BenchmarkConfig, models: list[LoadedModel], images: ImageSet, batch: int, size: tuple[int, int]
) -> tuple[list[Row], list[NotRun]]:
    from coma.progress import Progress
    from export.benchmark import expected_seconds, measure, prepare_calls

    seconds = config.benchmark_seconds
    with Progress() as progress:
        calls, absent = prepare_calls(models, images, batch, size, progress)
    if not calls:
        return [], absent
    # no bar from here on: drawing it ten times a second would disturb the measurement
    duration = expected_seconds(calls, seconds)
    progress.say(f"batch {batch}: timing {len(calls)} calls in turns, about {max(duration, 1):.0f} s")
    return measure(calls, batch, seconds), absent


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _table(rows: list[Row], batch: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"batch of {batch}", title_justify="left")
    for heading in ("", "model", "precision", "runtime"):
        table.add_column(heading, overflow="fold")
    for heading in ("p50 ms", "p90", "p99", "images/s", "speed"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, row.what):
            table.add_section()
        what, last = row.what if row.what != last else "", row.what
        timed = row.latency
        numbers = (timed.p50, timed.p90, timed.p99, timed.images_per_second)
        speed = "" if row.speed is None else f"{row.speed:.2f} x"
        table.add_row(what, Text(row.name), row.precision, row.runtime, *map(_short, numbers), speed)
    table.caption = "speed: median time of PyTorch on the same device, divided by that of the model"
    return table


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _lines(absent: list[NotRun]) -> list[str]:
    def at(each: NotRun) -> str:
        return "" if each.batch is None else f" at a batch of {each.batch}"

    return [f"{each.name}{at(each)}: {each.reason}" for each in absent]
