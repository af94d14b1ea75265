"""Fine-tuning of encoders: detection with MMDetection, segmentation with MMSegmentation.

Everything that touches OpenMMLab's registries, operators and runner is in `openmmlab`. Importing this package
imports none of OpenMMLab.
"""
