"""Exported graphs in 8 bits: int8 and fp8, by post-training quantisation.

On a DyViT tiny pre-trained on photographs, against fp32 (16 other photographs, 64 to calibrate): relative
error of the four maps at most 1.0 % in int8 and 2.7 % in fp8; without the merges between the stages, which
carry most of it since no residual path goes around them, 0.4 % and 1.0 % (`keep=("*.merge.*",)`).
"""

from export.quantization.calibration import Batch, Method
from export.quantization.precision_report import precision_summary
from export.quantization.quantize import Quantized, quantize_fp8, quantize_int8

__all__ = [
    "Batch",
    "Method",
    "Quantized",
    "precision_summary",
    "quantize_fp8",
    "quantize_int8",
]
