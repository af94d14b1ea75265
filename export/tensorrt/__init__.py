"""TensorRT engines from ONNX files, and checks of graphs with TensorRT-RTX.

The code supports TensorRT 10.13 and later, and 11: the network is strongly typed, so the ONNX file determines
the precision of every operator.
"""
