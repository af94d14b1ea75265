"""One small interface over PyTorch, ONNX Runtime and TensorRT."""
