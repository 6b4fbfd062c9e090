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
from sopdeploy_export.graph.onnx_export import OPSET, lower, operator_counts
from sopdeploy_export.graph.torch_export import capture, capture_any_batch
from sopdeploy_export.proof.onnx_hash import onnx_root
from tests.export.once import graph_of

Make = Callable[..., Classifier]
SIX = BatchRange(optimum=2, maximum=6)


def lowered(network: nn.Module, preprocess: Preprocess, batch: BatchRange = SIX) -> onnx.ModelProto:
    return lower(capture_any_batch(network, preprocess, batch), ("logits",))


def test_the_graph_takes_uint8_pictures_and_gives_float_logits(preprocess: Preprocess) -> None:
    graph = graph_of("resnet8", preprocess, SIX).model.graph
    images, logits = graph.input[0], graph.output[0]
    dims = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert (images.name, images.type.tensor_type.elem_type, dims) == (
        "images",
        onnx.TensorProto.UINT8,
        ["batch", 16, 16, 3],
    )
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    assert len(graph.input) == len(graph.output) == 1


def test_the_same_network_lowers_to_the_same_bytes(make: Make, preprocess: Preprocess) -> None:
    first, second = (lowered(make("resnet8"), preprocess) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_the_file_holds_no_trace_of_where_it_was_made(preprocess: Preprocess) -> None:
    raw = graph_of("resnet8", preprocess, SIX).model.SerializeToString()
    for trace in (b"/home", b"/usr", b"site-packages", b".py", b"stack_trace", b"pkg.torch"):
        assert trace not in raw


def test_weights_keep_their_own_names(preprocess: Preprocess) -> None:
    names = {tensor.name for tensor in graph_of("resnet8", preprocess, SIX).model.graph.initializer}
    assert {"conv1.weight", "layer3.0.conv2.weight", "fc.weight", "fc.bias"} <= names


def test_only_plain_operators_of_one_opset_are_left(preprocess: Preprocess) -> None:
    model = graph_of("resnet8", preprocess, SIX).model
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert operator_counts(model)["Conv"] == 7
    assert "BatchNormalization" not in operator_counts(model)


@pytest.mark.parametrize("batch", [1, 2, 3, 6])
def test_any_batch_size_gives_the_networks_answer(preprocess: Preprocess, batch: int) -> None:
    network, _, model = graph_of("resnet8", preprocess, SIX)
    session = ort.InferenceSession(model.SerializeToString())
    images = np.random.default_rng(batch).integers(0, 256, (batch, 16, 16, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (preprocess.mean, preprocess.std))
    with torch.no_grad():
        expected = network((pixels - mean) / std)
    np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, atol=2e-5)


def test_names_do_not_change_the_root_but_weights_do(preprocess: Preprocess) -> None:
    model = graph_of("resnet8", preprocess, SIX).model
    root = onnx_root(model)
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    for node in renamed.graph.node:
        node.name = f"renamed_{node.name}"
        node.doc_string = "renamed"
    assert onnx_root(renamed) == root
    weights = onnx.numpy_helper.to_array(model.graph.initializer[-1]).copy()
    weights.flat[0] = np.nextafter(weights.flat[0], np.float32(1))
    model.graph.initializer[-1].CopyFrom(
        onnx.numpy_helper.from_array(weights, model.graph.initializer[-1].name)
    )
    assert onnx_root(model) != root


class Answering(nn.Module):
    """As much of a backbone as capturing needs."""

    outputs = ("logits",)

    def outputs_tuple(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self(images),)


class Fixed(Answering):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class Narrow(Answering):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) if x.shape[0] < 4 else x.amax(dim=(2, 3))


@pytest.mark.parametrize(
    "network", [Fixed(), Narrow()], ids=["fixes the batch", "treats small batches otherwise"]
)
def test_a_network_that_does_not_take_every_batch_size_is_refused(
    network: nn.Module, preprocess: Preprocess
) -> None:
    with pytest.raises(LoweringError):
        capture(network.eval(), preprocess, SIX)


def test_a_bundle_for_single_images_has_a_batch_of_one(make: Make, preprocess: Preprocess) -> None:
    graph = lowered(make("resnet8"), preprocess, BatchRange(optimum=1, maximum=1)).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


class WithEigenvalues(Answering):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x[:, 0] @ x[:, 0].transpose(1, 2))


def test_an_operator_without_onnx_form_is_refused_in_one_line(preprocess: Preprocess) -> None:
    with pytest.raises(LoweringError, match="no ONNX form") as problem:
        lowered(WithEigenvalues().eval(), preprocess)
    assert "\n" not in str(problem.value)
