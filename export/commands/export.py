"""Export an artifact to ONNX and TensorRT, and prove on images that the files equal it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from coma.arguments import parse_arguments
from coma.errors import BadInput, CheckFailed, ComaError
from coma.messages import counted
from coma.preflight import require_file, require_folder, require_packages
from coma.ranges import Range, Ranged
from coma.runtimes.shape_ranges import Shape, Shapes, parse_shapes
from export.commands.output import disk_errors, exclusive, stoppable

if TYPE_CHECKING:
    from coma.artifact import ArtifactConfig
    from coma.data.sources.base import Source
    from coma.progress import Progress
    from coma.runtimes.model_spec import GraphKind, Precision
    from coma.runtimes.tensorrt.sidecar import EngineOptions
    from export.job import Request
    from export.pipeline import Outcome

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
TARGETS = ("onnx", "tensorrt")
_MOST_BATCH, _USUAL_BATCH = 32, 8


@dataclass(frozen=True)
class EngineConfig(Ranged):
    """How TensorRT builds engines (--to onnx,tensorrt; on the GPU they will run on)."""

    workspace: Annotated[int, Range(1, 2**24)] = 4096
    """Most GPU memory that a layer may use for itself, in MiB."""
    builder_level: Annotated[Literal[0, 1, 2, 3, 4, 5], Range(0, 5)] = 3
    """From 0 (quick build) to 5 (quick engine)."""
    timing_cache: Path | None = None
    """File of measured kernels, read and added to: makes later builds quick."""
    tf32: bool = False
    """Multiply fp32 matrices with 10 bits of mantissa."""
    version_compatible: bool = False
    """Later versions of TensorRT may run the engine."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """Which other GPUs may run it."""
    refit: bool = False
    """Weights can be replaced without building again."""


@dataclass(frozen=True)
class ExportConfig(Ranged):
    """Make ONNX files (and TensorRT engines) of an artifact; keep only what equals it.

    Every file is run beside PyTorch on real images, at several batches and sizes, before it gets its name.
    One that differs by more than its precision allows is kept as NAME.rejected, the module where the error
    starts is named, and the exit code is 1.
    """

    artifact: Annotated[Path, tyro.conf.Positional]
    """Of any kind: backbone, pretrained, classifier, segmentor, detector."""
    to: str = "onnx"
    """onnx, or onnx,tensorrt."""
    precision: str = "fp32"
    """Some of fp32, fp16, bf16, int8, fp8, with commas between."""
    graph: Literal["all", "encoder", "reconstructor"] = "all"
    """Of a pre-trained artifact: which half of it."""
    shapes: str | None = None
    """One shape (static), or least:usual:most, each NxCxHxW. Default: batches of 1 to 32 at the size it was
    trained on; of detectors and segmentors also any height and width from one mask unit up to twice that size
    (at least 800 x 1344 for detectors)."""
    out: Path | None = None
    """Folder for the files, manifest.json and report.md (default: export beside the artifact)."""
    verify: Path | None = None
    """Images to compare on: a folder, .npz or .tar shards (default: photographs that came with scikit-image).
    A folder for each class also gives the top-1 of a classifier; of train and test (or val) test is taken."""
    verify_images: Annotated[int, Range(1, 10**6)] = 16
    """Number of verification images. Broken files, copies and images of one colour do not count; fewer than 4
    that remain are refused unless this number is smaller."""
    dataset: Path | None = None
    """Dataset of a detector or segmentor: its AP or mIoU before and after."""
    metric_images: Annotated[int, Range(1, 10**9)] = 1000
    """Labelled images to measure top-1, AP or mIoU on, at most."""
    calibrate: Path | None = None
    """Images that give int8 and fp8 their ranges (needed for those)."""
    calibrate_images: Annotated[int, Range(1, 10**6)] = 64
    """Number of calibration images. Fewer than 8 that remain are refused unless this number is smaller."""
    calibrate_method: Literal["percentile", "entropy", "minmax"] = "percentile"
    """How far the ranges of int8 reach."""
    exclude_layers: tuple[str, ...] | None = None
    """Layers that int8 and fp8 leave as they are, by module path: "*.merge.*". Default: none, but of
    detectors all behind the backbone, where small errors choose other proposals; none quantises them too."""
    normalize_in_graph: bool = False
    """The files take uint8 pixels; mean and deviation are in the graph."""
    device: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """Where ONNX files are verified and timed: ONNX Runtime's provider."""
    check: Literal["none", "rtx"] = "none"
    """rtx: also let NVIDIA's TensorRT-RTX parse and compile the ONNX files; needs no GPU."""
    seconds: Annotated[float, Range(0, 86400)] = 2.0
    """Time each file beside PyTorch for so long at each batch; 0: do not."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)


def run(argv: list[str]) -> None:
    """Parse, export, verify, report.

    Raises:
        BadInput: settings, artifacts or images that cannot be used.
        CheckFailed: a file did not pass.
    """
    given = parse_arguments(ExportConfig, argv, prog="coma export")
    targets = _choice(given.to, TARGETS, "--to")
    precisions = _choice(given.precision, PRECISIONS, "--precision")
    require_packages("onnx", "onnxscript", "onnxruntime")
    if "tensorrt" in targets:
        from coma.runtimes.tensorrt.discovery import require_gpu, require_package

        require_package("tensorrt")
        require_gpu(0)
    if given.check == "rtx":
        from coma.runtimes.tensorrt.discovery import require_package

        require_package("tensorrt_rtx")
    from export.job import folder_beside

    out = given.out or folder_beside(given.artifact)
    with stoppable(), disk_errors(out):
        _export(given, targets, precisions, out)


def default_shapes(config: ArtifactConfig, graph: GraphKind) -> Shapes:
    """Batches of 1 to 32; free height and width where images are not all of one size."""
    from export.graphs.load import size_of

    side = size_of(config, graph)
    if config.kind not in ("detector", "segmentor"):
        return Shapes(Shape(1, side, side), Shape(_USUAL_BATCH, side, side), Shape(_MOST_BATCH, side, side))
    unit = config.model.unit
    most = (max(2 * side, 800), max(2 * side, 1344)) if config.kind == "detector" else (2 * side, 2 * side)
    return Shapes(Shape(1, unit, unit), Shape(1, side, side), Shape(4, *most))


def _export(given: ExportConfig, targets: tuple[str, ...], precisions: tuple[str, ...], out: Path) -> None:
    from coma.artifact import load_artifact
    from coma.artifact.load import artifact_hash
    from coma.progress import Progress
    from coma.runtimes.manifest import Manifest
    from export.candidates import remove_unfinished
    from export.graphs.load import graph_kinds_of
    from export.pipeline import Outcome, export, require
    from export.report import NAME, write_report

    config = load_artifact(given.artifact).config
    graphs = graph_kinds_of(given.artifact)
    if given.graph != "all":
        if given.graph not in graphs:
            raise BadInput(f"--graph {given.graph}: {given.artifact} is a {config.kind}")
        graphs = (given.graph,)
    asked = parse_shapes(given.shapes, config.model.channels) if given.shapes else None
    shapes: dict[GraphKind, Shapes] = {graph: asked or default_shapes(config, graph) for graph in graphs}
    for each in shapes.values():
        each.check(config.model.unit)
    _check_flags(given, targets, precisions, config, shapes[graphs[0]])
    require(given.device)
    require_folder(out)
    if given.engine.timing_cache:
        require_file(given.engine.timing_cache, "--timing-cache")
    request = _request(given, targets, precisions, out, config, graphs, shapes[graphs[0]])
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        remove_unfinished(out)
        name, source = given.artifact.resolve().name, artifact_hash(given.artifact)
        manifest = Manifest.of(out, name, source, config.kind)
        outcome = Outcome()
        try:
            with Progress() as progress:
                for graph in graphs:
                    export(request, graph, shapes[graph], manifest, progress, outcome)
                if given.check == "rtx":
                    _check_rtx(outcome, shapes, progress)
        except BaseException as error:
            if manifest.files or manifest.rejected:
                with suppress(OSError):  # the first error counts
                    write_report(manifest, out)
            if not isinstance(error, ComaError) or not outcome.refused:
                raise
            raise type(error)(f"{error}\n{_refusals(outcome)}") from error
        if manifest.files or manifest.rejected:
            write_report(manifest, out)
    if given.check == "rtx":
        from export.tensorrt.rtx import PROVES

        print(f"\n{PROVES}")
    print(f"\n  files   {out}\n  report  {out / NAME}")
    if outcome.refused:
        raise CheckFailed(_refusals(outcome))


def _refusals(outcome: Outcome) -> str:
    return "refused: " + "\n  ".join(["", *outcome.refused]).strip()


def _check_flags(
    given: ExportConfig,
    targets: tuple[str, ...],
    precisions: tuple[str, ...],
    config: ArtifactConfig,
    shapes: Shapes,
) -> None:
    """Refuse what would be ignored, what is missing, and metrics that cannot be taken."""
    quantised = bool({"int8", "fp8"} & set(precisions))
    if quantised and given.calibrate is None:
        raise BadInput(
            "int8 and fp8 need --calibrate: a folder of images like those to come, a hundred or so, and "
            "others than those of --verify"
        )
    if not quantised:
        for name in ("calibrate", "exclude_layers"):
            if getattr(given, name) is not None:
                raise BadInput(f"{_flag(name)} is about int8 and fp8, and --precision has neither")
    if "tensorrt" not in targets:
        for each in fields(EngineConfig):
            if getattr(given.engine, each.name) != each.default:
                raise BadInput(f"{_flag(each.name)} is about engines; add --to onnx,tensorrt")
    channels = config.model.channels
    if given.verify is None and channels not in (1, 3):
        raise BadInput(
            f"{given.artifact} takes {channels} channels: give images with --verify; the bundled photographs "
            "have 3"
        )
    if given.dataset is None:
        return
    if config.kind not in ("detector", "segmentor"):
        instead = "; --verify with a folder for each class gives top-1" if config.kind == "classifier" else ""
        raise BadInput(
            f"--dataset measures detectors and segmentors, {given.artifact} is a {config.kind}{instead}"
        )
    if not given.dataset.exists():
        raise BadInput(f"--dataset {given.dataset}: no such file or directory")
    if not {"height", "width"} <= shapes.dynamic or shapes.min.batch > 1:
        raise BadInput(
            "--dataset: its images are of many sizes and come one at a time, so --shapes must leave height "
            f"and width free and begin at a batch of 1; they go from {shapes.min} to {shapes.max}"
        )


def _request(
    given: ExportConfig,
    targets: tuple[str, ...],
    precisions: tuple[str, ...],
    out: Path,
    config: ArtifactConfig,
    graphs: tuple[GraphKind, ...],
    shapes: Shapes,
) -> Request:
    from typing import cast

    from coma.data.pixel_values import check_pixels
    from export.image_sets import CALIBRATION, read_image_set, shared_images
    from export.job import Request
    from export.preprocessing import open_images

    channels, batch = config.model.channels, 1 if "batch" in shapes.dynamic else shapes.opt.batch
    source = open_images(given.verify, held_out=True)
    labelled = _labelled(given, source, config, batch)
    keep = _kept_float(given, config.kind, graphs)
    images = read_image_set(source, channels, given.verify_images)
    calibration = None
    if given.calibrate is not None:
        calibration = read_image_set(
            open_images(given.calibrate), channels, given.calibrate_images, CALIBRATION
        )
        if shared := shared_images(images, calibration):
            log.warning(
                "--calibrate %s: also in --verify: %s; other images show the errors better",
                calibration.selection.location,
                counted(shared, "image"),
            )
    for flag, each in (("--verify", images), ("--calibrate", calibration)):
        for pixels in each.pictures if each else ():
            check_pixels(pixels, config.mean, config.std, lambda flag=flag: f"an image of {flag}", fixed=True)
    return Request(
        artifact=given.artifact,
        out=out,
        precisions=cast("tuple[Precision, ...]", precisions),
        tensorrt="tensorrt" in targets,
        normalize_in_graph=given.normalize_in_graph,
        device=given.device,
        images=images,
        calibration=calibration,
        method=given.calibrate_method,
        keep=keep,
        labelled=labelled,
        dataset=given.dataset,
        most=given.metric_images,
        seconds=given.seconds,
        engine=_engine_options(given.engine) if "tensorrt" in targets else None,
    )


def _kept_float(given: ExportConfig, kind: str, graphs: tuple[GraphKind, ...]) -> tuple[str, ...]:
    if given.exclude_layers is None:
        from export.graphs.detector import BEHIND_BACKBONE

        return BEHIND_BACKBONE if kind == "detector" else ()
    if given.exclude_layers == ("none",):
        return ()
    from export.candidates import fits, layers_of
    from export.graphs.load import load_exportable

    layers = {name for graph in graphs for name in layers_of(load_exportable(given.artifact, graph).module)}
    for pattern in given.exclude_layers:
        if not fits(pattern, layers):
            known = ", ".join(sorted(layers, key=lambda name: (-name.count("."), name))[:3])
            raise BadInput(f"--exclude-layers {pattern!r}: no layer is called that; there are {known}, ...")
    return given.exclude_layers


def _labelled(given: ExportConfig, source: Source, config: ArtifactConfig, batch: int) -> Source | None:
    """The images, if they can be used for the top-1 of a classifier."""
    if given.verify is None or source.labels is None or config.kind != "classifier":
        return None
    from coma.data.labels import class_indices

    class_indices(source, config.class_names or (), "the model")
    count = min(len(source), given.metric_images)
    if count < batch:
        raise BadInput(f"--verify: top-1 on {counted(count, 'image')} is fewer than one batch of {batch}")
    return source


def _engine_options(config: EngineConfig) -> EngineOptions:
    from coma.runtimes.tensorrt.sidecar import EngineOptions

    return EngineOptions(
        workspace_mib=config.workspace,
        optimization_level=config.builder_level,
        timing_cache=config.timing_cache,
        tf32=config.tf32,
        version_compatible=config.version_compatible,
        hardware_compatibility=config.hardware_compatibility,
        refit=config.refit,
    )


def _check_rtx(outcome: Outcome, shapes: Mapping[GraphKind, Shapes], progress: Progress) -> None:
    from coma.runtimes.tensorrt.profiles import profile_of
    from export.candidates import describe
    from export.tensorrt.rtx import check_rtx

    for path in outcome.kept:
        progress.step(f"{path.name}: TensorRT-RTX parses and compiles it")
        try:
            spec = describe(path)
            report = check_rtx(path, (profile_of(spec, shapes[spec.graph]),))
        except CheckFailed as error:
            outcome.refused.append(f"{path.name}: {error}")
            continue
        progress.say(
            f"rtx     {path.name}  TensorRT-RTX {report.version} compiled {report.layers} layers in "
            f"{report.seconds:.1f} s"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _choice(text: str, known: tuple[str, ...], flag: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise BadInput(f"{flag} {text!r}: give some of {', '.join(known)}, with commas between")
    return chosen
