"""ONNX files to TensorRT engines, what is written beside an engine, and what is checked before one is used.

One code for TensorRT 10.13 and later and for 11: the network is strongly typed, so the ONNX file alone says
what is computed in which precision.
"""
