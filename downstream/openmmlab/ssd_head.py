"""mmdet's SSD head, which in mmdet 3.3 can be trained but predicts nothing for want of an attribute."""

from __future__ import annotations

from mmdet.models.dense_heads import SSDHead
from mmengine.registry import MODELS


@MODELS.register_module()
class PredictingSSDHead(SSDHead):
    """`SSDHead` with the attribute that `BaseDenseHead.predict_by_feat` looks at."""

    loss_cls = None
    """SSD's loss is no module."""
