from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import Precision
from sopdeploy.bundle.probes import read_probes
from sopdeploy.errors import LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.backbones import resnet
from sopdeploy.models.base import Classifier
from sopdeploy_export.capture.deployed import generated_images
from sopdeploy_export.capture.program import NETWORK_PREFIX, capture_any_batch
from sopdeploy_export.lower import float16, precision
from sopdeploy_export.lower.accuracy import AccuracyCheck, calibration_images
from sopdeploy_export.lower.float16 import in_float16
from sopdeploy_export.lower.precision import (
    NO_IMAGES,
    Accuracy,
    Lowered,
    PrecisionReport,
    UserImages,
)
from sopdeploy_export.lower.to_onnx import lower
from sopdeploy_export.options import ExportOptions
from tests.export.conftest import GMSOP, export_once
from tests.export.lower.test_int8 import painted
from tests.export.once import ALONE, BATCH, graph_of
from tests.support.gpu_graphs import accepted
from tests.support.slow import mostly_slow
from tests.sweep.steps import write_graph

Make = Callable[..., Classifier]


def computed_types(program: ExportedProgram) -> dict[str, set[str]]:
    """List the floating-point types that each part of *program* computes in."""
    types: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        stack, value = (
            list((node.meta.get("nn_module_stack") or {}).values()),
            node.meta.get("val"),
        )
        if (
            node.op == "call_function"
            and stack
            and torch.is_tensor(value)
            and value.is_floating_point()
        ):
            part = stack[-1][0].removeprefix(NETWORK_PREFIX)
            types.setdefault(part, set()).add(str(value.dtype).removeprefix("torch."))
    return types


def cast_graph(
    graph: Lowered, preprocess: Preprocess
) -> tuple[onnx.ModelProto, dict[str, set[str]]]:
    """Convert *graph* to fp16; return the ONNX graph and the types that each part computes in."""
    options = ExportOptions(precision="fp16", max_batch=BATCH.maximum)
    types: dict[str, set[str]] = {}
    cast_types = precision.cast_types

    def observed(*arguments: Any) -> Lowered:
        cast = cast_types(*arguments)
        types.update(computed_types(cast.program))
        return cast

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cast_types", observed)
        return precision.convert_precision(graph, preprocess, options, NO_IMAGES).model, types


HALF, FLOAT = "float16", "float32"
GSOP = {"cov_width": 32, "block_stages": ("layer4",), "base_width": 16}
CASTS: dict[str, tuple[str, dict[str, Any], dict[str, set[str]]]] = {
    "fp16 keeps only the root": (
        "resnet8",
        {"pooling": {"kind": "isqrt", "width": 8}},
        {
            "pooling.root": {FLOAT},
            "pooling.layer_reduce": {HALF},
            "layer1.0.conv1": {HALF},
            "fc": {HALF},
        },
    ),
    "a mixture keeps gate, roots and sums": (
        "gmsop-16-8-resnet18",
        GMSOP,
        {
            "mixture": {HALF, FLOAT},
            "gate": {FLOAT},
            "gate.feature.2": {FLOAT},
            "layer4.0.conv1": {HALF},
        },
    ),
    "attention keeps its excitation": (
        "gsop-net1-resnet26",
        GSOP,
        {"layer2.0.conv1": {HALF}, "layer4.0.conv1": {HALF}},
    ),
    "bilinear pooling keeps its product": (
        "resnet8",
        {"pooling": "bcnn"},
        {"pooling": {FLOAT}, "layer1.0.conv1": {HALF}, "fc": {HALF}},
    ),
}


