"""Encoders, reconstructors, classifiers and segmentors as graphs that can be exported."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coma.errors import BadInput
from coma.models import Encoder
from coma.objectives import MaskedPixels


class ClassifierGraph(nn.Module):
    """Images to logits.

    Args:
        classifier: A classifier, as `coma.artifact.load_classifier` returns it.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Maps images `[b, c, H, W]` to logits `[b, classes]`."""
        return (self.classifier(images.to(next(self.parameters()).dtype)).float(),)


class SegmentorGraph(nn.Module):
    """Images to logits and classes of every pixel: mmseg's EncoderDecoder in the mode `whole`.

    Args:
        model: The segmentor of the artifact; its modules are copied.
        settings: Model settings of the artifact.

    Raises:
        BadInput: the segmentor has several decoders, sliding windows, or one output for two classes.
    """

    def __init__(self, model: nn.Module, settings: dict) -> None:
        super().__init__()
        if settings.get("type") != "EncoderDecoder":
            raise BadInput(
                f"a segmentor of type {settings.get('type')!r} cannot be exported; EncoderDecoder can"
            )
        if settings.get("test_cfg", {}).get("mode", "whole") != "whole":
            raise BadInput("test_cfg.mode 'slide' cannot be exported; train with mode 'whole'")
        head = settings["decode_head"]
        if head.get("out_channels") not in (None, head["num_classes"]):
            raise BadInput(
                "a segmentor with one output for two classes cannot be exported; train it with two outputs"
            )
        parts = dict(copy.deepcopy(model).named_children())
        self.backbone, self.neck, self.decode_head = (
            parts.get(name, nn.Identity()) for name in ("backbone", "neck", "decode_head")
        )
        self.align_corners = bool(head.get("align_corners", False))
        replace_adaptive_pooling(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps images `[b, c, H, W]` to logits `[b, classes, H, W]` and classes int64 `[b, H, W]`."""
        x = self.backbone(images.to(next(self.parameters()).dtype))
        logits = self.decode_head(self.neck(x)).float()
        logits = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=self.align_corners)
        return logits, logits.argmax(dim=1)


class AdaptiveAveragePool(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two matrix multiplications, for maps of dynamic size.

    Args:
        side: Height and width of the output.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Pools maps `[b, c, h, w]` to `[b, c, side, side]`."""
        rows, cols = (pooling_matrix(length, self.side, x) for length in x.shape[2:])
        return rows @ x @ cols.transpose(0, 1)


def pooling_matrix(length: int, side: int, like: Tensor) -> Tensor:
    """Returns the weights `[side, length]` of `length` positions in `side` averages.

    Average i covers the positions from floor(i * length / side) up to ceil((i + 1) * length / side), as in
    torch; compared as products, because TensorRT-RTX compiles no division of a dynamic size.
    """
    place = torch.arange(length, device=like.device)
    averages = torch.arange(side, device=like.device)[:, None]
    inside = ((place + 1) * side > averages * length) & (place * side < (averages + 1) * length)
    weights = inside.float()
    return (weights / weights.sum(dim=1, keepdim=True)).to(like.dtype)


def replace_adaptive_pooling(module: nn.Module) -> None:
    """Replaces `nn.AdaptiveAvgPool2d` with `AdaptiveAveragePool` in a module and its children.

    Raises:
        BadInput: the output of a pooling is not square.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d):
            size = child.output_size
            rows, cols = size if isinstance(size, tuple) else (size, size)
            if rows != cols or rows is None:
                raise BadInput(
                    f"adaptive pooling to {child.output_size} cannot be exported; square outputs can"
                )
            setattr(module, name, AdaptiveAveragePool(rows))
        else:
            replace_adaptive_pooling(child)


class EncoderGraph(nn.Module):
    """Images to the feature pyramid and the pooled feature.

    Args:
        encoder: Any encoder of the core.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps images `[b, c, H, W]` to maps `[b, c_i, ceil(H/s_i), ceil(W/s_i)]` and a pooled feature.

        The finest map comes first. The pooled feature `[b, c]` is the mean of the last map over all units
        that cover the image.
        """
        pyramid = self.encoder(images.to(next(self.parameters()).dtype))
        pooled = pyramid[-1].float().mean(dim=(2, 3))
        return *(each.float() for each in pyramid), pooled


class ReconstructorGraph(nn.Module):
    """Images and a mask to images with predicted hidden units.

    The mean and contrast of hidden units come from visible units nearby (see `coma.objectives.targets`), so
    hidden pixels do not affect the output.

    Args:
        objective: A pre-trained objective.
    """

    def __init__(self, objective: MaskedPixels) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor, visible: Tensor) -> tuple[Tensor]:
        """Maps images `[b, c, H, W]` and visible units, bool `[b, h, w]`, to images `[b, c, H, W]`."""
        return (self.objective.reconstruct(images, visible),)


class ListedEncoderGraph(nn.Module):
    """Images and a list of units to the features of these units: the encoder computes nothing else.

    Args:
        encoder: Any encoder of the core.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, visible: Tensor) -> tuple[Tensor, ...]:
        """Maps images `[b, c, H, W]` and units, int64 `[b, s]`, to features `[b, s, c]` and their mean."""
        features = self.encoder.forward_listed(images.to(next(self.parameters()).dtype), visible).float()
        return features, features.mean(dim=1)


class ListedReconstructorGraph(ReconstructorGraph):
    """Images and a list of visible units to images: the encoder computes the visible units only."""

    def forward(self, images: Tensor, visible: Tensor) -> tuple[Tensor]:
        """Maps images `[b, c, H, W]` and visible units, int64 `[b, s]`, to images `[b, c, H, W]`."""
        return (self.objective.reconstruct_listed(images, visible),)
