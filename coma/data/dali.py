"""The same samples, decoded by NVIDIA DALI: an extra for GPUs that are faster than their CPU cores.

The file, the crop and the flip of a sample are the same as with any other loader, because they follow from
the sample's seed (see `batches`). Worker processes read files and draw crops; DALI decodes, crops and
resizes, on the GPU if there is one. Its pixels differ slightly (it decodes at full scale, with its own cubic
filter), so a run's numbers differ too.

Only upright grey or RGB JPEGs that end with the end-of-image marker are given to DALI; all other files are
decoded as usual. If DALI fails, the batches it had started are made without it, so that files that do not
decode are named, counted and skipped. However, DALI accepts a file with a valid start and end and garbage
between them as an image, with at most a message on the terminal, where the usual decoder may refuse it.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coma.data.batches import Batch, SampleFetcher, TrainingFetcher, UnstackedBatch
from coma.data.decode import plain_jpeg_size
from coma.data.image import Box
from coma.data.worker_pool import default_workers, map_ordered
from coma.errors import BadInput

_PREFETCH = 3
"""Number of batches that DALI works on at a time, including the next one to be returned."""
_END_OF_IMAGE = b"\xff\xd9"
_TRAILER = 4096
"""Number of bytes that cameras may write after the end of the image."""


class Jpeg(NamedTuple):
    """A file for DALI to decode."""

    content: bytes
    height: int
    width: int


class Crop(NamedTuple):
    """One sample for DALI to decode."""

    content: bytes
    box: Box
    flipped: bool


class CropFetcher(SampleFetcher):
    """Returns samples as `Crop`s if DALI may decode them, and as finished pixels otherwise."""

    def __call__(self, first: int) -> UnstackedBatch:
        """Returns samples `first` to `first + count`."""
        return self.samples(first)

    def without_dali(self, first: int) -> Batch:
        """Returns the same samples, decoded without DALI."""
        return TrainingFetcher(self.source, self.data, self.channels, self.seed, self.count)(first)

    def open(self, index: int, place: int) -> Any:
        """Returns a `Jpeg`, or pixels; see `SampleFetcher.open`."""
        content = self.source.read_bytes(index)
        if content and _END_OF_IMAGE in content[-_TRAILER:] and (size := plain_jpeg_size(content)):
            return Jpeg(content, *size)
        return super().open(index, place)

    def view(self, image: Any, seed: int) -> Any:
        """Returns a `Crop`, or finished pixels `[3, H, W]`."""
        if not isinstance(image, Jpeg):
            return super().view(image, seed)
        return Crop(image.content, *self.crop(image.height, image.width, seed))


def dali_batches(fetch: CropFetcher, keys: Iterable[int], on_gpu: bool) -> Generator[Batch, None, None]:
    """Yields the batches of `fetch`, decoded by DALI.

    Raises:
        ComaError: While iterating: see `map_ordered`, or DALI does not work.
    """
    workers = default_workers() if fetch.data.workers is None else fetch.data.workers
    fetched = map_ordered(fetch, keys, -(-workers // 4))  # reading files needs fewer processes than decoding
    return _with_fallback(fetch, fetched, max(workers, 1), on_gpu)


def check_dali(channels: int) -> None:
    """Checks that DALI can be used.

    Raises:
        BadInput: It is not installed, or the images do not have three channels.
    """
    try:
        import nvidia.dali  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f"--loader dali: {error}; DALI is an extra for Linux and CUDA 13: leave the flag out, or install "
            "nvidia-dali-cuda130"
        ) from None
    if channels != 3:
        raise BadInput(f"--loader dali makes colour images; leave it out for --channels {channels}")


def _with_fallback(
    fetch: CropFetcher, fetched: Generator[UnstackedBatch, None, None], threads: int, on_gpu: bool
) -> Generator[Batch, None, None]:
    try:
        while True:
            begun: deque[UnstackedBatch | Exception] = deque()
            failure, works = yield from _by_dali(fetch, fetched, begun, threads, on_gpu)
            for samples in begun:  # they were lost with the pipeline
                if isinstance(samples, Exception):
                    raise samples
                batch = fetch.without_dali(samples.first)
                works = works or bool(batch.failures)
                yield batch
            if not works:  # no damaged file explains it
                raise BadInput(f"--loader dali does not work here ({failure}); leave it out") from failure
    finally:
        fetched.close()


def _by_dali(
    fetch: CropFetcher,
    fetched: Generator[UnstackedBatch, None, None],
    begun: deque[UnstackedBatch | Exception],
    threads: int,
    on_gpu: bool,
) -> Generator[Batch, None, tuple[RuntimeError, bool]]:
    """Yields batches until DALI fails.

    Args:
        fetch: Describes the samples.
        fetched: The samples that workers have read.
        begun: Receives the samples that are read and not returned yet.
        threads: Number of DALI's threads.
        on_gpu: Whether DALI decodes on the GPU.

    Returns:
        The error, and whether any batch came before it.
    """

    def begin() -> tuple[list[np.ndarray], ...]:
        if begun and isinstance(begun[-1], Exception):  # it is the last one
            return _feed(begun[-1])
        try:
            begun.append(next(fetched))
        except Exception as error:  # raised in its turn
            begun.append(error)
        return _feed(begun[-1])

    pipeline, works = _build(fetch, begin, threads, on_gpu), False
    while True:
        try:
            (images,) = pipeline.run()
        except RuntimeError as failure:
            return failure, works
        samples = begun[0]
        if isinstance(samples, Exception):
            raise samples
        batch = _assemble(samples, torch.from_dlpack(images.as_tensor()))
        begun.popleft()
        works = True
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        yield batch
        if copied:
            copied.synchronize()  # the next run overwrites DALI's memory


def _assemble(samples: UnstackedBatch, pixels: Tensor) -> Batch:
    made = iter(pixels)
    views = [next(made) if isinstance(view, Crop) else view.to(pixels.device) for view in samples.views]
    return replace(samples, views=views).stack()  # a copy; on a GPU it may be pending


def _feed(samples: UnstackedBatch | Exception) -> tuple[list[np.ndarray], ...]:
    """Returns files, starts, shapes and flips of one batch."""
    views = [] if isinstance(samples, Exception) else samples.views
    crops = [view for view in views if isinstance(view, Crop)] or [_dummy_crop()]
    numbers = [(crop.box[:2], crop.box[2:], crop.flipped) for crop in crops]
    columns = ([np.array(each, np.int32) for each in column] for column in zip(*numbers, strict=True))
    return [np.frombuffer(crop.content, np.uint8) for crop in crops], *columns


@cache
def _dummy_crop() -> Crop:
    """An input for batches without any JPEG: DALI needs at least one."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    return Crop(file.getvalue(), (0, 0, 8, 8), False)


