"""TensorRT and TensorRT-RTX: finding the library, running engines, and reading their sidecars."""
