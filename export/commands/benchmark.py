"""Time an artifact in PyTorch and in every file exported of it, side by side."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from coma.arguments import parse_arguments
from coma.atomic_io import write_whole
from coma.errors import BadInput
from coma.preflight import require_file
from coma.ranges import BATCH, SIDE, Range, Ranged
from coma.runtimes.shape_ranges import Shape, check_pixels
from export.commands.output import disk_errors, stoppable

if TYPE_CHECKING:
    from rich.table import Table

    from coma.artifact import ArtifactConfig
    from coma.runtimes.model_spec import GraphKind
    from export.benchmark import Contender, NotRun, Row
    from export.image_sets import ImageSet

FORMAT_VERSION = 1


@dataclass(frozen=True)
class BenchmarkConfig(Ranged):
    """Time an artifact in PyTorch and in every file exported of it, side by side.

    All run in turns, warm, so that whatever else the machine does disturbs them alike. Compute is from
    tensors, on the device already, to outputs; end to end is from the bytes of image files, decoding and
    resizing in one thread included. What cannot be run is listed with the reason.
    """

    artifact: Annotated[Path, tyro.conf.Positional]
    """Of any kind: backbone, pretrained, classifier, segmentor, detector."""
    exports: Path | None = None
    """Folder that coma export wrote (default: export beside the artifact, if it is there)."""
    graph: Literal["encoder", "reconstructor"] | None = None
    """Of a pre-trained artifact: which half of it (default: encoder)."""
    device: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """Where .onnx files run, by ONNX Runtime's provider of that name; PyTorch runs on the same processor.
    Engines run wherever there is a GPU."""
    batch: str = "1,8"
    """Images at a time, with commas between."""
    size: str | None = None
    """Height and width in pixels, HxW (default: as it was trained)."""
    seconds: Annotated[float, Range(0, 86400, above=True)] = 2.0
    """How long each is run at each batch, and as long again from end to end; at least five times."""
    compile: bool = False
    """Also PyTorch compiled by torch.compile, which takes a minute or more for each batch."""
    threads: Annotated[int | None, Range(1, 4096)] = None
    """Of a CPU, for PyTorch and ONNX Runtime alike (default: what PyTorch takes)."""
    images: Path | None = None
    """What is shown: a folder, .npz or .tar shards (default: photographs that came with scikit-image)."""
    out: Path | None = None
    """Also write the results to this file, as JSON, with machine and versions."""


def run(argv: list[str]) -> None:
    """Parse, load, time, print a table.

    Raises:
        BadInput: settings, artifacts, images or files that cannot be used.
    """
    given = parse_arguments(BenchmarkConfig, argv, prog="coma benchmark")
    batches = parse_batches(given.batch)
    if given.out:
        require_file(given.out)  # now, not after minutes of measuring

    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(given.threads or before)
    try:
        with stoppable(), disk_errors(given.out or given.artifact):
            _benchmark(given, batches)
    finally:
        torch.set_num_threads(before)


def parse_batches(text: str) -> tuple[int, ...]:
    """`1,8`, each once.

    Raises:
        BadInput: anything but numbers from 1, with commas between.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise BadInput(f"--batch {text!r}: give whole numbers with commas between, for example 1,8")
    batches = tuple(dict.fromkeys(map(int, parts)))
    BATCH.check("--batch", batches)
    return batches


def parse_size(text: str | None, config: ArtifactConfig, graph: GraphKind) -> tuple[int, int]:
    """`224x224`, height first; None: the size that this graph was trained on.

    Raises:
        BadInput: not two numbers, or less than a mask unit.
    """
    from export.graphs.load import size_of

    unit = config.model.unit
    if text is None:
        side = size_of(config, graph)
        return side, side
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
        raise BadInput(f"--size {text!r}: give HxW in pixels, for example 224x224")
    height, width = map(int, parts)
    SIDE.check("--size", (height, width))
    if min(height, width) < unit:
        raise BadInput(f"--size {text}: the encoder's mask unit is {unit} x {unit} px; give at least that")
    return height, width


def choose_graph(wanted: str | None, artifact: Path, kind: str) -> GraphKind:
    """The graph that is compared.

    Raises:
        BadInput: the artifact has no such graph.
    """
    from coma.runtimes.model_spec import GRAPH_KINDS

    for graph in GRAPH_KINDS[kind]:
        if wanted in (None, graph):
            return graph
    raise BadInput(
        f"--graph {wanted}: {artifact} is a {kind}; of it there is {' and '.join(GRAPH_KINDS[kind])}"
    )