def _build(
    fetch: CropFetcher, begin: Callable[[], tuple[list[np.ndarray], ...]], threads: int, on_gpu: bool
) -> Any:
    """Builds a pipeline from the results of `begin` to uint8 `[n, 3, H, W]`."""
    from nvidia.dali import fn, pipeline_def, types  # type: ignore[import-not-found]

    height, width = fetch.data.image_size

    @pipeline_def(
        batch_size=fetch.count,
        num_threads=threads,
        device_id=torch.cuda.current_device() if on_gpu else None,
        prefetch_queue_depth=_PREFETCH,
    )
    def graph() -> Any:
        files, starts, shapes, flips = fn.external_source(source=begin, num_outputs=4)
        images = fn.decoders.image_slice(
            files,
            device="mixed" if on_gpu else "cpu",
            start=starts,
            shape=shapes,
            axes=[0, 1],
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # as libjpeg does
            hw_decoder_load=0,  # a single decoder, so that pixels do not depend on the batch
        )
        images = fn.resize(
            images, resize_x=width, resize_y=height, interp_type=types.INTERP_CUBIC, antialias=True
        )
        return fn.transpose(fn.flip(images, horizontal=flips), perm=[2, 0, 1])

    pipeline = graph()
    pipeline.build()
    return pipeline
