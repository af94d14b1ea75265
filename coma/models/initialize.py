"""Starts an encoder from weights that exist: tensors that fit are copied, patches are adapted.

Kernels of patches are resampled (FlexiViT, Beyer et al. 2023, by timm), their channels repeated or summed.
Everything that was adapted, left out or is missing is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor

from coma.errors import BadInput
from coma.library_errors import first_line
from coma.messages import abridged, counted
from coma.models import Encoder
from coma.models.checkpoints import Checkpoint

_NAMED = 4
"""Names of tensors in a report, beside the counts of the others."""
_LARGEST = 64
"""Largest side in pixels, and number of channels, of a kernel that is adapted: no patch is larger."""


@dataclass(frozen=True)
class Initialization:
    """What an encoder took from a checkpoint, in words.

    Attributes:
        total: Number of the encoder's tensors.
        missing: Those that are not in the checkpoint.
        unfit: Those of another shape or type, and which.
        adapted: What was changed so that it fits.
        left_out: Tensors of the checkpoint that the encoder has no place for.
        notes: What was chosen among the checkpoint's tensors.
    """

    total: int
    missing: tuple[str, ...]
    unfit: tuple[str, ...]
    adapted: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def matched(self) -> int:
        """Returns the number of the encoder's tensors that were taken."""
        return self.total - len(self.missing) - len(self.unfit)

    def __str__(self) -> str:
        """Returns the report in one line."""
        parts = [f"{self.matched} of {self.total} tensors of the encoder"]
        parts += [f"adapted: {'; '.join(self.adapted)}"] if self.adapted else []
        for label, names in (
            ("not in the file", self.missing),
            ("do not fit", self.unfit),
            ("left out", self.left_out),
        ):
            parts += [f"{len(names)} {label}: {abridged(names, _NAMED)}"] if names else []
        return "; ".join([*parts, *self.notes])


def initialize(encoder: Encoder, checkpoint: Checkpoint) -> Initialization:
    """Copies a checkpoint's tensors into an encoder, as far as they fit.

    Args:
        encoder: Encoder whose weights are replaced.
        checkpoint: Tensors of an encoder of the same kind.

    Raises:
        BadInput: numbers that are not finite, or a file of no such encoder.
    """
    floats = {name: t for name, t in checkpoint.tensors.items() if t.is_floating_point()}
    stored = checkpoint.tensors | {name: t.float() for name, t in floats.items()}
    try:
        named = encoder.from_checkpoint(stored)
    except BadInput:
        raise
    except Exception as error:  # tensors of other ranks and sizes than their names promise
        raise BadInput(f"not the weights of such an encoder ({first_line(error)})") from None
    own = encoder.state_dict()
    wanted = [name for name, _ in encoder.named_parameters()]
    missing, unfit, sizes = [], [], []
    with torch.no_grad():
        for name in own:
            if name not in named.tensors:
                missing += [name] if name in wanted else []
                continue
            tensor, target = named.tensors[name], own[name]
            fitted, note = _fitted(name, tensor, target)
            if fitted is None:
                kind = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
                unfit.append(f"{name} is {list(tensor.shape)}{kind}, the encoder has {list(target.shape)}")
                continue
            if not bool(torch.isfinite(fitted).all()):
                raise BadInput(
                    f"{name} holds values that are not finite (NaN or infinity); give other weights"
                )
            sizes += [note] if note else []
            target.copy_(fitted)
    types = {tensor.dtype for tensor in floats.values()} - {torch.float32}
    converted = [f"{str(kind).removeprefix('torch.')} converted to float32" for kind in types]
    left_out = [name for name in named.tensors if name not in own]
    return Initialization(
        len(wanted),
        tuple(missing),
        tuple(unfit),
        (*sizes, *named.notes, *converted),
        (*left_out, *named.beside, *checkpoint.beside),
        tuple(checkpoint.notes),
    )


def _fitted(name: str, tensor: Tensor, target: Tensor) -> tuple[Tensor | None, str]:
    """Returns the tensor in the shape of `target`, None if it cannot be brought to it, and what was done."""
    if tensor.is_floating_point() != target.is_floating_point():
        return None, ""
    if tensor.shape == target.shape:
        return tensor, ""
    alike = tensor.ndim == target.ndim == 4 and len(tensor) == len(target) and 0 not in tensor.shape
    if alike and max(tensor.shape[1:] + target.shape[2:]) <= _LARGEST:
        return _kernel(name, tensor, target)
    return None, ""


def _kernel(name: str, kernel: Tensor, target: Tensor) -> tuple[Tensor, str]:
    steps = []
    before, wanted = kernel.shape[-2:], target.shape[-2:]
    if before != wanted:
        kernel = resample_patch_embed(kernel, list(wanted))
        steps.append(f"from {before[0]} x {before[1]} to {wanted[0]} x {wanted[1]} px")
    channels, have = target.shape[1], kernel.shape[1]
    if channels != have:  # as timm's adapt_input_conv: the sum of contributions keeps its size
        repeated = kernel.repeat(1, math.ceil(channels / have), 1, 1)[:, :channels] * (have / channels)
        kernel = kernel.sum(dim=1, keepdim=True) if channels == 1 else repeated
        steps.append(f"from {counted(have, 'channel')} to {channels}")
    return kernel, f"{name} {' and '.join(steps)}"
