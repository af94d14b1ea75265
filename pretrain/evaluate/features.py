"""Features of labelled images: one vector per image, from a frozen encoder."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coma.amp import autocast, choose_precision
from coma.artifact import ArtifactConfig
from coma.data import Batch, Source, normalized_batches
from coma.errors import BadInput, CheckFailed
from coma.image_size import ImageSize
from coma.models import Encoder, build_encoder

if TYPE_CHECKING:
    from coma.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """Features and labels of images, in the order of their source.

    Attributes:
        values: float32 `[n, c]`, on the encoder's device (on the CPU for other devices than CUDA).
        labels: int64 `[n]`, on the same device.
        failures: One line for each image that could not be read.
    """

    values: Tensor
    labels: Tensor
    failures: tuple[str, ...] = ()


def extract_features(
    encoder: Encoder,
    config: ArtifactConfig,
    source: Source,
    *,
    labels: Tensor,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Progress | None = None,
    title: str = "features",
) -> Features:
    """Returns the mean-pooled last features of every readable image; they are the same in every call.

    The encoder sees the centre crops of `evaluation_batches`. On CUDA it runs under bf16 autocast (fp16
    where there is no bf16), elsewhere in its own precision.

    Args:
        encoder: Encoder on the device to compute on; its training mode is restored afterwards.
        config: Channels, mean, std and image size of the encoder's training.
        source: Images.
        labels: Class of every image of the source, int64 `[len(source)]`.
        image_size: Size in pixels of the images shown; as in training by default.
        batch_size: Images per forward pass.
        workers: Number of processes that decode images.
        progress: Shows a bar.
        title: Title of the bar.

    Raises:
        BadInput: image size below a mask unit, or no image could be read.
        CheckFailed: features are not finite.
    """
    bar = progress.bar(title, len(source)) if progress else None
    values, indices, failures = [], [], []
    for pooled, batch in feature_batches(
        encoder, config, source, image_size=image_size, batch_size=batch_size, workers=workers
    ):
        values.append(pooled)
        indices.append(batch.indices)
        failures += batch.failures
        if bar:
            bar.advance(len(batch.images) + len(batch.failures))
    if failures:
        log.warning("%s: left out %d images: %s", source.location, len(failures), "; ".join(failures[:5]))
    found = torch.cat(values)
    if not found.isfinite().all():
        raise CheckFailed(
            f"{source.location}: the encoder's features are not finite; its weights are damaged"
        )
    return Features(found, labels[torch.cat(indices)].to(found.device), tuple(failures))


def feature_batches(
    encoder: Encoder,
    config: ArtifactConfig,
    source: Source,
    *,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 256,
    workers: int | None = None,
) -> Generator[tuple[Tensor, Batch], None, None]:
    """Yields the features of every batch, float32 `[b, c]`, and the batch; see `extract_features`.

    Close the iterator to stop its workers early. A GPU may still be computing what was yielded.
    """
    size = config.image_size if image_size is None else ImageSize.of(image_size)
    if min(size) < encoder.unit:
        raise BadInput(f"image size {size} px is smaller than the encoder's mask unit of {encoder.unit} px")
    device = next(encoder.parameters()).device
    kept = device if device.type == "cuda" else torch.device("cpu")
    batches = normalized_batches(
        source,
        config.mean,
        config.std,
        image_size=size,
        channels=config.model.channels,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    training = encoder.training
    encoder.eval()
    try:
        with closing(batches):
            for images, batch in batches:
                with torch.inference_mode(), autocast(choose_precision("auto", device), device):
                    pooled = encoder.pool(images).float().to(kept)
                yield pooled, batch
    finally:
        encoder.train(training)


def random_encoder(config: ArtifactConfig, seed: int = 0) -> Encoder:
    """Returns a randomly initialised encoder of the same architecture: the baseline of every score."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_encoder(config.model).eval()
