"""Models that compute features: any artifact, an exported encoder, or one of timm's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coma.atomic_io import sha256_of
from coma.data.channels import scale_to_unit
from coma.errors import BadInput, CheckFailed
from coma.image_size import ImageSize
from coma.library_errors import library_errors
from coma.models.hub import is_reference, timm_name, weights_file
from coma.paths import is_shipped, local_path
from coma.runtimes.find import open_model
from coma.runtimes.image_batches import Resize, channels_of
from coma.runtimes.model_spec import ModelSpec, Precision, Preprocessing
from coma.runtimes.names import RuntimeName
from coma.runtimes.preprocessing import to_input
from downstream.features.files import FeatureSpec

Pooling = Literal["mean", "none"]
DeviceName = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True)
class FeatureRequest:
    """A model and the features that it computes, as plain data that can be sent to other machines."""

    model: str
    """A path, or `timm:NAME`."""
    stage: int | None = None
    pooling: Pooling = "mean"
    image_size: ImageSize | None = None
    runtime: RuntimeName = "auto"
    device: DeviceName = "auto"
    download: bool = False


@dataclass(frozen=True)
class FeatureModel:
    """A model that is ready to compute features.

    Attributes:
        spec: What its features are.
        title: Library and device.
        channels: Number of channels of the images.
        resize: Returns what the model is shown of pixels `[H, W, c]`, not normalised; picklable.
        min_side: Smallest side to which a JPEG may be reduced while it is decoded.
        preprocessing: Mean and standard deviation.
        run: Maps the input `[b, c, h, w]` to features `[b, *spec.shape]`.
        fixed_batch: Number of images that every run takes; None for any number.
        largest_batch: Most images that a run takes; None for any number.
    """

    spec: FeatureSpec
    title: str
    channels: int
    resize: Callable[[np.ndarray], Tensor]
    min_side: Any
    preprocessing: Preprocessing
    run: Callable[[Tensor], Tensor]
    fixed_batch: int | None = None
    largest_batch: int | None = None

    def __call__(self, images: list[Tensor]) -> np.ndarray:
        """Returns features, float32 `[b, *spec.shape]`, of images that `resize` returned.

        Raises:
            CheckFailed: they are not finite.
        """
        count = len(images)
        if self.fixed_batch and count % self.fixed_batch:
            images = images + images[:1] * (-count % self.fixed_batch)
        step = self.fixed_batch or self.largest_batch or len(images)
        parts = [
            self.run(to_input(images[at : at + step], self.preprocessing)).float().cpu()
            for at in range(0, len(images), step)
        ]
        found = torch.cat(parts)[:count]
        if not found.isfinite().all():
            raise CheckFailed(f"{self.spec.model}: its features are not finite; its weights are damaged")
        return found.numpy()


def open_feature_model(request: FeatureRequest) -> FeatureModel:
    """Opens a model.

    Raises:
        BadInput: no such model, a model without features, or a stage, size, runtime or device that it does
            not have; the message says what to do.
        CheckFailed: the runtime refuses the file.
    """
    if is_reference(request.model):
        return _open_timm(request)
    return _open_own(request)


def _open_own(request: FeatureRequest) -> FeatureModel:
    path = local_path(request.model)
    runtime = open_model(path, "encoder", request.runtime, request.device)
    spec = runtime.spec
    size = _image_size(spec, request.image_size)
    rule, batch = spec.preprocessing, spec.inputs[0].axes[0]
    maps = [each.name for each in spec.outputs if each.name != "pooled"]
    _check_stage(request, len(maps))

    def run(images: Tensor) -> Tensor:
        outputs = runtime(images)
        if request.stage is None and request.pooling == "mean":
            return outputs["pooled"]
        chosen = outputs[maps[-1 if request.stage is None else request.stage - 1]]
        return chosen.float().mean(dim=(2, 3)) if request.pooling == "mean" else chosen

    resize = Resize(rule, size)
    return _probed(
        request,
        sha256=spec.source,
        precision=spec.precision,
        size=(size.height, size.width),
        title=runtime.title,
        channels=channels_of(spec),
        resize=resize,
        min_side=resize.min_side,
        preprocessing=rule,
        run=run,
        fixed_batch=batch if isinstance(batch, int) else None,
        largest_batch=getattr(runtime, "largest_batch", None),
    )


def _image_size(spec: ModelSpec, wanted: ImageSize | None) -> ImageSize:
    sides = spec.inputs[0].axes[2:]
    usual = spec.preprocessing.size or (224, 224)
    own = ImageSize(*(side if isinstance(side, int) else usual[i] for i, side in enumerate(sides)))
    size = wanted or own
    if any(isinstance(side, int) and side != given for side, given in zip(sides, size, strict=True)):
        raise BadInput(
            f"--image-size {size.words}: this file takes {own.height} x {own.width} px only; leave it out"
        )
    if min(size) < spec.unit:
        raise BadInput(f"--image-size {size.words} must be at least the mask unit of {spec.unit} px")
    return size


def _check_stage(request: FeatureRequest, stages: int) -> None:
    if request.stage is not None and request.stage > stages:
        have = "1 stage" if stages == 1 else f"{stages} stages"
        raise BadInput(f"--stage {request.stage}: {request.model} has {have}; give 1 to {stages}")


@dataclass(frozen=True)
class _TimmTransform:
    """timm's own preprocessing of an evaluation, without the normalisation."""

    transform: Callable[[Any], Tensor]

    def __call__(self, pixels: np.ndarray) -> Tensor:
        from PIL import Image

        if pixels.dtype != np.uint8:
            pixels = (scale_to_unit(pixels).clip(0, 1) * 255).round().astype(np.uint8)
        return self.transform(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def _open_timm(request: FeatureRequest) -> FeatureModel:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    if request.runtime not in ("auto", "pytorch"):
        raise BadInput(f"--runtime {request.runtime}: models of timm run in PyTorch; leave the flag out")
    if not request.model.startswith("timm:"):
        raise BadInput(f"{request.model}: give timm:NAME; timm.list_models(pretrained=True) lists the names")
    name = timm_name(request.model)
    file = weights_file(request.model, download=request.download)
    device = _torch_device(request.device)
    with library_errors(f"{request.model}: cannot be loaded from {file}", BadInput):
        tensors = timm.models.load_state_dict(str(file), weights_only=True)
        create = partial(
            timm.create_model, name, pretrained=True, pretrained_cfg_overlay={"state_dict": tensors}
        )
        model: Any = _created(create, request.image_size)
        model.reset_classifier(0)
        model.eval().requires_grad_(False).to(device)
        config = resolve_model_data_config(model)
    if request.image_size:
        config["input_size"] = (config["input_size"][0], *request.image_size)
    channels, height, width = config["input_size"]
    if channels not in (1, 3):
        raise BadInput(f"{request.model}: takes images of {channels} channels, which timm does not read")
    transform: Any = create_transform(**config, is_training=False, normalize=False)
    rule = Preprocessing("none", (height, width), tuple(config["mean"]), tuple(config["std"]))
    return _probed(
        request,
        sha256=sha256_of(file),
        precision="fp32",
        size=(height, width),
        title=f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}, {device.type}",
        channels=channels,
        resize=_TimmTransform(transform),
        min_side=math.ceil(max(height, width) / config["crop_pct"]),
        preprocessing=rule,
        run=_timm_features(request, model, device),
    )


