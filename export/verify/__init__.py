"""Verification of exported files against PyTorch on real images."""
