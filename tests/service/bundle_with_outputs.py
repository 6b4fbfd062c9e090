"""A bundle on disk with gates and embeddings."""

from pathlib import Path

import numpy as np
import onnx.parser
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from sopdeploy.bundle.folder import open_bundle, publish, seal, staging
from sopdeploy.bundle.manifest import TensorRecord
from sopdeploy.bundle.onnx_root import onnx_file_root
from sopdeploy.bundle.probes import Probes, write_probes
from tests.forged import proof_files

OUTPUTS = {"logits": (7,), "gates": (4,), "embedding": (3,)}
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


def write_bundle_with_outputs(plain: Path, folder: Path) -> Path:
    """Write it into *folder*; the rest is that of the bundle *plain*."""
    rng = np.random.default_rng(3)
    weight, bias, mixing = (rng.normal(size=size).astype(np.float32) for size in ((7, 3), 7, (7, 4)))
    model = onnx.parser.parse_model(GRAPH)
    values = {"weight": (weight / np.float32(40)).T.copy(), "bias": bias, "mixing": mixing}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    images = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    expected = dict(zip(OUTPUTS, ReferenceEvaluator(model).run(None, {"images": images}), strict=True))
    root = onnx_file_root(model.SerializeToString())
    manifest = open_bundle(plain).manifest
    fields = dict(manifest) | {
        "lineage": manifest.lineage.model_copy(update={"onnx_root": root}),
        "outputs": tuple(
            TensorRecord(name=name, dtype="float32", shape=(None, *shape)) for name, shape in OUTPUTS.items()
        ),
    }
    del fields["files"]
    with staging(folder) as stage:
        (stage / "labels.json").write_bytes((plain / "labels.json").read_bytes())
        (stage / "model.onnx").write_bytes(model.SerializeToString())
        for name, content in proof_files(root).items():
            (stage / name).write_bytes(content)
        write_probes(
            stage / "probes.npz",
            Probes(images=images, expected=expected, tolerance=dict.fromkeys(OUTPUTS, 1e-2)),
        )
        return publish(stage, seal(stage, fields), folder)
