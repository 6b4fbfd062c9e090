"""A second-order network of a dozen operators, as the exporter writes it, and bundles of it."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.images.preprocess import Preprocess
from tests.support.forged import write_computed

SIDE = 8
CHANNELS = 4
CLASSES = 5
RULES = Preprocess(resize=SIDE, crop=SIDE)


def network(*, half: bool = False) -> onnx.ModelProto:
    """Compute logits from uint8 images by a centered covariance; *half* makes the convolution fp16."""
    rng = np.random.default_rng(0)
    kind = np.float16 if half else np.float32
    weights = {
        "layer1.weight": (rng.normal(size=(CHANNELS, 3, 3, 3)) / 400).astype(kind),
        "fc.weight": rng.normal(size=(CHANNELS * CHANNELS, CLASSES)).astype(np.float32),
        "axes": np.array([2], dtype=np.int64),
        "rows": np.array([0, CHANNELS, -1], dtype=np.int64),
        "flat": np.array([0, CHANNELS * CHANNELS], dtype=np.int64),
    }
    wide = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Transpose", ["images"], "moved", {"perm": [0, 3, 1, 2]}),
        ("Cast", ["moved"], "pixels", {"to": wide}),
        ("Conv", ["pixels", "layer1.weight"], "convolved", {"pads": [1, 1, 1, 1]}),
        ("Relu", ["convolved"], "features", {}),
        ("Cast", ["features"], "exact", {"to": TensorProto.FLOAT}),
        ("Reshape", ["exact", "rows"], "matrix", {}),
        ("ReduceMean", ["matrix", "axes"], "mean", {"keepdims": 1}),
        ("Sub", ["matrix", "mean"], "centered", {}),
        ("Transpose", ["centered"], "turned", {"perm": [0, 2, 1]}),
        ("MatMul", ["centered", "turned"], "covariance", {}),
        ("Reshape", ["covariance", "flat"], "vector", {}),
        ("MatMul", ["vector", "fc.weight"], "logits", {}),
    ]
    nodes = [
        helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes)
        for op, inputs, output, attributes in steps
    ]
    graph = helper.make_graph(
        nodes,
        "sopdeploy",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def some_images(count: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(1).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def outputs_of(model: onnx.ModelProto, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = _session(model.SerializeToString()).run(
        None, {"images": images}
    )[0]
    return found


@functools.cache
def _session(model: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def write(
    folder: Path,
    model: onnx.ModelProto | None = None,
    *,
    wrong_by: float = 0.0,
    probes: int = 3,
    **fields: Any,
) -> Bundle:
    """Write and open a bundle of *model*; *wrong_by* is added to the expected outputs of its probes."""
    model = model or network()
    images = some_images(probes)
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    tolerance = 0.1 if half else 1e-5 * float(abs(outputs_of(model, images)).max())
    labels = [f"class {i}" for i in range(CLASSES)]
    batch = BatchRange(minimum=1, optimum=4, maximum=16)
    options = {"config": {}, "detached": (), "batch": batch, **fields}
    return open_bundle(
        write_computed(
            folder,
            model,
            images,
            tolerance,
            preprocess=RULES,
            labels=labels,
            wrong_by=wrong_by,
            **options,
        )
    )
