"""Nothing leaves without having been compared with PyTorch on real images."""
