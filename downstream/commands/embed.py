"""Compute features of images with any model, and write them to a file that coma search reads.

MODEL is an artifact of any kind, tiny-64 (which comes with the package), an exported encoder (.onnx, .engine,
or the folder of coma export), or one of timm's models by its name. A command that was stopped or killed
continues when it is given again.

Examples:
  coma embed runs/first/artifact IMAGES --out features.parquet
  coma embed timm:vit_small_patch14_dinov2.lvd142m IMAGES --out features.parquet --download
  torchrun --nproc-per-node 8 -m coma embed runs/first/artifact IMAGES --out features.parquet
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from coma.arguments import from_keywords, parse_arguments
from coma.atomic_io import lies_among
from coma.errors import BadInput, Interrupted
from coma.image_size import ImageSize
from coma.messages import counted
from coma.paths import Location
from coma.preflight import require_file, require_packages
from coma.ranges import BATCH, PROCESSES, RARE, SIDE, TILE, Range, Ranged
from coma.runtimes.names import RuntimeName

if TYPE_CHECKING:
    from downstream.features.files import FeaturesInfo


@dataclass(frozen=True)
class EmbedConfig(Ranged):
    """Features of images."""

    model: Annotated[str, tyro.conf.Positional]
    """Artifact directory, exported encoder, or timm:NAME; an existing path comes before a name."""
    images: Annotated[Location, tyro.conf.Positional]
    """Folder of images, .npz pack, .tar shards, .parquet files or a folder of them; shards and parquet files
    also by their address."""
    out: Path
    """File to write, .parquet or .npz: a row per image with its path and its feature."""
    stage: Annotated[int | None, Range(1, 1000)] = None
    """Stage of the encoder whose features are written, counted from 1; default: the model's pooled feature"""
    pooling: Literal["mean", "none"] = "mean"
    """mean: one vector per image. none: the map of features, c x h x w values per image."""
    image_size: Annotated[ImageSize | None, SIDE] = None
    """Size of the images shown to the model in pixels: side of a square, or height and width; default: as in
    its training"""
    runtime: RuntimeName = "auto"
    """auto: PyTorch for an artifact, and ONNX Runtime or TensorRT for an exported file. All but pytorch, for
    an artifact: its exports in the folder export beside it."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    batch_size: Annotated[int, BATCH] = 64
    """Images per forward pass."""
    workers: Annotated[int | None, PROCESSES] = None
    """Processes that decode images; default: by the number of cores."""
    split: str | None = None
    """Split of the images: train, val or test; default: train, if there are splits"""
    tiles: Annotated[int | None, TILE] = None
    """Side in pixels of windows that larger images are cut into, a row each; also reads all frames of DICOM
    files; default: no windows"""
    download: bool = False
    """Download the weights of timm:NAME if they are not in the local cache."""
    ray: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS")] = None
    """Compute on a Ray cluster: its address, auto for the one of this machine, local to start one."""
    part_images: Annotated[int, Range(1, 10**6), RARE] = 512
    """Images in a part, which is computed whole or not at all: what a stop costs at most."""


def run(argv: list[str]) -> None:
    """Parses the arguments, computes the features and prints what was written.

    Raises:
        BadInput: a model, images or a file that cannot be used.
        Interrupted: Ctrl-C or SIGTERM; finished parts are kept.
    """
    config = _parse(argv)
    if info := _embed(config):
        count = info.count - len(info.skipped)
        print(f"{config.out}: features of {counted(count, 'image')}")
        there = shlex.quote(str(config.out))
        print(f"next: coma search {there} --duplicates 0.98 --outliers --map --out FOLDER")


def embed(model: str | Path, images: str | Path, out: str | Path, **settings: Any) -> FeaturesInfo | None:
    """Computes features of images and writes them to a file, as `coma embed` does, also under torchrun.

        coma.embed("runs/first/artifact", "PHOTOS", out="features.parquet", stage=3)

    Args:
        model: An artifact directory or `tiny-64`, an exported encoder, or timm:NAME.
        images: Folder of images, pack, shards or parquet files.
        out: File to write, `.parquet` or `.npz`.
        settings: Flags of `coma embed` as keywords: `stage`, `pooling`, `batch_size`, `runtime`.

    Returns:
        The description of the file, with the images that were skipped; None on all processes but the first.

    Raises:
        BadInput: a model, images or a file that cannot be used.
        CheckFailed: features are not finite.
        Interrupted: Ctrl-C or SIGTERM; finished parts are kept.
    """
    given = {"model": model, "images": images, "out": out, **settings}
    return _embed(_parse(from_keywords(given, positional=("model", "images"))))


def _parse(argv: list[str]) -> EmbedConfig:
    return parse_arguments(EmbedConfig, argv, prog="coma embed", description=__doc__)


def _embed(config: EmbedConfig) -> FeaturesInfo | None:
    require_packages("pyarrow", *(["ray"] if config.ray is not None else []))
    require_file(config.out)

    from coma.progress import Progress
    from coma.signals import sigterm_interrupts
    from downstream.features.embed import embed as compute
    from downstream.features.models import FeatureRequest
    from downstream.features.reading import Reading
    from pretrain.training.distributed import processes

    if config.ray is not None and not config.ray.strip():
        raise BadInput("--ray: give the address of a cluster, auto or local")
    request = FeatureRequest(
        config.model,
        config.stage,
        config.pooling,
        config.image_size,
        config.runtime,
        config.device,
        config.download,
    )
    reading = Reading(config.images, config.split, config.batch_size, config.workers, config.tiles)
    stopped = f"stopped; {config.out}.parts keeps its finished parts; run the same command again to resume"
    with processes(config.device) as group, Progress(quiet=not group.main) as progress:
        if group.world > 1 and config.ray is not None:
            raise BadInput("--ray: the cluster shares the work already; start one process, without torchrun")
        if group.main and (warning := lies_among(config.out, config.images)):
            progress.warn(warning)
        try:
            with sigterm_interrupts("finished parts are kept"):
                info = compute(
                    request,
                    reading,
                    config.out,
                    part_images=config.part_images,
                    group=group,
                    ray=config.ray,
                    progress=progress,
                )
        except KeyboardInterrupt:
            raise Interrupted(stopped) from None
    return info if group.main else None