@pytest.mark.parametrize("case", mostly_slow(CASTS, "fp16 keeps only the root"))
def test_second_order_parts_keep_float32_in_a_copy(
    preprocess: Preprocess, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(resnet.BLOCKS, 26, (1, 1, 1, 1))
    name, config, expected = CASTS[case]
    graph = graph_of(name, preprocess, **config)
    before = {key: tensor.clone() for key, tensor in graph.network.state_dict().items()}
    model, types = cast_graph(graph, preprocess)

    assert all(
        torch.equal(before[key], tensor) for key, tensor in graph.network.state_dict().items()
    )

    accepted(model, "fp16")
    assert {part: types[part] for part in expected} == expected
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {
        onnx.TensorProto.FLOAT
    }

    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    cast = {"conv1.weight", "conv1.bias", "head.fc.weight", "head.weight"} & kinds.keys()
    assert cast
    assert {kinds[weight] for weight in cast} == {onnx.TensorProto.FLOAT16}

    excitations = [part for part in types if part.endswith("excitation")]
    assert bool(excitations) == (config is GSOP)
    assert all(types[part] == {FLOAT} for part in excitations)
    for part in excitations:
        own = {name: kind for name, kind in kinds.items() if name.startswith(f"{part}.")}
        assert {f"{part}.row_bn.weight", f"{part}.conv.weight"} <= own.keys()
        assert set(own.values()) == {onnx.TensorProto.FLOAT}


def test_batch_norm_folded_twice_is_rejected_before_the_noise_floor_hides_it(
    preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = float16.fold_norm

    def twice(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        honest(convolution, norm)
        honest(convolution, norm)

    monkeypatch.setattr(float16, "fold_norm", twice)
    network, program, _ = graph_of("resnet8", preprocess)
    pixels = Normalize(preprocess, torch.contiguous_format)(
        torch.from_numpy(generated_images(preprocess.crop)[:2])
    )
    with pytest.raises(LoweringError, match=r"batch norms folded"):
        in_float16(network, program, pixels)


class Sums(nn.Module):
    """Sums and means over a map, as networks of users write them, with two layers that contain some."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        pooled = nn.functional.adaptive_avg_pool2d(x, 2).mean((2, 3)) + x.sum((2, 3)) / 256
        return self.fc(pooled + torch.linalg.vector_norm(x, dim=(2, 3)) / 16)


class Named(nn.Module):
    """Gives its layers their inputs by name, and one none."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.ones(1, 8))

        def forward(self) -> torch.Tensor:
            return self.rows

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.table, self.fc = nn.Conv2d(3, 8, 1), self.Table(), nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(input=self.stem(input=images).mean((2, 3)) + self.table())


def test_a_layer_may_get_its_input_by_name_or_have_none(preprocess: Preprocess) -> None:
    network, pixels = Named().eval(), torch.rand(2, 3, 4, 4)
    program = capture_any_batch(network, preprocess, ALONE)
    cast = in_float16(network, program, torch.rand(2, 3, preprocess.crop, preprocess.crop))
    logits = cast(pixels)

    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits.float(), network(pixels), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_sums_of_a_users_network_are_computed_in_float32(preprocess: Preprocess) -> None:
    network = Sums().eval()
    program = capture_any_batch(network, preprocess, ALONE)
    certified = Lowered(network, program, lower(program, ("logits",)))
    options = ExportOptions(precision="fp16", max_batch=1)
    cast = precision.cast_types(certified, preprocess, options)
    widest = [
        (node.target, [operand.meta["val"].dtype for operand in node.all_input_nodes[:1]])
        for node in cast.program.graph.nodes
        if node.op == "call_function"
        and torch.Tag.reduction in getattr(node.target, "tags", ())
    ]

    assert len(widest) >= 3
    assert all(dtypes == [torch.float32] for _, dtypes in widest), widest

    reductions = [
        node
        for node in cast.model.graph.node
        if node.op_type.startswith(("Reduce", "Instance"))
    ]
    types = onnx.shape_inference.infer_shapes(cast.model).graph.value_info
    in_half = {
        value.name
        for value in types
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    }

    assert reductions
    assert not any(node.input[0] in in_half for node in reductions)


ATEN = torch.ops.aten


MAP = torch.ones(2, 4, 6, 6, dtype=torch.float16)


FILTERS, SCALES = (
    torch.ones(4, 4, 3, 3, dtype=torch.float16),
    torch.ones(4, dtype=torch.float16),
)


ADDING: dict[str, tuple[Any, tuple[Any, ...], bool | None]] = {
    "a mean": (ATEN.mean.dim, (MAP, [2, 3]), True),
    "a mean over one position": (ATEN.mean.dim, (MAP[:, :, :1, :1], [2, 3]), None),
    "a cumulative sum": (ATEN.cumsum.default, (MAP, 1), True),
    "a product of elements": (ATEN.prod.dim_int, (MAP, 1), True),
    "average pooling": (ATEN.avg_pool2d.default, (MAP, [2, 2]), True),
    "average pooling to a size": (ATEN.adaptive_avg_pool2d.default, (MAP, [2, 2]), True),
    "bilinear resizing": (ATEN.upsample_bilinear2d.vec, (MAP, [9, 9], False, None), True),
    "softmax": (ATEN.softmax.int, (MAP, 1), True),
    "group norm": (ATEN.group_norm.default, (MAP, 2, SCALES, SCALES), True),
    "instance norm": (
        ATEN.instance_norm.default,
        (MAP, SCALES, SCALES, None, None, True, 0.1, 1e-5, False),
        True,
    ),
    "batch norm": (
        ATEN._native_batch_norm_legit_no_training.default,
        (MAP, SCALES, SCALES, SCALES, SCALES, 0.1, 1e-5),
        None,
    ),
    "max pooling": (ATEN.max_pool2d.default, (MAP, [2, 2]), None),
    "a maximum": (ATEN.amax.default, (MAP, [2]), None),
    "a transposition": (ATEN.permute.default, (MAP, [0, 2, 3, 1]), None),
    "a position": (ATEN.argmax.default, (MAP, 1), None),
    "a sum in float32": (ATEN.mean.dim, (MAP.float(), [2, 3]), None),
    "a convolution": (ATEN.conv2d.default, (MAP, FILTERS), False),
    "a product of matrices": (ATEN.matmul.default, (MAP, MAP), False),
    "attention": (ATEN.scaled_dot_product_attention.default, (MAP, MAP, MAP), False),
}


@pytest.mark.parametrize("name", ADDING)
def test_operators_that_add_are_known_by_their_derivatives(name: str) -> None:
    operator, arguments, expected = ADDING[name]
    assert float16.adds_elements(operator, arguments, {}) == expected


class RunsTwice(nn.Module):
    """Convolutions and batch norms of which one runs twice, then one more pair."""

    def __init__(self, convolutions: int, norms: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(convolutions + 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(norms + 1))
        for number, norm in enumerate(self.norms):
            nn.init.constant_(norm.weight, 1.5 + number)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels
        for position in (0, 1, -1):
            convolution, norm = (
                parts[min(position, len(parts) - 2)]
                for parts in (self.convolutions, self.norms)
            )
            x = norm(convolution(x)).relu()
        return x.mean((2, 3))


def num_batch_norms(network: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


@pytest.mark.parametrize(
    ("convolutions", "norms"), [(2, 1), (1, 2)], ids=["norm", "convolution"]
)
def test_layers_that_run_twice_are_not_folded(
    convolutions: int, norms: int, preprocess: Preprocess
) -> None:
    network = RunsTwice(convolutions, norms).eval()
    program = capture_any_batch(network, preprocess, ALONE)
    pixels = Normalize(preprocess, torch.contiguous_format)(
        torch.from_numpy(generated_images(preprocess.crop)[:2])
    )
    in_float16(network, program, pixels)
    before = num_batch_norms(network)
    float16.fold_batch_norms(network, program)

    assert num_batch_norms(network) == before - 1


class BatchNormAct2d(nn.BatchNorm2d):
    """A batch norm with an activation, named and built as timm's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(input)))


def test_a_batch_norm_with_an_activation_is_folded_and_the_activation_stays(
    preprocess: Preprocess,
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNormAct2d(3), nn.Flatten()).eval()
    nn.init.constant_(network[1].weight, 40.0)  # ReLU6 cuts values off
    program = capture_any_batch(network, preprocess, ALONE)
    pixels = Normalize(preprocess, torch.contiguous_format)(
        torch.from_numpy(generated_images(preprocess.crop)[:2])
    )
    expected = network(pixels)
    float16.fold_batch_norms(network, program)

    torch.testing.assert_close(network(pixels), expected)
    assert num_batch_norms(network) == 0


def test_missing_casts_stop_the_export(
    preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cast_types", lambda certified, *_: certified)
    graph, options = graph_of("resnet8", preprocess), ExportOptions(precision="fp16")
    with pytest.raises(LoweringError, match="conv1 in float32"):
        precision.convert_precision(graph, preprocess, options, NO_IMAGES)
    with pytest.raises(LoweringError, match=r"^no part"):
        precision.check_float16(onnx.ModelProto(), nn.Flatten())


def test_bundle_records_its_precision_and_its_noise_floor(make: Make, tmp_path: Path) -> None:
    found = export_once(
        make("resnet8", pooling="isqrt"), "resnet8", tmp_path, max_batch=1, precision="fp16"
    )
    assert (
        found.manifest.precision
        == found.precision.precision
        == found.parity.precision
        == "fp16"
    )
    assert found.parity.floors_allowed == 4
    assert found.parity.logits.noise_floor > 1e-5

    probes = read_probes(open_bundle(found.path))
    assert probes.tolerance["logits"] == pytest.approx(4 * found.parity.logits.noise_floor)
    assert (found.path / "precision.json").is_file()
    assert found.manifest.lineage.onnx_root != found.certificate.roots.onnx


@pytest.mark.parametrize(("drop", "deviation"), [(1.5, 0.1), (0.5, 0.6)])
def test_allowed_drift_of_numbers_does_not_allow_a_loss_of_accuracy(
    preprocess: Preprocess, drop: float, deviation: float
) -> None:
    options = ExportOptions(precision="fp16", allow_numerical_error=True)
    check = AccuracyCheck(options, preprocess, labels=())
    measured = Accuracy(
        num_images=200,
        before=None,
        after=None,
        num_agreeing=199,
        drop=drop,
        deviation=deviation,
    )

    with pytest.raises(ParityError, match=r"1\.50|0\.60"):
        check.check_drop(PrecisionReport(precision="fp16", parts={}, accuracy=measured))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_mixture_that_gathers_its_components_agrees_in_every_precision(
    tmp_path: Path, precision: Precision, preprocess: Preprocess
) -> None:
    mixture = graph_of("gmsop-16-8-resnet18", preprocess, **GMSOP)
    options, user_images = ExportOptions(precision="fp16", max_batch=4), NO_IMAGES
    if precision == "int8":
        (tmp_path / "images").mkdir()
        calibrate = painted(tmp_path / "images", 32)
        user_images = UserImages(calibration_images(calibrate, preprocess), ())
        options = ExportOptions(
            precision="int8", calibrate=calibrate, int8_for="tensorrt", max_batch=4
        )
    _, parity = write_graph(mixture, preprocess, tmp_path / "model.onnx", options, user_images)

    assert parity.passed
    assert parity.operators["TopK"] == 1

    accepted(onnx.load(tmp_path / "model.onnx"), precision)


@pytest.mark.parametrize(
    ("scale", "refused"),
    [
        pytest.param(2, False, marks=pytest.mark.slow),
        (1e4, True),
        pytest.param(1e6, True, marks=pytest.mark.slow),
    ],
)
def test_a_part_without_headroom_in_float16_is_named_with_advice(
    make: Make, preprocess: Preprocess, scale: float, refused: bool
) -> None:
    network = make("resnet8")
    network.get_parameter("bn1.weight").data.mul_(scale)
    program = capture_any_batch(network, preprocess, ALONE)
    graph = Lowered(network, program, lower(program, network.outputs))
    message = r"^conv1 .*precision fp32$"

    with pytest.raises(LoweringError, match=message) if refused else nullcontext():
        precision.convert_precision(
            graph, preprocess, ExportOptions(precision="fp16", max_batch=1), NO_IMAGES
        )
