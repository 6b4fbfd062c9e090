"""Networks as ONNX graphs: inputs, batch sizes and operators."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.capture.deployed import generated_images
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.capture.symbolic_forms import SymbolicForms
from sopdeploy_export.lower.float16 import float32_parts
from sopdeploy_export.lower.int8 import Int8Quantizer
from sopdeploy_export.lower.to_onnx import OPSET, check_onnx, lower, part_of
from tests.export.conftest import Minimal
from tests.export.once import BATCH, graph_of
from tests.export.user_network.networks import export_small, trained, variant
from tests.support.gpu_graphs import accepted
from tests.sweep.steps import Small, agreed


def lowered(
    network: nn.Module, preprocess: Preprocess, batch: BatchRange = BATCH
) -> onnx.ModelProto:
    return lower(capture_any_batch(network, preprocess, batch), ("logits",))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 16])
def test_no_two_of_the_generated_images_are_equal(side: int) -> None:
    images = generated_images(side)
    assert len({image.tobytes() for image in images}) == len(images) >= 3


def test_graph_has_one_uint8_input_one_float_output_and_standard_operators(
    preprocess: Preprocess,
) -> None:
    model = graph_of("resnet8", preprocess).model
    (images,), (logits,) = model.graph.input, model.graph.output
    dims = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]

    assert (images.name, dims) == ("images", ["batch", 16, 16, 3])
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert (logits.name, logits.type.tensor_type.elem_type) == (
        "logits",
        onnx.TensorProto.FLOAT,
    )
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert model.ir_version == 8, "ONNX Runtime 1.17 refuses 10"

    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Conv") == 7
    assert "BatchNormalization" not in operators

    names = {tensor.name for tensor in model.graph.initializer}
    assert {"conv1.weight", "layer3.0.conv2.weight", "fc.weight", "fc.bias"} <= names

    content = model.SerializeToString()
    for trace in (b"/home", b"/usr", b"site-packages", b".py", b"stack_trace", b"pkg.torch"):
        assert trace not in content


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
def test_any_batch_size_gives_the_networks_logits(preprocess: Preprocess, batch: int) -> None:
    network, _, model = graph_of("resnet8", preprocess)
    session = ort.InferenceSession(model.SerializeToString())
    images = np.random.default_rng(batch).integers(0, 256, (batch, 16, 16, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (
        torch.tensor(v)[None, :, None, None] for v in (preprocess.mean, preprocess.std)
    )
    with torch.no_grad():
        expected = network((pixels - mean) / std)

    np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, atol=2e-5)


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
    with pytest.raises(LoweringError, match="batch sizes differently"):
        capture_any_batch(Minimal(function).eval(), preprocess, BATCH)


def test_no_reshape_allows_sizes_of_zero_where_there_are_none(preprocess: Preprocess) -> None:
    network = Minimal(lambda x: x.reshape(x.shape[0], 3, -1).mean(2)).eval()
    model = lowered(network, preprocess)

    reshapes = [node for node in model.graph.node if node.op_type == "Reshape"]
    assert len(reshapes) > 0
    assert [name.name for node in reshapes for name in node.attribute] == []


def test_other_forms_take_the_parameters_of_torch_by_name() -> None:
    x, indices = torch.arange(8.0).reshape(4, 2), torch.tensor([[1]])
    with SymbolicForms():
        halves = torch.chunk(input=x, chunks=2)
        parts = torch.split(tensor=x, split_size_or_sections=3)
        second = torch.take_along_dim(input=x, indices=indices, dim=1)
        row = torch.take_along_dim(x, indices, 0)

    assert torch.equal(torch.cat(halves), x)
    assert [part.tolist() for part in parts] == [x[:3].tolist(), x[3:].tolist()]
    assert torch.equal(second, x[:, 1:])
    assert torch.equal(row, x[1:2])


@pytest.mark.parametrize(("rows", "p"), [(3, 2.0), (25, 1.0), (26, 2.0)])
def test_distances_are_those_of_torch_for_any_number_of_vectors(
    p: float, rows: int, preprocess: Preprocess
) -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(rows, 3, generator=generator)
    x = torch.randn(30, 3, generator=generator)
    with SymbolicForms():
        distances = torch.cdist(x, centers, p=p)
    torch.testing.assert_close(distances, torch.cdist(x, centers, p=p), rtol=0, atol=1e-4)

    network = Minimal(lambda images: -torch.cdist(images.mean((2, 3)), centers, p=p))
    capture_any_batch(network.eval(), preprocess, BatchRange(optimum=1, maximum=64))


@pytest.mark.parametrize("rows", [3, 30])
@pytest.mark.parametrize("mode", ["use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"])
def test_distances_are_computed_in_the_mode_that_the_code_names(mode: str, rows: int) -> None:
    """Products of matrices lose digits of vectors that are far from 0 and close to each other."""
    generator = torch.Generator().manual_seed(0)
    centers = 100 + torch.randn(rows, 3, generator=generator)
    x = 100 + torch.randn(30, 3, generator=generator)
    with SymbolicForms():
        distances = torch.cdist(x, centers, compute_mode=mode)

    error = (distances - torch.cdist(x.double(), centers.double())).abs().max()
    assert (error > 1e-3) == (mode == "use_mm_for_euclid_dist")


def test_operator_without_onnx_form_is_rejected_in_one_line(preprocess: Preprocess) -> None:
    eigenvalues = Minimal(lambda x: torch.linalg.eigvalsh(x[:, 0] @ x[:, 0].transpose(1, 2)))
    with pytest.raises(LoweringError, match=r"aten\._linalg_eigh") as problem:
        lowered(eigenvalues.eval(), preprocess)
    assert str(problem.value).isprintable()


def attend(images: Tensor, dimensions: int, masked: bool) -> Tensor:
    """Attention between pixels (2), rows (3), rows of patches (4) or of windows of them (5 dimensions)."""
    rows = images.flatten(2) if dimensions == 3 else images
    values = rows.unflatten(2, (2, -1)) if dimensions == 5 else rows
    mask = torch.eye(values.shape[-2], dtype=torch.bool) if masked else None
    return (
        F.scaled_dot_product_attention(values, values + 1, values, mask).flatten(2).mean(dim=2)
    )


def assert_same_logits(network: nn.Module, preprocess: Preprocess) -> None:
    """Compare the ONNX file of *network* with *network* itself on three images."""
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    session = ort.InferenceSession(lowered(network, preprocess).SerializeToString())
    mean, std = (
        torch.tensor(v)[None, :, None, None] for v in (preprocess.mean, preprocess.std)
    )
    expected = network(
        (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    ).detach()
    np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, atol=1e-5)


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_attention_on_any_number_of_dimensions_is_exported(
    masked: bool, preprocess: Preprocess
) -> None:
    def attend_all(images: Tensor) -> Tensor:
        return torch.cat(
            [attend(images, dimensions, masked) for dimensions in (3, 4, 5)], dim=1
        )

    assert_same_logits(Minimal(attend_all).eval(), preprocess)


@pytest.mark.parametrize("dimensions", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_attention_of_a_query_that_may_read_nothing_is_zero(
    dimensions: int, preprocess: Preprocess
) -> None:
    def attend_to_dark(images: Tensor) -> Tensor:
        rows = images.flatten(2) if dimensions == 3 else images
        mask = (rows.mean(-1, keepdim=True) < 0).expand(*rows.shape[:-1], rows.shape[-2])
        return F.scaled_dot_product_attention(rows, rows, rows, mask).flatten(1)

    assert_same_logits(Minimal(attend_to_dark).eval(), preprocess)


class JoinedHeads(nn.Module):
    """Attention of two heads between rows, with relative positions for each image, as in BEiT and MaxViT."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.arange(2 * 16 * 16).reshape(1, 2, 16, 16) / 100)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.transpose(1, 2).flatten(2)
        heads = rows.unflatten(2, (2, -1)).transpose(1, 2)
        positions = self.positions.expand(images.shape[0], -1, -1, -1)
        attended = F.scaled_dot_product_attention(heads, heads, heads, positions)
        return attended.transpose(1, 2).reshape(images.shape[0], 16, 48).mean(dim=1)


