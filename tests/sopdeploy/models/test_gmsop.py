from typing import Any

import pytest
import torch
from torch import Tensor

from sopdeploy.errors import ConfigError
from sopdeploy.models.gmsop import GMSOPResNet
from sopdeploy.models.registry import create_model, make_config

TINY: dict[str, Any] = {
    "blocks_per_stage": 1,
    "components": 4,
    "chosen": 2,
    "component_widths": (12, 8),
    "gate_widths": (8, 6),
    "num_classes": 5,
}
GATED = ["gmsop-16-8-resnet18", "gmgap-16-8-resnet18", "sgmoe-16-8-resnet18"]


def tiny(name: str = GATED[0], **switches: Any) -> GMSOPResNet:
    torch.manual_seed(0)
    if name.startswith("sgmoe"):
        switches = {"gate_widths": (), **switches}
    network = create_model(name, **{**TINY, **switches})
    assert isinstance(network, GMSOPResNet)
    return network


def images(count: int = 4, side: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, side, side)


def untied(network: GMSOPResNet) -> GMSOPResNet:
    torch.nn.init.normal_(network.gate.weight)
    for bias in network.mixture.biases:
        torch.nn.init.normal_(bias)
    return network


@pytest.mark.parametrize("name", GATED)
def test_eval_mode_returns_logits_and_outputs_tuple_the_gates(name: str) -> None:
    network = untied(tiny(name)).eval()
    logits, gates = network.outputs_tuple(images())
    assert torch.equal(network(images()), logits)
    assert gates.shape == (4, 4)
    assert (gates > 0).sum(dim=1).tolist() == [2] * 4
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(4))


def test_the_untrained_gate_selects_the_first_components() -> None:
    _, gates = tiny().eval().outputs_tuple(images())
    assert gates.tolist() == [[0.5, 0.5, 0.0, 0.0]] * 4


def test_chosen_of_one_can_be_exported_but_not_trained() -> None:
    network = tiny(chosen=1)
    with pytest.raises(ConfigError, match="chosen: must be at least 2 to train"):
        network(images())
    assert network.eval()(images()).shape == (4, 5)


def test_components_without_activation_are_linear_as_in_eq_6() -> None:
    """The second-order vector of Q X and of the features P2 P1 X is the same, and scales with X."""
    network = untied(tiny(component_activation="none", dropout=0.0)).double().eval()
    first, second = (weight[0] for weight in network.mixture.weights)
    x = torch.randn(2, 128, 3, 3, dtype=torch.float64)
    projected = torch.einsum("oc,bchw->bohw", second @ first, x)
    torch.testing.assert_close(network.mixture(x)[:, 0], network.mixture.after(projected))
    rectified = untied(tiny(dropout=0.0)).double().eval()
    assert not torch.allclose(rectified.mixture(x), network.mixture(x))


def test_the_gate_has_the_architecture_of_a_component_or_that_of_the_released_code() -> None:
    """Section 2.3; the code has batch norm and other widths."""
    paper = tiny("gmgap-16-8-resnet18", gate_widths=None).gate
    assert [type(layer) for layer in paper.feature[0]] == [torch.nn.Conv2d, torch.nn.ReLU]
    assert (paper.feature[0][0].weight.shape[0], paper.weight.shape[1]) == (12, 8)
    linear = tiny(gate_widths=None, component_activation="none").gate
    assert [type(layer) for layer in linear.feature[1]] == [torch.nn.Conv2d]
    released = tiny("gmgap-16-8-resnet18", gate_norm=True).gate
    expected = [torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU]
    assert [type(layer) for layer in released.feature[1]] == expected


def test_batch_norms_and_biases_of_components_are_those_of_single_layers() -> None:
    switches = {"component_norm": True, "component_bias": True, "evaluation": "dense", "dropout": 0.0}
    network = untied(tiny(**switches)).double()
    network(images().double())  # moves the running statistics
    mixture, x = network.eval().mixture, torch.randn(2, 128, 3, 3, dtype=torch.float64)
    expected = x
    for step, weight in enumerate(mixture.weights):
        norm, rows = mixture.norms[step], slice(2 * weight.shape[1], 3 * weight.shape[1])  # component 2
        y = torch.nn.functional.conv2d(expected, weight[2, :, :, None, None], mixture.biases[step][rows])
        statistics = (norm.running_mean[rows], norm.running_var[rows])
        expected = torch.nn.functional.batch_norm(y, *statistics, norm.weight[rows], norm.bias[rows]).relu()
    torch.testing.assert_close(mixture(x)[:, 2], mixture.after(expected))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"components": 4, "chosen": 5}, r"chosen \(5\) is more than components \(4\)"),
        ({"component_norm": True}, "component_norm: needs evaluation=dense"),
    ],
)
def test_invalid_values_are_rejected_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("gmsop-16-8-resnet18", values)
