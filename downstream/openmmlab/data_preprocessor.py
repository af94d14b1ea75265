"""mmdet's data preprocessor for any number of channels (mmdet's own supports 1 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.registry import MODELS


@MODELS.register_module()
class ChannelsDetDataPreprocessor(DetDataPreprocessor):
    """Normalises, pads and stacks images of any number of channels.

    Args:
        mean: Mean of pixels in 0..255, per channel.
        std: Standard deviation of pixels in 0..255, per channel.
        kwargs: Arguments of `DetDataPreprocessor`.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._enable_normalize = True
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), False)
