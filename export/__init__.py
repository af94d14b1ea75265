"""Export of artifacts to ONNX and TensorRT, verified against PyTorch on real images."""