@pytest.mark.slow
def test_attention_whose_heads_are_joined_by_a_view_is_exported(preprocess: Preprocess) -> None:
    assert_same_logits(JoinedHeads().eval(), preprocess)


SCALE = nn.Parameter(torch.tensor(1.000005))
SMALL = nn.Parameter(torch.tensor([1e-9, -1e-9]))

OF_ZERO: dict[str, Callable[[Tensor], Tensor]] = {
    "x / (|x| + 1e-8)": lambda x: x / (x.abs() + 1e-8),
    "1e9 (x - 1e-9)": lambda x: 1e9 * (x - 1e-9),
    "1.000005 (x + 1)": lambda x: 1.000005 * (x + 1),
    "(x + 1) / 1.000005": lambda x: (x + 1) / 1.000005,
    "x + 1.000005 (x + 1)": lambda x: torch.add(x, x + 1, alpha=1.000005),
    "a parameter of 1.000005": lambda x: SCALE * (x + 1),
    "exp(0.99999 parameter) + x": lambda x: (0.99999 * SCALE).exp() + x,
    "x / (x + exp(parameter))": lambda x: x / (x + (-20.7 * SCALE).exp()),
    "x / (x + parameter[0])": lambda x: x / (x + SMALL[0]),
    "x / (x + |parameter|)": lambda x: x / (x + SMALL[1].abs()),
}


def all_of(zeros: Tensor) -> Tensor:
    """Compute all of `OF_ZERO` of *zeros* (B, 3): (B, all their columns)."""
    return torch.cat([function(zeros) for function in OF_ZERO.values()], dim=1)


