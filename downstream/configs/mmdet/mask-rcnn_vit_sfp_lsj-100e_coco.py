"""Mask R-CNN on ViT-B and a simple feature pyramid, 100 epochs of COCO with large-scale jitter (ViTDet)."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::common/lsj-100e_coco-instance.py"]
custom_imports = dict(imports=["downstream.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type="PlainViT", artifact="runs/mae-vit-base/artifact", drop_path=0.1),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=768, out_channels=256, num_outs=5),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(decay_rate=0.7),
    clip_grad=dict(max_norm=1.0, norm_type=2),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
)

# 100 epochs, as 25 of the data repeated four times (Ghiasi et al. 2021, arXiv 2012.07177: large-scale jitter)
train_dataloader = dict(batch_size=8, dataset=dict(times=4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=25, by_epoch=True, milestones=[22, 24], gamma=0.1),
]
