"""The backbone inside MMDetection and MMSegmentation: adapters, configurations, and two commands.

One module meets each foreign thing: `backbone` for models, `ops` for mmcv's compiled operators, `layer_decay`
for optimizers, `runs` for mmengine's Runner. Importing this package imports none of OpenMMLab.
"""
