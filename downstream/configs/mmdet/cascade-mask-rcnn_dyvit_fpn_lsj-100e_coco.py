"""Cascade Mask R-CNN on DyViT-B and FPN, 100 epochs of COCO with large-scale jitter."""

_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "mmdet::common/lsj-100e_coco-instance.py"]
custom_imports = dict(imports=["downstream.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type="DyViT", artifact="runs/base/artifact", drop_path=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(decay_rate=0.8),
    clip_grad=dict(max_norm=1.0, norm_type=2),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)

# 100 epochs, as 25 of the data repeated four times (Ghiasi et al. 2021, arXiv 2012.07177: large-scale jitter)
train_dataloader = dict(batch_size=8, dataset=dict(times=4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=25, by_epoch=True, milestones=[22, 24], gamma=0.1),
]
