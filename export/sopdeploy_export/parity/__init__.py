"""Compare the exported ONNX file with the network it was exported from."""
