"""Engines: TensorRT plans as a cache beside the bundle; what the build and the service share.

No torch, no onnx, and Python 3.10 syntax: the last TensorRT 8.6 binding is for 3.10.
"""
