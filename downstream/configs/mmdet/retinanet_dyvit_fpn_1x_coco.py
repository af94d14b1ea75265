"""RetinaNet on DyViT-B and FPN, 12 epochs of COCO, 8 x 2 images a step."""

_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["downstream.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True, type="DyViT", artifact="runs/base/artifact", drop_path=0.1, out_indices=(1, 2, 3)
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(decay_rate=0.8),
    clip_grad=dict(max_norm=1.0, norm_type=2),
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
