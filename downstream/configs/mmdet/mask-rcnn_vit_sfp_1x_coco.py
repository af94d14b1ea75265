"""Mask R-CNN on ViT-B and a simple feature pyramid, 12 epochs of COCO: the baseline to DyViT's."""

_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["downstream.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type="PlainViT", artifact="runs/mae-vit-base/artifact", drop_path=0.1),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=768, out_channels=256, num_outs=5),
)
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(decay_rate=0.7),
    clip_grad=dict(max_norm=1.0, norm_type=2),
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
)
