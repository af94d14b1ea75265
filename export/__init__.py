"""Artifacts to ONNX and TensorRT, compared with PyTorch on real images before they are kept."""
