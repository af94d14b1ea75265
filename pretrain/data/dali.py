"""The same samples, with NVIDIA DALI decoding them: an extra for GPUs that outrun the cores beside them.

Which file, which crop and which flip stay what they are with any other loader, since they belong to the
sample (see `samples`): worker processes read files and draw crops, DALI decodes, cuts and resizes, on the
GPU where there is one. Pixels differ by rounding (it decodes at full scale, and its cubic filter is its own),
so a run's numbers depend on the loader a little.

What DALI might read otherwise than we do goes the usual way: everything but upright grey or RGB JPEGs, and
files that do not end as a JPEG does. When DALI fails on a batch, that batch is made without it, so files that
do not decode are named, counted and skipped as ever. But it takes garbage between a good start and a good
end for an image, and says so on the terminal at most, where the usual way may refuse it.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.data.images import plain_jpeg_size
from pretrain.data.samples import Batch, Samples, TrainingFetch
from pretrain.data.transforms import Box
from pretrain.data.workers import default_workers, in_workers
from pretrain.errors import BadInput

_AHEAD = 2
"""Batches that DALI prepares while the trainer uses another."""
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


@dataclass(frozen=True)
class CropFetch(TrainingFetch):
    """Samples as `Crop`s where DALI may decode them, as finished pixels where not."""

    def __call__(self, first: int) -> Samples:  # type: ignore[override]
        """Samples `first` to `first + count`."""
        return self.samples(first)

    def without_dali(self, first: int) -> Batch:
        """The same samples, decoded here."""
        return TrainingFetch(self.source, self.data, self.channels, self.seed, self.count)(first)

    def open(self, index: int, place: int) -> Any:
        """A `Jpeg`, or pixels; see `TrainingFetch.open`."""
        content = self.source.encoded(index)
        if content and _END_OF_IMAGE in content[-_TRAILER:] and (size := plain_jpeg_size(content)):
            return Jpeg(content, *size)
        return super().open(index, place)

    def view(self, image: Any, seed: int) -> Any:
        """A `Crop`, or finished pixels `[3, S, S]`."""
        if not isinstance(image, Jpeg):
            return super().view(image, seed)
        return Crop(image.content, *self.crop(image.height, image.width, seed))


def decoded(fetch: CropFetch, keys: Iterable[int], on_gpu: bool) -> Generator[Batch, None, None]:
    """The batches of `fetch`, decoded by DALI.

    Raises:
        BadInput: DALI is not installed, or the model does not take three channels.
        ComaError: while iterating, as `in_workers`.
    """
    check_dali(fetch.channels)
    workers = default_workers() if fetch.data.workers is None else fetch.data.workers
    fetched = in_workers(fetch, keys, -(-workers // 4))  # reading files takes fewer than decoding them
    return _decoded(fetch, fetched, max(workers, 1), on_gpu)


def check_dali(channels: int) -> None:
    """Raises BadInput, saying what to do, where DALI cannot be used."""
    try:
        import nvidia.dali  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise BadInput(f"--loader dali needs DALI ({error}): pip install 'coma-dyvit[dali]'") from None
    if channels != 3:
        raise BadInput(f"--loader dali makes colour images; leave it out for --channels {channels}")


def _decoded(
    fetch: CropFetch, fetched: Generator[Samples, None, None], threads: int, on_gpu: bool
) -> Generator[Batch, None, None]:
    try:
        while True:
            pipeline = _Pipeline(fetch, fetched, threads, on_gpu)
            try:
                yield from pipeline
            except RuntimeError:  # a file that DALI cannot read: what it had begun is lost with the pipeline
                yield from (fetch.without_dali(samples.first) for samples in pipeline.begun)
    finally:
        fetched.close()


def _assembled(samples: Samples, pixels: Tensor) -> Batch:
    made = iter(pixels)
    views = [next(made) if isinstance(view, Crop) else view.to(pixels.device) for view in samples.views]
    return replace(samples, views=views).stacked()


class _Pipeline:
    """Batches in order, with DALI some batches ahead.

    Attributes:
        begun: Batches that are not yet handed out.
    """

    def __init__(
        self, fetch: CropFetch, fetched: Generator[Samples, None, None], threads: int, on_gpu: bool
    ) -> None:
        from nvidia.dali import fn, pipeline_def, types  # type: ignore[import-not-found]

        size = fetch.data.image_size

        @pipeline_def(
            batch_size=fetch.count,
            num_threads=threads,
            device_id=torch.cuda.current_device() if on_gpu else None,
            prefetch_queue_depth=_AHEAD,
        )
        def graph() -> Any:
            files, starts, shapes, flips = fn.external_source(source=self._begin, num_outputs=4)
            device = "mixed" if on_gpu else "cpu"
            images = fn.decoders.image_slice(
                files, device=device, start=starts, shape=shapes, axes=[0, 1], output_type=types.RGB
            )
            images = fn.resize(
                images, resize_x=size, resize_y=size, interp_type=types.INTERP_CUBIC, antialias=True
            )
            return fn.transpose(fn.flip(images, horizontal=flips), perm=[2, 0, 1])

        self.begun: deque[Samples] = deque()
        self._fetched = fetched
        self._pipeline = graph()
        self._pipeline.build()

    def __iter__(self) -> Generator[Batch, None, None]:
        """Without end.

        Raises:
            RuntimeError: a file does not decode; the pipeline is of no more use.
        """
        while True:
            (images,) = self._pipeline.run()
            pixels = torch.from_dlpack(images.as_tensor()).clone()  # DALI uses the memory again
            yield _assembled(self.begun.popleft(), pixels)

    def _begin(self) -> tuple[list[np.ndarray], ...]:
        samples = next(self._fetched)
        self.begun.append(samples)
        crops = [view for view in samples.views if isinstance(view, Crop)] or [_nothing()]
        numbers = [(crop.box[:2], crop.box[2:], crop.flipped) for crop in crops]
        columns = ([np.array(each, np.int32) for each in column] for column in zip(*numbers, strict=True))
        return [np.frombuffer(crop.content, np.uint8) for crop in crops], *columns


@cache
def _nothing() -> Crop:
    """For batches of which DALI has nothing to decode: it must be given something."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    return Crop(file.getvalue(), (0, 0, 8, 8), False)
