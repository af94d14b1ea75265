"""Models as graphs that can be exported: tensors in, tensors out, with dynamic shapes."""
