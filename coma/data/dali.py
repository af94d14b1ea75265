"""The same samples, with NVIDIA DALI decoding them: an extra for GPUs that outrun the cores beside them.

Which file, which crop and which flip stay what they are with any other loader, since they belong to the
sample (see `batches`): worker processes read files and draw crops, DALI decodes, cuts and resizes, on the
GPU where there is one. Pixels differ a little (it decodes at full scale, and its cubic filter is its own),
and with them a run's numbers.

What DALI might read otherwise than we do goes the usual way: everything but upright grey or RGB JPEGs, and
files that do not end as a JPEG does. When DALI fails, the batches it had begun are made without it, so files
that do not decode are named, counted and skipped as ever. But it takes garbage between a good start and a
good end for an image, and says so on the terminal at most, where the usual way may refuse it.
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
from coma.data.transforms import Box
from coma.data.worker_pool import default_workers, map_ordered
from coma.errors import BadInput

_AHEAD = 3
"""Batches that DALI has begun at any time, the one that is handed out next among them."""
_END_OF_IMAGE = b"\xff\xd9"
_TRAILER = 4096
"""Bytes that cameras may write after the end of the image."""


class Jpeg(NamedTuple):
    """A file that DALI is trusted with."""

    content: bytes
    height: int
    width: int


class Crop(NamedTuple):
    """What DALI is to make one sample of."""

    content: bytes
    box: Box
    flipped: bool


class CropFetcher(SampleFetcher):
    """Samples as `Crop`s where DALI may decode them, as finished pixels where not."""

    def __call__(self, first: int) -> UnstackedBatch:
        """Samples `first` to `first + count`."""
        return self.samples(first)

    def without_dali(self, first: int) -> Batch:
        """The same samples, decoded here."""
        return TrainingFetcher(self.source, self.data, self.channels, self.seed, self.count)(first)

    def open(self, index: int, place: int) -> Any:
        """A `Jpeg`, or pixels; see `SampleFetcher.open`."""
        content = self.source.read_bytes(index)
        if content and _END_OF_IMAGE in content[-_TRAILER:] and (size := plain_jpeg_size(content)):
            return Jpeg(content, *size)
        return super().open(index, place)

    def view(self, image: Any, seed: int) -> Any:
        """A `Crop`, or finished pixels `[3, S, S]`."""
        if not isinstance(image, Jpeg):
            return super().view(image, seed)
        return Crop(image.content, *self.crop(image.height, image.width, seed))


def decoded(fetch: CropFetcher, keys: Iterable[int], on_gpu: bool) -> Generator[Batch, None, None]:
    """The batches of `fetch`, decoded by DALI.

    Raises:
        ComaError: while iterating, as `map_ordered`, or that DALI does not work.
    """
    workers = default_workers() if fetch.data.workers is None else fetch.data.workers
    fetched = map_ordered(fetch, keys, -(-workers // 4))  # reading files takes fewer than decoding them
    return _decoded(fetch, fetched, max(workers, 1), on_gpu)


def check_dali(channels: int) -> None:
    """Refuse what DALI cannot do.

    Raises:
        BadInput: it is not installed, or images do not have three channels.
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


def _decoded(
    fetch: CropFetcher, fetched: Generator[UnstackedBatch, None, None], threads: int, on_gpu: bool
) -> Generator[Batch, None, None]:
    try:
        while True:
            begun: deque[UnstackedBatch | Exception] = deque()
            failure, works = yield from _by_dali(fetch, fetched, begun, threads, on_gpu)
            for samples in begun:  # lost with the pipeline
                if isinstance(samples, Exception):
                    raise samples
                batch = fetch.without_dali(samples.first)
                works = works or bool(batch.failures)
                yield batch
            if not works:  # no file is to blame
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
    """Batches until DALI fails; then how, and whether any came before. `begun`: what is not handed out."""

    def begin() -> tuple[list[np.ndarray], ...]:
        if begun and isinstance(begun[-1], Exception):  # nothing comes after it
            return _feed(begun[-1])
        try:
            begun.append(next(fetched))
        except Exception as error:  # raised when its turn comes
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
        batch = _assembled(samples, torch.from_dlpack(images.as_tensor()))
        begun.popleft()
        works = True
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        yield batch
        if copied:
            copied.synchronize()  # the next run lets DALI use its memory again


def _assembled(samples: UnstackedBatch, pixels: Tensor) -> Batch:
    made = iter(pixels)
    views = [next(made) if isinstance(view, Crop) else view.to(pixels.device) for view in samples.views]
    return replace(samples, views=views).stacked()  # a copy, on a GPU one that may still be waiting its turn


def _feed(samples: UnstackedBatch | Exception) -> tuple[list[np.ndarray], ...]:
    """Files, starts, shapes and flips of one batch."""
    views = [] if isinstance(samples, Exception) else samples.views
    crops = [view for view in views if isinstance(view, Crop)] or [_nothing()]
    numbers = [(crop.box[:2], crop.box[2:], crop.flipped) for crop in crops]
    columns = ([np.array(each, np.int32) for each in column] for column in zip(*numbers, strict=True))
    return [np.frombuffer(crop.content, np.uint8) for crop in crops], *columns


@cache
def _nothing() -> Crop:
    """For batches of which DALI has nothing to decode: it must be given something."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    return Crop(file.getvalue(), (0, 0, 8, 8), False)


def _build(
    fetch: CropFetcher, begin: Callable[[], tuple[list[np.ndarray], ...]], threads: int, on_gpu: bool
) -> Any:
    """A pipeline from what `begin` gives to uint8 `[n, 3, S, S]`."""
    from nvidia.dali import fn, pipeline_def, types  # type: ignore[import-not-found]

    size = fetch.data.image_size

    @pipeline_def(
        batch_size=fetch.count,
        num_threads=threads,
        device_id=torch.cuda.current_device() if on_gpu else None,
        prefetch_queue_depth=_AHEAD,
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
            hw_decoder_load=0,  # one decoder for all: pixels do not depend on the batch
        )
        images = fn.resize(
            images, resize_x=size, resize_y=size, interp_type=types.INTERP_CUBIC, antialias=True
        )
        return fn.transpose(fn.flip(images, horizontal=flips), perm=[2, 0, 1])

    pipeline = graph()
    pipeline.build()
    return pipeline
