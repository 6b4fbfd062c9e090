"""Export a checkpoint as a bundle: detach, prove, convert to ONNX, compare, write."""

import sopdeploy  # noqa: F401  # disables the telemetry of onnxruntime before its import