def test_results_for_zeros_are_those_of_the_network(preprocess: Preprocess) -> None:
    network = Minimal(lambda x: all_of(x.mean(dim=(2, 3)) * 0)).eval()
    session = ort.InferenceSession(lowered(network, preprocess).SerializeToString())
    found = session.run(None, {"images": np.zeros((3, 16, 16, 3), np.uint8)})[0]
    np.testing.assert_allclose(found, all_of(torch.zeros(3, 3)).detach(), rtol=1e-6)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu of an empty range": lambda x: x.clamp(-2, -1).relu(),
    "ranges without overlap": lambda x: x.clamp(0, 1).clamp(2, 3),
    "a sum into all positions": lambda x: x.T.index_add(0, torch.arange(3), x.T).T,
}


@pytest.mark.parametrize("form", RULES)
def test_the_optimizer_changes_no_result(form: str, preprocess: Preprocess) -> None:
    assert_same_logits(Minimal(lambda x: RULES[form](x.mean(dim=(2, 3)))).eval(), preprocess)


ON_SHAPES = ("Shape", "Range", "Gather", "Squeeze", "Unsqueeze")

NETWORKS_OF_OTHERS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "torchvision": (
        lambda: ResNet(BasicBlock, [1, 1, 1, 1]),
        64,
        {"Reshape": 1, "Mul": 1, "Add": 5},
    ),
    "timm": (
        lambda: timm.create_model("test_efficientnet"),
        64,
        {"Reshape": 1, "ReduceMean": 3},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS_OF_OTHERS)
def test_pooling_to_one_position_adds_no_operators_on_shapes(name: str) -> None:
    build, side, expected = NETWORKS_OF_OTHERS[name]
    model = lowered(build().eval(), Preprocess(resize=side, crop=side))
    counts = Counter(node.op_type for node in model.graph.node)

    assert {kind: counts[kind] for kind in (*ON_SHAPES, *expected)} == dict.fromkeys(
        ON_SHAPES, 0
    ) | expected

    accepted(model, "fp32")


STATISTICS = {"head": {"kind": "gap+mean+isqrt", "width": 8, "iterations": 3, "cosine": True}}
VIT = Small("head:timm:test_vit", 48, {**STATISTICS, "image_size": 48})


@pytest.mark.slow
def test_a_transformer_with_a_head_agrees_and_gpu_runtimes_accept_it(tmp_path: Path) -> None:
    assert agreed(VIT.trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx").passed
    accepted(onnx.load(tmp_path / "model.onnx"), "fp32")


@pytest.mark.slow
def test_a_head_of_an_earlier_version_with_a_distance_agrees(tmp_path: Path) -> None:
    head = {"head": {"kind": "gap+isqrt", "width": 8, "iterations": 3, "distance": True}}
    assert agreed(
        Small("head:resnet8", 16, head).trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx"
    ).passed


@pytest.mark.slow
def test_int8_quantizes_the_network_and_not_its_head(tmp_path: Path) -> None:
    small = Small("head:resnet8", 16, STATISTICS)
    assert agreed(small.trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx").passed

    images, plain = generated_images(16)[:4], onnx.load(tmp_path / "model.onnx")
    graph = Int8Quantizer(plain, images, float32_parts(small.build())).quantize().graph
    in_float = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    weights = {
        node.input[1] for node in graph.node if node.op_type in {"Conv", "Gemm", "MatMul"}
    }

    assert weights & in_float == {
        "conv1.weight",  # reads the image
        "pooled_head.poolings.layer3_0.layer_reduce.weight",
        "pooled_head.fc.weight",
        "pooled_head.means",
    }


@pytest.mark.parametrize(
    ("opset", "is_accepted"), [(17, False), (18, True), (19, False), (20, True), (21, False)]
)
def test_two_opsets_are_accepted(opset: int, is_accepted: bool) -> None:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[1] x) => (float[1] y) {{ y = Relu(x) }}'
    )
    with nullcontext() if is_accepted else pytest.raises(LoweringError, match="operator sets"):
        check_onnx(model)


@pytest.mark.parametrize("domain", ["ai.onnx.ml", "com.example"])
def test_operators_of_another_set_are_refused(domain: str) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "graph", [value], [output])
    sets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(domain, 1)]

    check_onnx(onnx.helper.make_model(graph, opset_imports=sets[:1]))
    with pytest.raises(LoweringError, match=rf"operator sets .*{domain}"):
        check_onnx(onnx.helper.make_model(graph, opset_imports=sets))


@pytest.mark.parametrize(
    ("scopes", "part"),
    [
        ("['', 'network', 'network.stem', 'conv2d']", "stem"),
        ("['', 'network', 'add']", "forward"),
        ("['', 'add']", "forward"),
        ("['add']", "forward"),
        (None, ""),
    ],
)
def test_the_part_of_a_node_is_its_innermost_module(scopes: str | None, part: str) -> None:
    node = ir.node("Add", [])
    if scopes is not None:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    assert part_of(node) == part


def test_a_form_that_is_wrong_for_the_images_is_refused(tmp_path: Path) -> None:
    network = variant(
        lambda self, x: self.fc(self.features(F.avg_pool2d(x, 2, divisor_override=3))),
        aux=False,
    )
    with pytest.raises(ParityError, match="logits"):
        export_small(trained(network), tmp_path / "out")
    assert not (tmp_path / "out").exists()
