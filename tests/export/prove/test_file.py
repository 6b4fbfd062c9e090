"""The exported file is compared with its network: drift, noise floor, agreement, and routes of a gate."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from sopdeploy.bundle.golden import write_golden
from sopdeploy.bundle.manifest import BatchRange, Precision
from sopdeploy.errors import ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export.capture.deployed import Deployed, generated_images
from sopdeploy_export.pack.bundle import as_probes
from sopdeploy_export.prove.file import (
    FileContent,
    ParityReport,
    count_flips,
    logit_spread,
    prove_file,
)
from sopdeploy_export.prove.reference import (
    FLOORS,
    ParityReference,
    RoutingParity,
    compare_routes,
    compute_reference,
)
from sopdeploy_export.runs import gate_logits, mark_decided, open_session
from tests.export.conftest import GMGAP, PREPROCESS, save, trained
from tests.export.once import ALONE, BATCH, graph_of
from tests.sweep.steps import measured

Make = Callable[..., Classifier]
Exported = tuple[onnx.ModelProto, Deployed]
Measure = Callable[..., ParityReport]


@pytest.fixture(scope="module")
def exported(preprocess: Preprocess) -> Exported:
    network, _, model = graph_of("resnet8", preprocess)
    return model, Deployed(network, preprocess).eval()


def opened(folder: Path) -> tuple[ort.InferenceSession, FileContent]:
    path = folder / "model.onnx"
    return open_session(path), FileContent.of(onnx.load(path), path.stat().st_size)


@pytest.fixture
def measure(exported: Exported, probes: Tensor, tmp_path: Path) -> Measure:
    """Change a weight of the exported file, then compare the file with the network."""

    def run(
        name: str = "",
        change: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        allow_numerical_error: bool = False,
    ) -> ParityReport:
        copy = onnx.ModelProto.FromString(exported[0].SerializeToString())
        for tensor in copy.graph.initializer:
            if change is not None and tensor.name == name:
                values = change(onnx.numpy_helper.to_array(tensor).copy())
                tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), name))
        images = probes.numpy()
        (tmp_path / "model.onnx").write_bytes(copy.SerializeToString())
        expected = compute_reference(exported[1], images)
        return prove_file(
            *opened(tmp_path),
            expected,
            images,
            BATCH,
            allow_numerical_error=allow_numerical_error,
        )

    return run


class NamesFloat32(nn.Module):
    """Converts values to float32 in `forward`, unless it is *free*."""

    def __init__(self, *, free: bool) -> None:
        super().__init__()
        self.free, self.fc = free, nn.Linear(3, 5)
        nn.init.constant_(self.fc.weight, 1 / 3)

    def forward(self, pixels: Tensor) -> Tensor:
        means = pixels.mean((2, 3))
        logits: Tensor = self.fc(means if self.free else means.float())
        return logits if self.free else logits.to(dtype=torch.float32)


def test_the_reference_is_float64_even_if_code_names_float32(
    preprocess: Preprocess, probes: Tensor
) -> None:
    free, named = (NamesFloat32(free=free).eval() for free in (True, False))
    named.load_state_dict(free.state_dict())
    exact, found = (
        compute_reference(Deployed(n, preprocess), probes.numpy()) for n in (free, named)
    )

    assert (found.outputs["logits"] == exact.outputs["logits"]).all()
    assert found.outputs["logits"].dtype == np.float64


class OfMeans(nn.Module):
    """Logits that *change* makes of a linear layer of the means of the colors."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change, self.fc = change, nn.Linear(3, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.change(self.fc(pixels.mean((2, 3))))


def chaotic(steps: int) -> Callable[[Tensor], Tensor]:
    """Return a function that enlarges rounding: steps of a logistic map."""

    def change(x: Tensor) -> Tensor:
        y = x.sigmoid()
        for _ in range(steps):
            y = 3.9 * y * (1 - y)
        return y

    return change


