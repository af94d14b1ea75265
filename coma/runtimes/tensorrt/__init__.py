"""TensorRT and TensorRT-RTX: finding the library, reading engines and what is written beside them."""
