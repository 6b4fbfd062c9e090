"""The networks of the catalog as networks of timm, in its training script and in loops of others."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.loss
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import sopdeploy
import sopdeploy.timm
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import TrainingOutput
from sopdeploy.models.joined_heads import JoinedHeads
from sopdeploy_commands.app import app
from sopdeploy_export.user_network.builder import network_builder
from tests.export.once import proving_once

SMALL = "dsop_resnet8"
FAMILIES = [  # with a layer of the last stage
    (SMALL, "layer3"),
    ("gsop_net1_preact_resnet164", "layer3"),
    ("gsop_net2_preact_resnet164", "layer3"),
    ("gmsop_4_2_efficientnet_lite0", "blocks.6"),
    ("isqrt_efficientnet_b0", "blocks.6"),
    ("mpncov_resnet50", "layer4"),
]


@pytest.mark.parametrize(("name", "last_stage"), FAMILIES)
def test_a_network_of_each_family_has_the_methods_of_timm(name: str, last_stage: str) -> None:
    network: Any = timm.create_model(name, num_classes=3).eval()
    ours = sopdeploy.create_model(name.replace("_", "-"), 3).eval()
    ours.load_state_dict(network.state_dict())
    images = torch.randn(2, *network.pretrained_cfg["input_size"])

    with torch.no_grad():
        features = network.forward_features(images)
        logits = network.forward_head(features)
        vectors = network.forward_head(features, pre_logits=True)
        assert torch.equal(logits, ours(images))
        assert vectors.shape == (2, network.num_features)
        assert torch.allclose(network.get_classifier()(vectors), logits, atol=1e-5)

        network.reset_classifier(0)
        assert torch.equal(network(images), vectors)
        network.reset_classifier(5)
        assert network(images).shape == (2, 5)

    groups = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    order = [groups[key] for key in groups if key.startswith(last_stage)]
    assert min(order) >= max(
        groups[key] for key in groups if key.startswith(("conv1", "conv_stem"))
    )
    create_optimizer_v2(network, opt="sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.7)


@pytest.mark.parametrize("name", [SMALL, "gmsop_4_2_efficientnet_lite0"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for is_enabled in (False, True):
        torch.manual_seed(0)
        network: Any = timm.create_model(name, num_classes=3)
        network.set_grad_checkpointing(is_enabled)
        images = torch.randn(2, *network.pretrained_cfg["input_size"])
        cross_entropy(network(images), torch.tensor([0, 1])).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, computed_again in zip(*gradients, strict=True):
        assert torch.allclose(plain, computed_again, rtol=1e-4, atol=1e-6)


def soft(targets: Tensor) -> Tensor:
    """Give the target 0.8 and the other of three classes 0.1."""
    return nn.functional.one_hot(targets, 3) * 0.7 + 0.1


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": cross_entropy,
    "label smoothing": timm.loss.LabelSmoothingCrossEntropy(0.1),
    "soft targets": lambda logits, targets: timm.loss.SoftTargetCrossEntropy()(
        logits, soft(targets)
    ),
    "binary": timm.loss.BinaryCrossEntropy(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_of_the_joined_heads_is_the_weighted_sum(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    main, branch = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    targets = torch.tensor([0, 1, 2, 0])
    penalty = torch.tensor(2.0, requires_grad=True)
    joined = JoinedHeads.of({"main": main, "x": branch}, {"main": 1.0, "x": 0.3}, [penalty])

    total = loss(joined, targets)
    expected = loss(main, targets) + 0.3 * loss(branch, targets) + penalty
    assert type(total) is Tensor
    assert math.isclose(float(total.detach()), float(expected.detach()), rel_tol=1e-6)
    found = torch.autograd.grad(total, [main, branch, penalty])
    wanted = torch.autograd.grad(expected, [main, branch, penalty])
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


def test_answers_of_joined_heads_are_those_of_the_main_head() -> None:
    main, branch = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    joined = JoinedHeads.of({"main": main, "x": branch}, {"main": 1.0, "x": 1.0}, [])
    assert torch.equal(joined.argmax(dim=1), main.argmax(dim=1))
    assert torch.equal(joined.detach(), main.detach())
    assert (joined.shape, len(joined)) == ((4, 3), 4)


def test_only_networks_of_timm_join_their_heads() -> None:
    images = torch.randn(2, 3, 32, 32)
    network = timm.create_model(SMALL, num_classes=3)
    assert type(network(images)) is JoinedHeads
    assert type(network.eval()(images)) is Tensor
    assert isinstance(sopdeploy.create_model("dsop-resnet8", 3)(images), TrainingOutput)


@pytest.mark.parametrize(
    "options",
    [{"in_chans": 1}, {"drop_rate": 0.5}, {"acme": 1}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_a_network_lacks_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        timm.create_model(SMALL, **options)


def test_a_name_of_timm_is_not_replaced() -> None:
    assert timm.create_model("resnet18").__class__.__module__ == "timm.models.resnet"


@pytest.mark.parametrize("prefix", ["", "network."], ids=["script of timm", "Lightning"])
def test_export_takes_checkpoints_of_other_loops(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = timm.create_model(SMALL, num_classes=3)
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 1, "arch": SMALL, "state_dict": state}, tmp_path / "last.pth.tar")
    (tmp_path / "names.txt").write_text("a\nb\nc\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = ["--network", f"timm:{SMALL}", "--option", "num_classes=3", "--labels", "names.txt"]
    with proving_once():
        command = ["export", "last.pth.tar", *words, "--detach", "--max-batch", "1"]
        result = CliRunner().invoke(app, command)

    assert result.exit_code == 0
    assert "branches removed" in result.stdout


def test_export_registers_the_names() -> None:
    network = network_builder("network", f"timm:{SMALL}", ["num_classes=3"])()
    assert network.get_parameter("fc.weight").shape == (3, 64)
