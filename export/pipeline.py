"""The export pipeline: builds a candidate file per graph and precision, verifies it, keeps or rejects it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from coma.artifact import ArtifactConfig, load_artifact
from coma.artifact.load import artifact_hash
from coma.data.pixel_values import check_pixels
from coma.errors import BadInput, CheckFailed, ComaError
from coma.library_errors import load_packages
from coma.messages import counted
from coma.preflight import require_file, require_folder
from coma.runtimes.manifest import Manifest
from coma.runtimes.model_spec import GRAPH_KINDS, GraphKind, eight_bit_part
from coma.runtimes.names import COMPILED, Device, is_openvino
from coma.runtimes.onnxruntime import require_provider
from coma.runtimes.openvino import require_device
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shape, Shapes, parse_shapes
from coma.runtimes.tensorrt.profiles import profile_of
from export.candidates import CandidateBuilder, fit_preprocessing, layers_of, matches_any, remove_unfinished
from export.config import ExportConfig, ExportImages, file_name
from export.external_data import remove_unlisted_weights
from export.gate import Gate
from export.graphs.load import check_takes_list, check_visible_units, load_exportable, size_of
from export.image_sets import CALIBRATION, ImageSet, read_image_set, shared_images
from export.onnx_export import read_spec
from export.output import exclusive
from export.preprocessing import open_images
from export.report import write_report
from export.torch_program import require_compiler
from export.verify.tolerances import TOLERANCES

if TYPE_CHECKING:
    from coma.data.sources.base import Source
    from export.progress import ProgressListener

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """Results of an export so far.

    Attributes:
        kept: ONNX files that passed verification.
        refused: One line for each file that did not, with the reason.
    """

    kept: list[Path] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "refused: " + "\n  ".join(["", *self.refused]).strip()


def export_artifact(config: ExportConfig, listener: ProgressListener) -> Outcome:
    """Exports an artifact to `config.folder`, with manifest.json and report.md.

    Raises:
        BadInput: settings, an artifact or images that cannot be used.
        KeyboardInterrupt: unfinished files were removed.
    """
    for device in config.devices:
        require(device)
    out = config.folder
    artifact = load_artifact(config.artifact).config
    graphs = GRAPH_KINDS[artifact.kind]
    if config.graph != "all":
        if config.graph not in graphs:
            raise BadInput(f"--graph {config.graph}: {config.artifact} is a {artifact.kind}")
        graphs = (config.graph,)
    given = parse_shapes(config.shapes, artifact.model.channels) if config.shapes else None
    shapes: dict[GraphKind, Shapes] = {graph: given or default_shapes(artifact, graph) for graph in graphs}
    for each in shapes.values():
        each.check(artifact.model.unit)
    _check_flags(config, artifact, shapes[graphs[0]])
    if config.visible_units:
        for graph in graphs:
            check_takes_list(config.artifact, graph, artifact)
            _check_visible_units(config.visible_units, shapes[graph], artifact.model.unit)
    _check_excluded_layers(config, graphs)
    require_folder(out)
    if config.engine.timing_cache:
        require_file(config.engine.timing_cache, "--timing-cache")
    images = _read_images(config, artifact, shapes[graphs[0]])
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        remove_unfinished(out)
        name = config.artifact.resolve().name
        manifest = Manifest.of(out, name, artifact_hash(config.artifact), artifact.kind)
        remove_unlisted_weights(out, manifest)  # of an export that was killed
        outcome = Outcome()
        try:
            for graph in graphs:
                export_graph(config, images, graph, shapes[graph], manifest, listener, outcome)
            if config.check == "rtx":
                _check_rtx(outcome, shapes, listener)
        except BaseException as error:
            if manifest.files or manifest.rejected:
                with suppress(OSError):  # the first error counts
                    write_report(manifest, out)
            if not isinstance(error, ComaError) or not outcome.refused:
                raise
            raise type(error)(f"{error}\n{outcome}") from error
        if manifest.files or manifest.rejected:
            write_report(manifest, out)
    return outcome


def export_graph(
    config: ExportConfig,
    images: ExportImages,
    graph: GraphKind,
    shapes: Shapes,
    manifest: Manifest,
    listener: ProgressListener,
    outcome: Outcome,
) -> None:
    """Exports one graph in all precisions and adds the results to `outcome`.

    A file that cannot be built, opened or measured is rejected, and the export continues with the next one.

    Raises:
        BadInput: a setting cannot be satisfied; files that are already finished stay valid.
        Interrupted: Ctrl-C; files that are already finished stay valid.
    """
    builder = CandidateBuilder(config, images, graph, shapes, listener, manifest.source)
    reference = TorchRuntime(fit_preprocessing(builder.load_model(), shapes))
    gate = Gate(config, images, reference, shapes, listener, manifest)
    try:
        for precision in sorted(config.precisions, key=list(TOLERANCES).index):
            path = config.folder / file_name(graph, precision, config.visible_units)
            try:
                fault = gate.verify_onnx(builder.build(precision), path, precision, builder)
            except CheckFailed as error:
                fault = gate.reject(path, precision, builder, error)
            if fault:
                outcome.refused.append(fault)
                continue
            outcome.kept.append(path)
            if not eight_bit_part(precision):
                builder.float_files[precision] = path
            if config.writes_triton:
                fault = _add_to_triton(config, images, path, shapes, listener)
                outcome.refused += [fault] if fault else []
            elif (config.folder / "triton" / path.stem).is_dir():
                log.warning(
                    "%s: triton/%s still holds the former file; add --to onnx,triton", path, path.stem
                )
            if config.builds_engines:
                try:
                    fault = gate.verify_engine(path, builder)
                except CheckFailed as error:
                    fault = gate.reject(path.with_suffix(".engine"), precision, builder, error)
                outcome.refused += [fault] if fault else []
            for name in config.programs:
                program = path.with_name(f"{path.stem}{COMPILED if name == 'aoti' else ''}.pt2")
                try:
                    fault = gate.verify_program(program, precision, builder, compiled=name == "aoti")
                except CheckFailed as error:
                    fault = gate.reject(program, precision, builder, error)
                outcome.refused += [fault] if fault else []
    finally:
        builder.remove_temporary_files()
        remove_unlisted_weights(config.folder, manifest)


def _add_to_triton(
    config: ExportConfig, images: ExportImages, path: Path, shapes: Shapes, listener: ProgressListener
) -> str | None:
    """Adds a file to the repository for Triton; returns why it is refused, or None."""
    from export.triton.repository import write_repository

    listener.step(f"{path.name}: writing the repository for Triton")
    try:
        pictures = images.verification.pictures if config.triton_preprocess else None
        for line in write_repository(path, shapes, pictures):
            listener.say(f"triton  {line}")
    except CheckFailed as error:
        return f"{path.name}: {error}"


def require(device: Device) -> None:
    """Checks that the packages of an export can be imported and that the device can be used.

    Raises:
        BadInput: a package is missing or broken, or ONNX Runtime or OpenVINO cannot use the device.
    """
    load_packages("onnx", "onnxscript")
    if is_openvino(device):
        require_device(device)
    else:
        require_provider(device)


def default_shapes(config: ArtifactConfig, graph: GraphKind) -> Shapes:
    """Returns the shapes of an export without --shapes.

    The batch size is dynamic. Height and width are dynamic for detectors and segmentors, whose images are not
    all of one size.
    """
    size = size_of(config, graph)
    if config.kind not in ("detector", "segmentor"):
        return Shapes(Shape(1, *size), Shape(8, *size), Shape(32, *size))
    unit, (height, width) = config.model.unit, (2 * side for side in size)
    if config.kind == "detector":
        height, width = max(height, 800), max(width, 1344)
    return Shapes(Shape(1, unit, unit), Shape(1, *size), Shape(4, height, width))


def _check_flags(config: ExportConfig, artifact: ArtifactConfig, shapes: Shapes) -> None:
    """Refuses flags without effect, missing flags, and metrics that cannot be measured."""
    quantised = any(map(eight_bit_part, config.precisions))
    if quantised and config.calibrate is None:
        raise BadInput(
            "int8 and fp8 need --calibrate: about a hundred images of the kind that the model will see, and "
            "not those of --verify"
        )
    if not quantised:
        for name in ("calibrate", "exclude_layers"):
            if getattr(config, name) is not None:
                raise BadInput(f"{_flag(name)} has an effect on int8 and fp8 only; add one to --precision")
    if config.plugin_free and artifact.kind != "detector":
        raise BadInput(
            f"--plugin-free has an effect on detectors only; {config.artifact} is a {artifact.kind}"
        )
    if config.check == "rtx" and artifact.kind == "detector" and not config.plugin_free:
        raise BadInput("--check rtx: TensorRT-RTX has no RoiAlign or NonMaxSuppression; add --plugin-free")
    if not config.builds_engines:
        for each in fields(config.engine):
            if getattr(config.engine, each.name) != each.default:
                raise BadInput(f"{_flag(each.name)} has an effect on engines only; add --to onnx,tensorrt")
    if config.programs:
        what = f"--to {','.join(config.programs)}"
        if artifact.kind == "detector":
            raise BadInput(
                f"{what}: {config.artifact} is a detector, whose graph is made for ONNX; other kinds work"
            )
        if quantised:
            raise BadInput(f"{what}: int8 and fp8 are forms of ONNX files; export them without {what}")
        if "aoti" in config.programs:
            require_compiler()
    if config.triton_preprocess and not config.writes_triton:
        raise BadInput("--triton-preprocess has an effect on Triton only; add --to onnx,triton")
    channels = artifact.model.channels
    if config.verify is None and channels not in (1, 3):
        raise BadInput(
            f"{config.artifact} takes {channels} channels, and the bundled photographs have 3; give images "
            "with --verify"
        )
    if config.dataset is None:
        return
    if artifact.kind not in ("detector", "segmentor"):
        instead = ""
        if artifact.kind == "classifier":
            instead = "; --verify with one subfolder per class measures top-1"
        raise BadInput(
            f"--dataset measures detectors and segmentors, {config.artifact} is a {artifact.kind}{instead}"
        )
    if not config.dataset.exists():
        raise BadInput(f"--dataset {config.dataset}: no such file or directory")
    if not {"height", "width"} <= shapes.dynamic or shapes.min.batch > 1:
        raise BadInput(
            "--dataset: its images have many sizes and are run one at a time, so --shapes needs a dynamic "
            f"height and width and a minimum batch of 1; the shapes are {shapes.min} to {shapes.max}"
        )


def _check_visible_units(count: int, shapes: Shapes, unit: int) -> None:
    if {"height", "width"} & shapes.dynamic:
        raise BadInput("--visible-units needs a fixed image size; give --shapes with one height and width")
    check_visible_units(count, shapes.opt.height, shapes.opt.width, unit)


def _check_excluded_layers(config: ExportConfig, graphs: tuple[GraphKind, ...]) -> None:
    if config.exclude_layers in (None, ("none",)):
        return
    layers = {name for graph in graphs for name in layers_of(load_exportable(config.artifact, graph).module)}
    for pattern in config.exclude_layers:
        if not matches_any(pattern, layers):
            known = ", ".join(sorted(layers, key=lambda name: (-name.count("."), name))[:3])
            raise BadInput(f"--exclude-layers {pattern!r}: no layer has this name; layers are {known}, ...")


def _read_images(config: ExportConfig, artifact: ArtifactConfig, shapes: Shapes) -> ExportImages:
    channels, batch = artifact.model.channels, 1 if "batch" in shapes.dynamic else shapes.opt.batch
    source = open_images(config.verify, held_out=True)
    labelled = _labelled(config, source, artifact, batch)
    images = read_image_set(source, channels, config.verify_images)
    _check_pixel_values(images, artifact)
    if config.calibrate is None:
        return ExportImages(images, labelled=labelled)
    calibration = read_image_set(
        open_images(config.calibrate), channels, config.calibrate_images, CALIBRATION
    )
    _check_pixel_values(calibration, artifact)
    if shared := shared_images(images, calibration):
        log.warning(
            "--calibrate %s: %s also in --verify; other images show the errors better",
            calibration.selection.location,
            counted(shared, "image"),
        )
    return ExportImages(images, calibration, labelled)


def _check_pixel_values(images: ImageSet, artifact: ArtifactConfig) -> None:
    for name, pixels in zip(images.names, images.pictures, strict=True):
        check_pixels(pixels, artifact.mean, artifact.std, lambda name=name: name, fixed=True)


def _labelled(config: ExportConfig, source: Source, artifact: ArtifactConfig, batch: int) -> Source | None:
    """Returns the source if it can measure the top-1 accuracy of a classifier."""
    if config.verify is None or source.labels is None or artifact.kind != "classifier":
        return None
    from coma.data.labels import class_indices

    class_indices(source, artifact.class_names or (), "the model")
    count = min(len(source), config.metric_images)
    if count < batch:
        raise BadInput(f"--verify: top-1 on {counted(count, 'image')} is fewer than one batch of {batch}")
    return source


def _check_rtx(outcome: Outcome, shapes: Mapping[GraphKind, Shapes], listener: ProgressListener) -> None:
    from export.tensorrt.rtx import check_rtx

    for path in outcome.kept:
        listener.step(f"{path.name}: compiling with TensorRT-RTX")
        try:
            spec = read_spec(path)
            report = check_rtx(path, (profile_of(spec, shapes[spec.graph]),))
        except CheckFailed as error:
            outcome.refused.append(f"{path.name}: {error}")
            continue
        listener.say(
            f"rtx     {path.name}  TensorRT-RTX {report.version} compiled {report.layers} layers in "
            f"{report.seconds:.1f} s"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