def _created(create: Callable[..., nn.Module], image_size: ImageSize | None) -> nn.Module:
    """Creates a model for images of a size; convolutional ones take any, and no argument for it."""
    if image_size is None:
        return create()
    try:
        return create(img_size=image_size)
    except TypeError:
        return create()


def _timm_features(request: FeatureRequest, model: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns the pooled features before the classifier, or those of a stage."""
    if request.stage is None and request.pooling == "mean":
        return torch.inference_mode()(lambda images: model(images.to(device)))
    if not hasattr(model, "forward_intermediates"):
        raise BadInput(f"{request.model}: has no stages; leave out --stage and --pooling none")
    stages = len(model.feature_info)
    _check_stage(request, stages)
    index = (request.stage or stages) - 1

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        found = model.forward_intermediates(
            images.to(device), indices=[index], intermediates_only=True, output_fmt="NCHW"
        )[0]
        return found.float().mean(dim=(2, 3)) if request.pooling == "mean" else found

    return features


def _torch_device(name: DeviceName) -> torch.device:
    from coma.devices import current_gpu, pick_device

    return torch.device("cuda", current_gpu()) if pick_device(name).type == "cuda" else torch.device("cpu")


def _probed(
    request: FeatureRequest,
    *,
    sha256: str,
    precision: Precision,
    size: tuple[int, int],
    preprocessing: Preprocessing,
    **facts: Any,
) -> FeatureModel:
    """Returns the model, with the shape of its features as it has on a grey image.

    Raises:
        BadInput: it does not take images of this size.
    """
    given = request.model
    if not (is_reference(given) or is_shipped(given)):
        given = str(Path(given).absolute())
    mean, std = (tuple(map(float, each)) for each in (preprocessing.mean, preprocessing.std))
    spec = FeatureSpec(given, sha256, size, mean, std, request.stage, request.pooling, (), precision)
    model = FeatureModel(spec, preprocessing=preprocessing, **facts)
    grey = torch.full((model.channels, *size), 128, dtype=torch.uint8)
    with library_errors(f"{request.model}: does not take images of {size[0]} x {size[1]} px", BadInput):
        shape = model([grey]).shape[1:]
    return replace(model, spec=replace(spec, shape=tuple(shape)))
