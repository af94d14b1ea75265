"""Export an artifact to ONNX and TensorRT and verify the exported files against PyTorch on real images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coma.arguments import from_keywords, parse_arguments
from coma.errors import CheckFailed
from coma.preflight import require_packages
from coma.runtimes.names import is_openvino
from coma.signals import sigterm_interrupts
from export.config import ExportConfig
from export.output import disk_errors

if TYPE_CHECKING:
    from export.pipeline import Outcome


def run(argv: list[str]) -> None:
    """Parses the arguments, exports, verifies and reports.

    Raises:
        BadInput: settings, an artifact or images that cannot be used.
        CheckFailed: a file failed verification.
    """
    config = _parse(argv)
    outcome = _export(config)
    if config.check == "rtx":
        from export.tensorrt.rtx import PROVES

        print(f"\n{PROVES}")
    from export.report import NAME

    print(f"\n  files   {config.folder}\n  report  {config.folder / NAME}")
    _check(outcome)


def export(artifact: str | Path, **settings: Any) -> list[Path]:
    """Exports an artifact and verifies the files, as `coma export` does.

        files = coma.export("runs/first/artifact", precision="fp32,fp16")

    Args:
        artifact: An artifact directory, or `tiny-64`.
        settings: Flags of `coma export` as keywords: `out`, `precision`, `shapes`, `verify`, `to`.

    Returns:
        The ONNX files that passed; manifest.json beside them describes all files.

    Raises:
        BadInput: settings, an artifact or images that cannot be used.
        CheckFailed: a file failed verification; it is kept as NAME.rejected.
    """
    outcome = _export(_parse(from_keywords({"artifact": artifact, **settings}, positional=("artifact",))))
    _check(outcome)
    return outcome.kept


def _parse(argv: list[str]) -> ExportConfig:
    return parse_arguments(ExportConfig, argv, prog="coma export")


def _check(outcome: Outcome) -> None:
    if outcome.refused:
        raise CheckFailed(str(outcome))


def _export(config: ExportConfig) -> Outcome:
    builds_engines, devices, _ = config.builds_engines, config.devices, config.precisions  # refuses names
    extras = ["openvino"] * any(map(is_openvino, devices)) + ["tritonclient"] * config.writes_triton
    require_packages("onnx", "onnxscript", "onnxruntime", *extras)
    from coma.runtimes.tensorrt.discovery import require_gpu, require_package

    if builds_engines:
        require_package("tensorrt")
        require_gpu()
    if config.check == "rtx":
        require_package("tensorrt_rtx")
    from coma.progress import Progress
    from export.pipeline import export_artifact

    removed = "unfinished files were removed"
    with sigterm_interrupts(removed), disk_errors(config.folder), Progress() as progress:
        return export_artifact(config, progress)
