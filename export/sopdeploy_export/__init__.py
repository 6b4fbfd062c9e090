"""Export a checkpoint as a bundle: detach, prove, convert to ONNX, compare, write."""
