"""Export an artifact to ONNX and TensorRT and verify the exported files against PyTorch on real images."""

from __future__ import annotations

from coma.arguments import parse_arguments
from coma.errors import CheckFailed
from coma.preflight import require_packages
from coma.signals import sigterm_interrupts
from export.config import ExportConfig
from export.output import disk_errors


def run(argv: list[str]) -> None:
    """Parses the arguments, exports, verifies and reports.

    Raises:
        BadInput: settings, an artifact or images that cannot be used.
        CheckFailed: a file failed verification.
    """
    config = parse_arguments(ExportConfig, argv, prog="coma export")
    builds_engines, _ = config.builds_engines, config.precisions  # refuses unknown names
    require_packages("onnx", "onnxscript", "onnxruntime")
    from coma.runtimes.tensorrt.discovery import require_gpu, require_package

    if builds_engines:
        require_package("tensorrt")
        require_gpu()
    if config.check == "rtx":
        require_package("tensorrt_rtx")
    from coma.progress import Progress
    from export.pipeline import export_artifact
    from export.report import NAME

    out = config.folder
    with sigterm_interrupts("unfinished files were removed"), disk_errors(out), Progress() as progress:
        outcome = export_artifact(config, progress)
    if config.check == "rtx":
        from export.tensorrt.rtx import PROVES

        print(f"\n{PROVES}")
    print(f"\n  files   {out}\n  report  {out / NAME}")
    if outcome.refused:
        raise CheckFailed(str(outcome))
