from typing import Any

import pytest
import torch
from torch import Tensor

from sopdeploy.errors import ConfigError, TrainingError
from sopdeploy.models.base import TrainingOutput
from sopdeploy.models.gmsop import GMSOP, GatedResNet
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


def tiny(name: str = GATED[0], **switches: Any) -> GMSOP:
    torch.manual_seed(0)
    if name.startswith("sgmoe"):
        switches = {"gate_widths": (), **switches}
    network = create_model(name, **{**TINY, **switches})
    assert isinstance(network, GMSOP)
    return network


def images(count: int = 4, side: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, side, side)


def untied(network: GMSOP) -> GMSOP:
    torch.nn.init.normal_(network.gate.weight)
    return network


@pytest.mark.parametrize("name", GATED)
def test_training_gives_logits_and_the_balance_penalty(name: str) -> None:
    output = tiny(name)(images())
    assert isinstance(output, TrainingOutput)
    assert output.logits.shape == (4, 5)
    assert output.branches == {}
    assert list(output.penalties) == ["balance"]
    assert output.penalties["balance"].shape == ()


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


def test_eval_mode_does_not_use_the_noise() -> None:
    network = untied(tiny()).eval()
    expected = network(images())
    del network.gate.noise
    assert torch.equal(network(images()), expected)


@pytest.mark.parametrize("name", GATED)
def test_the_inference_model_equals_the_network_without_training_only_parts(name: str) -> None:
    network = untied(tiny(name)).eval()
    plain = network.inference_model().eval()
    assert type(plain) is GatedResNet
    kept = {key: value for key, value in network.state_dict().items() if not key.startswith("gate.noise.")}
    assert list(plain.state_dict()) == list(kept)
    assert set(network.state_dict()) - set(kept) == {"gate.noise.weight"}
    plain.load_state_dict(kept)
    assert torch.equal(plain(images()), network(images()))


def test_the_inference_model_shares_no_object() -> None:
    network = tiny()
    assert not {id(part) for part in network.modules()} & {
        id(part) for part in network.inference_model().modules()
    }


@pytest.mark.parametrize("noise_per", ["image", "component"])
@pytest.mark.parametrize("name", GATED)
def test_routed_and_dense_training_give_the_same_numbers(name: str, noise_per: str) -> None:
    found = {}
    for evaluation in ("routed", "dense"):
        network = untied(tiny(name, evaluation=evaluation, noise_per=noise_per, dropout=0.0)).double()
        torch.manual_seed(3)
        output = network(images().double())
        (output.logits.logsumexp(1).sum() + output.penalties["balance"]).backward()
        found[evaluation] = [
            output.logits,
            output.penalties["balance"],
            *(p.grad for p in network.parameters()),
        ]
    torch.testing.assert_close(found["routed"], found["dense"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("evaluation", ["routed", "dense"])
@pytest.mark.parametrize("name", GATED)
def test_a_training_step_reaches_every_parameter_and_lowers_the_loss(name: str, evaluation: str) -> None:
    network = untied(tiny(name, evaluation=evaluation, dropout=0.0, noise_per="component"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    targets = torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(8):
        output = network(images())
        loss = torch.nn.functional.cross_entropy(output.logits, targets) + output.penalties["balance"] * 0.01
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_one_step_breaks_the_initial_tie() -> None:
    network = tiny(dropout=0.0)
    output = network(images())
    torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2, 3])).backward()
    assert network.gate.weight.grad is not None
    moved = network.gate.weight.grad.abs().sum(dim=1)
    assert moved[0] > 0
    assert moved[1] > 0
    assert moved[2:].max() == 0


def test_chosen_of_one_can_be_exported_but_not_trained() -> None:
    network = tiny(chosen=1)
    with pytest.raises(ConfigError, match="chosen: must be at least 2 to train"):
        network(images())
    assert network.eval()(images()).shape == (4, 5)


def test_choosing_all_is_the_plain_softmax() -> None:
    network = untied(tiny(chosen=4)).eval()
    _, gates = network.outputs_tuple(images())
    logits = network.gate.logits(network.gate.feature(network.features(images())[0]))
    torch.testing.assert_close(gates, logits.softmax(dim=1))


def test_a_training_batch_of_one_image_is_an_error() -> None:
    with pytest.raises(TrainingError, match="last, incomplete batch"):
        tiny()(images(1))


def test_an_image_has_the_same_output_alone_and_in_a_batch() -> None:
    network = untied(tiny()).double().eval()
    together = network(images().double())
    alone = torch.cat([network(image[None].double()) for image in images()])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_a_black_image_has_finite_logits() -> None:
    assert tiny().eval()(torch.zeros(1, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"components": 4, "chosen": 5}, r"chosen \(5\) is more than components \(4\)"),
        ({"components": 1, "chosen": 1}, "components: "),
        ({"component_widths": ()}, "component_widths: "),
        ({"iterations": 16}, "iterations: "),
        ({"alpha": 1}, "alpha: unknown key"),
    ],
)
def test_invalid_values_are_rejected_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("gmsop-16-8-resnet18", values)


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("resnet18-64px", {}),
        ("resnet18-512d", {"component_widths": (12,)}),
        ("srsop-resnet18", {}),
        ("parametric-srsop-resnet18", {"component_widths": (12, 8)}),
        ("avegap-16-resnet18", {"component_widths": (12,), "components": 3}),
        ("avesop-16-resnet18", {"component_widths": (12, 8), "components": 3}),
        ("netvlad-64-resnet18", {"words": 4}),
    ],
)
def test_baselines_have_no_training_only_parts(name: str, switches: dict[str, Any]) -> None:
    network = create_model(name, num_classes=5, blocks_per_stage=1, **switches)
    network(images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    plain = network.inference_model().eval()
    plain.load_state_dict(network.state_dict())
    assert network.training_only == ()
    assert torch.equal(plain(images()), network.eval()(images()))


def test_averaging_components_without_weights_is_rejected() -> None:
    with pytest.raises(ConfigError, match="all components are equal"):
        create_model("srsop-resnet18", components=4)
