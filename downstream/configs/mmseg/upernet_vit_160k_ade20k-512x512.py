"""UPerNet on ViT-B and a simple feature pyramid, 160,000 steps of ADE20K: the baseline to DyViT's."""

_base_ = "mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"
custom_imports = dict(imports=["downstream.openmmlab"], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type="PlainViT", artifact="runs/mae-vit-base/artifact", drop_path=0.1),
    neck=dict(type="SimpleFeaturePyramid", in_channels=768, out_channels=256),
    decode_head=dict(in_channels=[256, 256, 256, 256]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(decay_rate=0.65),
    clip_grad=dict(max_norm=1.0, norm_type=2),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]