def _benchmark(given: BenchmarkConfig, batches: tuple[int, ...]) -> None:
    from rich.console import Console

    from coma.artifact import load_artifact
    from coma.artifact.load import artifact_hash
    from coma.runtimes.manifest import machine, versions
    from export.benchmark import busy_note

    config = load_artifact(given.artifact).config
    graph = choose_graph(given.graph, given.artifact, config.kind)
    size = parse_size(given.size, config, graph)
    check_pixels(Shape(max(batches), *size), "--batch and --size")
    contenders, images, absent = _load(given, graph, config.model.channels, max(batches))
    note = busy_note(_threads())
    rows: list[Row] = []
    for batch in batches:
        found, left_out = _measure(given, contenders, images, batch, size)
        rows += found
        absent += left_out
    if not rows:
        raise BadInput(f"{given.artifact}: nothing could be run; " + "; ".join(_lines(absent)))
    shown = str(images.selection)
    if len(images.pictures) < max(batches):
        shown += ", repeated in larger batches"
    plain: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "artifact": given.artifact.resolve().name,
        "source": artifact_hash(given.artifact),
        "kind": config.kind,
        "graph": graph,
        "device": given.device,
        "size": list(size),
        "threads": _threads(),
        "seconds": given.seconds,
        "images": shown,
        "left_out": images.selection.left_out,
        "rows": [row.plain() for row in rows],
        "not_run": [asdict(each) for each in absent],
        "note": note,
        "machine": machine(),
        "versions": versions(),
    }
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)  # a file or a pipe: lines as long as they are
    about = f"{given.artifact}: {graph}, {size[0]} x {size[1]} px, {shown}"
    console.print(f"{about}\n{plain['machine']}, {plain['threads']} thread(s)", soft_wrap=True, markup=False)
    for batch in dict.fromkeys(row.batch for row in rows):
        console.print(_table([row for row in rows if row.batch == batch], batch))
    for line in _lines(absent):
        console.print(f"not run  {line}", soft_wrap=True, markup=False)
    if note:
        console.print(f"note     {note}", soft_wrap=True, markup=False)
    if given.out:
        text = json.dumps(plain, indent=1) + "\n"
        write_whole(given.out, lambda file: file.write(text.encode()))
        console.print(f"results  {given.out}", soft_wrap=True, markup=False)


def _load(
    given: BenchmarkConfig, graph: GraphKind, channels: int, most: int
) -> tuple[list[Contender], ImageSet, list[NotRun]]:
    from coma.progress import Progress
    from export.benchmark import MOST_IMAGES, NotRun, exported, open_exports, open_torch
    from export.image_sets import TIMING, read_image_set
    from export.job import folder_beside
    from export.preprocessing import open_images

    folder = given.exports or folder_beside(given.artifact)
    with Progress() as progress:
        progress.step("reading images and hashes of files")
        entries, absent = exported(folder, given.artifact, graph, required=given.exports is not None)
        images = read_image_set(open_images(given.images), channels, min(most, MOST_IMAGES), TIMING)
        if not images.files and graph != "reconstructor":
            absent.append(NotRun("end to end", f"{images.selection.location} holds no image files to decode"))
        progress.step("loading PyTorch's model")
        contenders, more = open_torch(given.artifact, graph, given.device, given.compile)
        others, unfit = open_exports(folder, entries, given.device, _threads(), progress)
    return [*contenders, *others], images, [*absent, *more, *unfit]


def _measure(
    given: BenchmarkConfig, contenders: list[Contender], images: ImageSet, batch: int, size: tuple[int, int]
) -> tuple[list[Row], list[NotRun]]:
    from coma.progress import Progress
    from export.benchmark import expected_seconds, measure, try_out

    with Progress() as progress:
        calls, absent = try_out(contenders, images, batch, size, progress)
    if not calls:
        return [], absent
    # no bar meanwhile: one that is drawn ten times a second would be measured too
    lasts = expected_seconds(calls, given.seconds)
    progress.say(f"batch {batch}: timing {len(calls)} calls in turns, about {max(lasts, 1):.0f} s")
    return measure(calls, batch, given.seconds), absent


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _table(rows: list[Row], batch: int) -> Table:
    from rich.table import Table

    table = Table(title=f"batch of {batch}", title_justify="left")
    for heading in ("", "model", "precision", "run by"):
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
        table.add_row(what, row.name, row.precision, row.runtime, *map(_short, numbers), speed)
    table.caption = "speed: of PyTorch's median time on the same device, how many times faster"
    return table


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _lines(absent: list[NotRun]) -> list[str]:
    def at(each: NotRun) -> str:
        return "" if each.batch is None else f" at a batch of {each.batch}"

    return [f"{each.name}{at(each)}: {each.reason}" for each in absent]
