from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from sopdeploy.errors import ConfigError, LoweringError, ParityError
from sopdeploy.manifest import BatchRange, Precision
from sopdeploy.models.base import Classifier
from sopdeploy.preprocess import Preprocess
from sopdeploy.probes import read_probes
from sopdeploy_export import ship as shipping
from sopdeploy_export.capture import capture
from sopdeploy_export.detach import detach
from sopdeploy_export.lower_onnx import OPSET, OPSET_OF_BFLOAT16, lower
from sopdeploy_export.pipeline import Exported, ExportOptions, export
from sopdeploy_export.precision import choose_iteration, choose_precision, with_precision
from sopdeploy_export.precision_report import part_precisions, refuse_other_types
from sopdeploy_export.ship import PrecisionOptions

Make = Callable[..., Classifier]
SMALL = BatchRange(optimum=2, maximum=4)


def cast_graph(
    network: Classifier, preprocess: Preprocess, precision: Precision, iteration: str = "fp32"
) -> tuple[onnx.ModelProto, dict[str, set[str]]]:
    """Return the ONNX graph in *precision*, and the types that each part computes in."""
    lean = detach(network) if network.training_only else network
    program = capture(lean, preprocess, SMALL).any_batch
    cast = with_precision(lean, program, precision, choose_iteration(iteration, precision))
    graph = capture(cast, preprocess, SMALL).any_batch
    opset = OPSET_OF_BFLOAT16 if precision == "bf16-backbone" else OPSET
    model = lower(graph, lean.outputs, opset)
    refuse_other_types(model, lean, precision)
    return model, {part.part: set(part.operations) for part in part_precisions(model, graph)}


def test_fp16_leaves_the_root_in_float32_and_nothing_else(make: Make, preprocess: Preprocess) -> None:
    model, types = cast_graph(make("isqrt-resnet8"), preprocess, "fp16")
    assert types["pooling.root"] == {"float32"}
    assert types["layer1.0.conv1"] == types["fc"] == {"float16"}
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {onnx.TensorProto.FLOAT}
    folded = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert folded["conv1.weight"] == folded["conv1.bias"] == onnx.TensorProto.FLOAT16


def test_bf16_backbone_leaves_the_classifier_alone(make: Make, preprocess: Preprocess) -> None:
    _, types = cast_graph(make("isqrt-resnet8"), preprocess, "bf16-backbone")
    assert types["layer3.0.conv2"] == {"bfloat16"}
    assert types["fc"] == types["pooling.root"] == {"float32"}


def test_newton_schulz_in_fp16_stores_halves_and_multiplies_in_float32(
    make: Make, preprocess: Preprocess
) -> None:
    model, types = cast_graph(make("isqrt-resnet8"), preprocess, "fp16", "fp16")
    assert types["pooling.root"] == {"float16", "float32"}
    typed = onnx.shape_inference.infer_shapes(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    products = [kinds[node.output[0]] for node in typed.graph.node if node.op_type == "MatMul"]
    assert set(products) == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("name", ["gmsop-16-8-resnet18", "gsop-net1-resnet26"])
def test_gate_and_attention_keep_float32_and_the_maps_do_not(
    make: Make, preprocess: Preprocess, name: str
) -> None:
    _, types = cast_graph(make(name), preprocess, "fp16")
    islands = [part for part in types if part == "gate" or part.endswith("excitation.row_bn")]
    assert islands
    assert all(types[part] == {"float32"} for part in islands)
    assert types["layer2.0.conv1"] == {"float16"}
    assert types["layer4.0.conv1"] == {"float16"}


def test_a_copy_is_cast_and_the_network_stays(make: Make, preprocess: Preprocess) -> None:
    network = make("resnet8")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cast_graph(network, preprocess, "fp16")
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_fp32_graph_asked_to_be_fp16_is_caught_and_named(make: Make, preprocess: Preprocess) -> None:
    network = make("isqrt-resnet8")
    model = lower(capture(network, preprocess, SMALL).any_batch, network.outputs)
    with pytest.raises(LoweringError, match=r"fp16 was asked for, but the graph holds conv1 in float32"):
        refuse_other_types(model, network, "fp16")


def test_a_cast_that_is_never_placed_stops_the_export(
    make: Make, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make("resnet8")
    program = capture(network, preprocess, SMALL).any_batch
    model = lower(program, network.outputs)
    monkeypatch.setattr(shipping, "with_precision", lambda lean, *_: lean)
    with pytest.raises(LoweringError, match="fp16 was asked for"):
        shipping.ship(network, program, model, preprocess, SMALL, PrecisionOptions(precision="fp16"))


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda: choose_precision("half"), "none of fp32, fp16, bf16-backbone, int8"),
        (lambda: choose_iteration("bf16", "bf16-backbone"), "bf16 loses three digits"),
        (lambda: choose_iteration("fp16", "fp32"), "only with --precision fp16"),
        (lambda: choose_iteration("fp8", "fp16"), "none of fp32, fp16"),
    ],
)
def test_a_precision_that_does_not_exist_or_does_not_fit_is_refused(
    choose: Callable[[], object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose()


def exported(
    network: Classifier, name: str, folder: Path, preprocess: Preprocess, **options: object
) -> Exported:
    from tests.export.test_pipeline import save

    wish = ExportOptions(batch=SMALL, precision=PrecisionOptions.model_validate(options))
    return export(save(network, name, folder / "ckpt.pt", preprocess), folder / "out", wish)


@pytest.mark.parametrize("precision", ["fp16", "bf16-backbone"])
def test_a_bundle_says_its_precision_and_bounds_its_probes_by_the_noise_of_it(
    make: Make, preprocess: Preprocess, tmp_path: Path, precision: str
) -> None:
    found = exported(make("isqrt-resnet8"), "isqrt-resnet8", tmp_path, preprocess, precision=precision)
    assert found.manifest.precision == found.precision.precision == found.parity.precision == precision
    assert found.parity.floors_allowed == 4
    assert found.parity.logits.noise_floor > 1e-5
    probes = read_probes(found.path / "probes.npz")
    assert probes.tolerance["logits"] == pytest.approx(4 * found.parity.logits.noise_floor)
    assert (found.path / "precision.json").is_file()


def test_maps_beyond_the_range_of_float16_are_refused_with_another_precision(
    make: Make, preprocess: Preprocess, tmp_path: Path
) -> None:
    network = make("resnet8")
    network.get_parameter("bn1.weight").data.mul_(1e6)
    with pytest.raises(ParityError, match=r"in fp16 the network's own logits are not finite.*bf16-backbone"):
        exported(network, "resnet8", tmp_path, preprocess, precision="fp16")


def test_spectra_are_measured_on_every_second_order_part(
    make: Make, preprocess: Preprocess, probes: Tensor
) -> None:
    from sopdeploy_export.capture import Deployed
    from sopdeploy_export.parity.spectral import spectral_records

    (record,) = spectral_records(Deployed(make("isqrt-resnet8"), preprocess).eval(), probes)
    assert (record.part, record.iterations) == ("pooling.root", 5)
    assert record.asymmetry < 1e-5
    assert record.residual == pytest.approx(record.residual_exact, rel=1e-3)
