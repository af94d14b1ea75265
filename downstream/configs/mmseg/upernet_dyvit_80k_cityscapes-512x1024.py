"""UPerNet on DyViT-B, 80,000 steps of Cityscapes at 512 x 1024 px, 4 x 2 images a step."""

_base_ = "mmseg::upernet/upernet_r50_4xb2-80k_cityscapes-512x1024.py"
custom_imports = dict(imports=["downstream.openmmlab"], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type="DyViT", artifact="runs/base/artifact", drop_path=0.1),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(decay_rate=0.75),
    clip_grad=dict(max_norm=1.0, norm_type=2),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=80000, by_epoch=False),
]