UNSTABLE: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "a layer": (lambda x: x, False),
    "rounding that grows": (chaotic(22), False),
    "rounding that becomes everything": (chaotic(60), False),
    "the first image of the batch": (lambda x: x + x[:1], True),
    "the size of the batch": (lambda x: x * (2 if x.shape[0] == 1 else 1), True),
    "another value for float32": (lambda x: x + (x.numpy().dtype == np.float32), True),
}


@pytest.mark.parametrize("case", UNSTABLE)
def test_runs_that_differ_by_more_than_enlarged_rounding_are_named(
    case: str, preprocess: Preprocess, probes: Tensor
) -> None:
    change, is_unstable = UNSTABLE[case]
    found = compute_reference(Deployed(OfMeans(change).eval(), preprocess), probes.numpy())
    assert found.unstable == ("logits" if is_unstable else None)


def test_the_exported_file_stays_within_its_tolerance(measure: Measure) -> None:
    report = measure()
    assert report.passed
    assert report.outputs.keys() == {"logits"}
    assert report.logits.drift.keys() == {"1", "2", "4", "5"}
    assert report.logits.tolerance == pytest.approx(FLOORS * report.logits.noise_floor)
    assert report.logits.drift_in_floors < FLOORS
    assert report.num_agreeing + report.flips["noise"] == report.num_images == 4

    changed = report.model_copy(update={"flips": {"noise": 2, "error": 1}})
    assert changed.num_agreeing == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fc.bias", lambda values: values + 1e-3),
        ("layer2.0.conv2.weight", lambda values: values.swapaxes(2, 3)),
    ],
)
def test_a_file_that_drifts_stops_the_export(
    measure: Measure, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    with pytest.raises(
        ParityError,
        match=r"rounding error, limit",
    ):
        measure(name, change)


@pytest.mark.parametrize(
    ("num_wrong", "is_named"), [(1, True), (2, True), (3, False), (4, False)]
)
def test_a_choice_by_order_is_named_if_most_images_agree(
    exported: Exported, probes: Tensor, tmp_path: Path, num_wrong: int, is_named: bool
) -> None:
    (tmp_path / "model.onnx").write_bytes(exported[0].SerializeToString())
    order = ["aten.topk.default in blocks.3"]
    expected = compute_reference(exported[1], probes.numpy(), order=order)
    expected.outputs["logits"][:num_wrong] += 1e-3

    with pytest.raises(ParityError, match=r"differs by") as caught:
        prove_file(*opened(tmp_path), expected, probes.numpy(), BATCH)
    advice = (
        f"; {4 - num_wrong} of 4 images agree, so rounding probably decides what aten.topk.default in "
        "blocks.3 chooses among nearly equal values"
    )
    assert (advice in str(caught.value)) == is_named
    assert ("try allow_numerical_error" in str(caught.value)) == is_named


def of_means(folder: Path) -> tuple[ort.InferenceSession, FileContent]:
    """Write and open a file whose logits are the means of the colors, and its embedding twice the logits."""
    images = helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", 16, 16, 3])
    outputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3])
        for name in ("logits", "embedding")
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["logits"], axes=[1, 2], keepdims=0),
        helper.make_node("Add", ["logits", "logits"], ["embedding"]),
    ]
    graph = helper.make_graph(nodes, "means", [images], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    return opened(folder)


# The changes of the reference, and of how many images the advice says that they agree, if it is given.
CHANGES: dict[str, tuple[Callable[[ParityReference], ParityReference], int | None]] = {
    "an error of the embedding": (lambda found: shifted(found, "embedding", 2), 2),
    "an error of most embeddings": (lambda found: shifted(found, "embedding", 3), None),
    "floors as wide as the logits": (
        lambda found: replace(found, noise_floor=dict.fromkeys(found.outputs, 1e3)),
        None,
    ),
    "code that depends on the batch": (lambda found: replace(found, unstable="logits"), None),
}


def shifted(found: ParityReference, name: str, count: int) -> ParityReference:
    values = found.outputs[name].copy()
    values[:count] += 1
    return replace(found, outputs={**found.outputs, name: values})


@pytest.mark.parametrize("case", CHANGES)
def test_a_choice_by_order_is_named_only_if_the_file_errs(
    case: str, probes: Tensor, tmp_path: Path
) -> None:
    change, num_agreeing = CHANGES[case]
    means = probes.numpy().mean((1, 2))
    expected = ParityReference(
        outputs={"logits": means, "embedding": 2 * means},
        noise_floor={"logits": 1e-3, "embedding": 1e-3},
        order=("aten.topk.default",),
    )
    assert prove_file(*of_means(tmp_path), expected, probes.numpy(), BATCH).passed

    with pytest.raises(ParityError) as caught:
        prove_file(*opened(tmp_path), change(expected), probes.numpy(), BATCH)

    advice = "" if num_agreeing is None else f"{num_agreeing} of 4 images"
    assert advice in str(caught.value)
    assert ("topk" in str(caught.value)) == bool(advice)
    assert ("allow_numerical_error" in caught.value.remedies) == bool(advice)


def test_an_image_that_differs_only_in_some_batches_does_not_agree(
    probes: Tensor, tmp_path: Path
) -> None:
    means = probes.numpy().mean((1, 2))
    means[-1] += 1
    expected = ParityReference(
        outputs={"logits": means}, noise_floor={"logits": 1e-3}, order=("aten.topk.default",)
    )

    with pytest.raises(ParityError, match="3 of 4"):
        prove_file(
            *of_means(tmp_path), expected, probes.numpy(), BATCH, ran={5: {"logits": means}}
        )


@pytest.mark.parametrize(
    ("optimum", "maximum", "sizes"),
    [
        (1, 1, ["1"]),
        (3, 3, ["1", "2", "3"]),
        (2, 9, ["1", "2", "5"]),
        (8, 64, ["1", "2", "5", "8"]),
    ],
)
def test_the_file_runs_in_batches_of_the_optimum(
    optimum: int, maximum: int, sizes: list[str], probes: Tensor, tmp_path: Path
) -> None:
    means = probes.numpy().mean((1, 2))
    expected = ParityReference(outputs={"logits": means}, noise_floor={"logits": 1e-3})
    batch = BatchRange(optimum=optimum, maximum=maximum)
    found = prove_file(*of_means(tmp_path), expected, probes.numpy(), batch)

    assert list(found.logits.drift) == sizes


def test_a_bundle_for_huge_batches_is_not_run_with_one(
    measure: Measure, exported: Exported, probes: Tensor, tmp_path: Path
) -> None:
    measure()
    expected, huge = (
        compute_reference(exported[1], probes.numpy()),
        BatchRange(optimum=2, maximum=1000),
    )
    found = prove_file(*opened(tmp_path), expected, probes.numpy(), huge)

    assert list(found.logits.drift) == ["1", "2", "5"]


def test_an_allowed_drift_is_recorded(measure: Measure) -> None:
    report = measure("fc.bias", lambda values: values + 1e-3, allow_numerical_error=True)
    assert report.drift_allowed
    assert report.logits.largest_drift == pytest.approx(1e-3, rel=0.05)


def test_outputs_that_are_not_finite_are_never_allowed(measure: Measure) -> None:
    with pytest.raises(ParityError, match="not finite"):
        measure("fc.bias", lambda values: values * np.nan, allow_numerical_error=True)


def test_the_spread_is_over_images_and_for_one_image_over_classes() -> None:
    assert logit_spread(np.array([[1.0, 5.0], [4.0, 5.5]])) == 3.0
    assert logit_spread(np.array([[1.0, 5.0]])) == 4.0


@pytest.mark.parametrize(
    ("precision", "fraction", "message"),
    [
        ("fp16", 0.124, None),
        ("fp16", 0.126, r"12\.5 % .*precision fp32"),
        ("fp32", 0.031, None),
        ("fp32", 0.032, r"3\.1 % "),
        ("int8", 0.3, None),
    ],
)
def test_a_noise_floor_as_wide_as_the_logits_stops_the_export(
    exported: Exported,
    probes: Tensor,
    tmp_path: Path,
    precision: Precision,
    fraction: float,
    message: str | None,
) -> None:
    """A file may differ by four noise floors.

    With floors of an eighth of the spread of the logits, it could differ by half of the spread, as a
    file does that ignores its input.
    """
    model, deployed = exported
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    images = probes.numpy()
    exact = compute_reference(deployed, images)

    # A reference whose noise floor is a fraction of the spread.
    floor = fraction * logit_spread(exact.outputs["logits"])
    noisy = ParityReference(
        outputs=exact.outputs, noise_floor={"logits": floor}, precision=precision
    )
    arguments = (*opened(tmp_path), noisy, images, BATCH)

    if message is None:
        report = prove_file(*arguments)
        assert not report.drift_allowed
        assert not report.unverifiable
        return

    with pytest.raises(ParityError, match=message) as caught:
        prove_file(*arguments)
    assert "\n" not in str(caught.value)

    # The option writes it, and the report says that nothing was verified.
    allowed = prove_file(*arguments, allow_numerical_error=True)
    assert allowed.drift_allowed
    assert allowed.unverifiable


def test_logits_of_zeros_cannot_be_verified(
    measure: Measure, probes: Tensor, tmp_path: Path
) -> None:
    zeros = {"logits": np.zeros((measure().num_images, 10))}
    expected = ParityReference(outputs=zeros, noise_floor={"logits": 0.0})
    with pytest.raises(ParityError, match="logits is 0"):
        prove_file(*opened(tmp_path), expected, probes.numpy(), BATCH)


def test_every_changed_class_is_counted_by_its_cause() -> None:
    expected = np.array([[1.0, 0.0, 0.9]] * 5)
    values = np.array([[1.0, 0.0, 0.9], [1.0, 0.0, 1.1], *[[0.0, 1.0, 0.9]] * 3])
    found = count_flips(values, expected, 0.06, np.array([False, False, False, True, True]))
    assert found == {"noise": 1, "error": 1, "routing": 2}


@pytest.mark.parametrize(
    ("weight", "value", "precision", "message"),
    [
        ("fc.bias", float("inf"), "fp32", "not finite"),
        (
            "layer2.0.bn2.weight",
            3e38,
            "fp16",
            "fp16 .*precision fp32",
        ),
        (
            "layer2.0.bn2.weight",
            3e38,
            "fp32",
            "fp32 .*weight decay",
        ),
    ],
)
def test_a_network_whose_own_logits_are_not_finite_is_refused_with_advice(
    make: Make, preprocess: Preprocess, probes: Tensor, weight: str, value: float, precision: Precision,
    message: str,
) -> None:  # fmt: skip
    network = make("resnet8")
    # 3e38 is finite, and the products in float64, too
    network.get_parameter(weight).data.fill_(value)
    deployed = Deployed(network, preprocess).eval()

    with pytest.raises(ParityError, match=message):
        compute_reference(deployed, probes.numpy(), precision=precision)


def test_a_fixed_batch_axis_is_rejected(
    measure: Measure, exported: Exported, probes: Tensor, tmp_path: Path
) -> None:
    measure()
    fixed = onnx.load(tmp_path / "model.onnx")
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    (tmp_path / "model.onnx").write_bytes(fixed.SerializeToString())
    expected = compute_reference(exported[1], probes.numpy())

    with pytest.raises(ParityError, match="batch of 2"):
        prove_file(*opened(tmp_path), expected, probes.numpy(), BATCH)


CLEAR = [3.0, 2.0, 1.0, 0.0]


def routes_of(logits: list[list[float]], own: list[list[float]] | None = None) -> RoutingParity:
    exact = np.array(logits)
    return compare_routes(exact, exact + 1e-3 if own is None else np.array(own), 2, 4.0)


@pytest.mark.parametrize(
    ("logits", "chosen", "decided"),
    [(CLEAR, 2, True), ([3.0, 0.0, 1.0001, 1.0], 2, False)],
)
def test_only_an_image_with_a_decided_gate_becomes_a_golden_example(
    logits: list[float], chosen: int, decided: bool, tmp_path: Path
) -> None:
    routing = routes_of([CLEAR])
    write_golden(
        tmp_path,
        Preprocess(resize=8, crop=8),
        lambda _: np.zeros(2, np.float32),
        1.0,
        lambda _: bool(mark_decided(np.array([logits]), chosen, routing.tolerance).all()),
    )

    assert (tmp_path / "golden-0.jpg").exists() == decided


CLOSE, FLIPPED = [3.0, 1.001, 1.0, 0.0], [3.0, 1.0, 1.01, 0.0]


@pytest.mark.parametrize(
    ("logits", "own", "undecided", "left_out"),
    [
        ([CLEAR, [3.0, 1.0001, 1.0, 0.0]], [CLEAR, [3.0, 1.0, 1.001, 0.0]], 1, (1,)),
        ([CLOSE] * 3, [CLOSE, CLOSE, FLIPPED], 3, (2,)),
    ],
    ids=["others are decided", "none is decided, one is rerouted"],
)
def test_undecided_images_are_left_out(
    logits: list[list[float]], own: list[list[float]], undecided: int, left_out: tuple[int, ...]
) -> None:
    found = routes_of(logits, own)
    assert (found.num_undecided, found.left_out) == (undecided, left_out)


@pytest.mark.slow
def test_a_correct_file_with_underflowing_gate_weights_passes(tmp_path: Path) -> None:
    network = trained("gmgap-16-8-resnet18", **GMGAP)
    torch.nn.init.normal_(network.gate.weight, std=300)
    checkpoint = save(network, "gmgap-16-8-resnet18", tmp_path / "ckpt.pt", PREPROCESS)
    expected, parity = measured(checkpoint, tmp_path / "model.onnx", batch=ALONE)

    assert parity.routing is not None
    assert not parity.drift_allowed

    probes = as_probes(generated_images(16), expected, parity)
    assert (probes.expected["gates"] == 0).sum(
        axis=1
    ).max() == 3  # one of the two chosen weights is 0
    assert len(probes.images) == parity.num_images - len(parity.routing.left_out)


def test_a_gate_that_rounding_changes_on_every_image_is_refused(
    preprocess: Preprocess, probes: torch.Tensor
) -> None:
    network = trained("gmgap-16-8-resnet18", **GMGAP)
    deployed = Deployed(network, preprocess).eval()
    with pytest.raises(ParityError, match=r"undecided .*int8"):
        compute_reference(
            deployed,
            probes[:3].numpy(),
            None,
            "int8",
            lambda images: -gate_logits(deployed, images),
        )


class InFloat32(nn.Module):
    """Names a type in its code, as networks do that compute in half precision elsewhere."""

    def forward(self, feature: Tensor) -> Tensor:
        return feature.float()


def test_a_gate_whose_code_names_float32_is_compared_in_float64(
    preprocess: Preprocess, probes: Tensor
) -> None:
    network = trained("gmgap-16-8-resnet18", **GMGAP)
    deployed = Deployed(network, preprocess).eval()
    expected = compute_reference(deployed, probes.numpy())
    network.gate.feature = nn.Sequential(network.gate.feature, InFloat32())

    assert compute_reference(deployed, probes.numpy()).routing == expected.routing
