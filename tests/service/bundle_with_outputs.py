"""A bundle on disk with gates and embeddings."""

from pathlib import Path

import numpy as np
import onnx.parser
from onnx import numpy_helper

from tests.forged import write_computed
from tests.service.conftest import LABELS, RULES

GRAPH = """
<ir_version: 10, opset_import: ["": 18]>
maps (uint8[n, 32, 32, 3] images)
=> (float[n, 7] logits, float[n, 4] gates, float[n, 3] embedding)
<float[3, 7] weight, float[7] bias, float[7, 4] mixing, int64[2] axes = {2, 3}>
{
    wide = Cast <to = 1> (images)
    planes = Transpose <perm = [0, 3, 1, 2]> (wide)
    embedding = ReduceMean <keepdims = 0> (planes, axes)
    scores = MatMul (embedding, weight)
    logits = Add (scores, bias)
    mixed = MatMul (logits, mixing)
    gates = Softmax (mixed)
}
"""


def write_bundle_with_outputs(folder: Path) -> Path:
    """Write it into *folder*."""
    rng = np.random.default_rng(3)
    weight, bias, mixing = (rng.normal(size=size).astype(np.float32) for size in ((7, 3), 7, (7, 4)))
    model = onnx.parser.parse_model(GRAPH)
    values = {"weight": (weight / np.float32(40)).T.copy(), "bias": bias, "mixing": mixing}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    images = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return write_computed(folder, model, images, 1e-2, preprocess=RULES, labels=LABELS)
