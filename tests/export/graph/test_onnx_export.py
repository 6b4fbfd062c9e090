from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export.graph import (
    OPSET,
    capture,
    capture_any_batch,
    lower,
)
from tests.export.once import BATCH, graph_of

Make = Callable[..., Classifier]


def lowered(network: nn.Module, preprocess: Preprocess, batch: BatchRange = BATCH) -> onnx.ModelProto:
    return lower(capture_any_batch(network, preprocess, batch), ("logits",))


def test_graph_has_one_uint8_input_one_float_output_and_standard_operators(preprocess: Preprocess) -> None:
    model = graph_of("resnet8", preprocess).model
    (images,), (logits,) = model.graph.input, model.graph.output
    dims = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert (images.name, dims) == ("images", ["batch", 16, 16, 3])
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Conv") == 7
    assert "BatchNormalization" not in operators
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"conv1.weight", "layer3.0.conv2.weight", "fc.weight", "fc.bias"} <= names


def test_same_network_lowers_to_the_same_bytes_without_local_paths(
    make: Make, preprocess: Preprocess
) -> None:
    models = graph_of("resnet8", preprocess).model, lowered(make("resnet8"), preprocess)
    first, second = (model.SerializeToString(deterministic=True) for model in models)
    assert first == second
    for trace in (b"/home", b"/usr", b"site-packages", b".py", b"stack_trace", b"pkg.torch"):
        assert trace not in first


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
def test_any_batch_size_gives_the_networks_logits(preprocess: Preprocess, batch: int) -> None:
    network, _, model = graph_of("resnet8", preprocess)
    session = ort.InferenceSession(model.SerializeToString())
    images = np.random.default_rng(batch).integers(0, 256, (batch, 16, 16, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (preprocess.mean, preprocess.std))
    with torch.no_grad():
        expected = network((pixels - mean) / std)
    np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, atol=2e-5)


class Minimal(nn.Module):
    """A network of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(2, -1),
        lambda x: x.mean(dim=(2, 3)) if x.shape[0] < 4 else x.amax(dim=(2, 3)),
    ],
    ids=["fixes the batch", "treats small batches differently"],
)
def test_network_that_restricts_the_batch_size_is_rejected(
    function: Callable[[Tensor], Tensor], preprocess: Preprocess
) -> None:
    with pytest.raises(LoweringError):
        capture(Minimal(function).eval(), preprocess, BATCH)


def test_operator_without_onnx_form_is_rejected_in_one_line(preprocess: Preprocess) -> None:
    eigenvalues = Minimal(lambda x: torch.linalg.eigvalsh(x[:, 0] @ x[:, 0].transpose(1, 2)))
    with pytest.raises(LoweringError, match=r"no ONNX form: .*aten\._linalg_eigh") as problem:
        lowered(eigenvalues.eval(), preprocess)
    assert str(problem.value).isprintable()
