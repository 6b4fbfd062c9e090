"""Attacks on the certificate of a network of the catalog, and on its conversion.

Planted networks have a table of their own (`test_planted_networks.py`).
"""

import types
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.base.config import StrictModel
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import CertificateError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.mixture import Components
from sopdeploy.models.backbones.base import Backbone
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import create_model
from sopdeploy_export.capture.deployed import export_images
from sopdeploy_export.prove.graphs import prove_graph
from sopdeploy_export.prove.networks import Compared, build_plain
from sopdeploy_export.prove.plain_run import measure_plain_run
from sopdeploy_export.prove.removed import prove_removed
from sopdeploy_export.runs import run_as_users_do
from sopdeploy_export.subject import Detachment
from tests.export.conftest import GMSOP, save, trained
from tests.support import quick_torch
from tests.sweep.steps import agreed

SIDE = 16
PREPROCESS = Preprocess(resize=SIDE, crop=SIDE)
# The graph does not depend on the batch, so one is enough
ALONE = BatchRange(optimum=1, maximum=1)


class Plain(Backbone):
    """Two convolutions and a linear layer, with the names of a ResNet's parts."""

    def __init__(self, config: StrictModel, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, num_classes)

    def feature_maps(
        self, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        features = self.layer1(self.bn1(self.conv1(images)))
        return features, [features]

    def classify(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


class Branched(Classifier, Plain):
    """`Plain` with a training-only head on the features."""

    training_only = ("branches",)
    inference_class = Plain

    def __init__(self, config: StrictModel, num_classes: int) -> None:
        super().__init__(config, num_classes)
        head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, num_classes, 3))
        self.branches = nn.ModuleDict({"layer1_0": head})


def network() -> Classifier:
    torch.manual_seed(7)
    found = Branched(StrictModel(), num_classes=10)
    nn.init.normal_(found.bn1.bias, std=0.2)
    nn.init.normal_(found.bn1.get_buffer("running_mean"), std=0.2)
    return found.eval()


def prove(network: nn.Module, detachment: Detachment | None = None) -> Compared:
    """Check the statements about networks."""
    detachment = detachment or Detachment.of(network)
    parts = detachment.training_only
    with quick_torch.one_thread():
        trained = Compared.of("trained", network, PREPROCESS, ALONE)
        prove_removed(trained, parts)
        prove_graph(trained, build_plain(detachment, trained, PREPROCESS, ALONE))
        plain = run_as_users_do(trained.deployed, export_images(PREPROCESS), ALONE.maximum)
        measure_plain_run(trained, plain, ALONE.maximum, parts)
    return trained


def plain_logits(found: Any, images: Tensor) -> Tensor:
    return found.classify(found.feature_maps(images)[0])


def with_forward(found: Classifier, answer: Callable[[Any, Tensor], Tensor]) -> Classifier:
    """Let *found* compute *answer*."""
    found.forward = types.MethodType(answer, found)
    return found


def test_dsop_network_whose_output_depends_on_a_branch_is_rejected() -> None:
    def answer(found: Any, images: Tensor) -> Tensor:
        *_, feature = found.feature_maps(images, found.taps)[1]
        logits: Tensor = found.branches[list(found.taps.values())[-1]](feature)
        return plain_logits(found, images) + 0 * logits

    dsop = create_model(
        "dsop-resnet8", num_classes=10, aux_widths=(8, 8, 8), iterations=2
    ).eval()
    with pytest.raises(CertificateError, match=r"branches\.layer\d_0\."):
        prove(with_forward(dsop, answer))


Form = Callable[[Any, Tensor, Tensor], Tensor]
NAME = "gmsop-16-8-resnet18"
honest: Form = Components.gathered_sum


def stored_otherwise(found: Any) -> None:
    """Transpose weights, expand a buffer, and store a kept and a removed weight side by side."""
    found.to(memory_format=torch.channels_last)
    found.fc.weight = nn.Parameter(found.fc.weight.detach().t().contiguous().t())
    found.bn1.running_mean = found.bn1.running_mean.new_zeros(1).expand(
        len(found.bn1.running_mean)
    )
    kept, removed = found.conv1.weight, next(found.branches.parameters())
    both = torch.cat([kept.detach().flatten(), removed.detach().flatten()])
    kept.data, removed.data = (
        both[: kept.numel()].view_as(kept),
        both[kept.numel() :].view_as(removed),
    )


def test_memory_layout_does_not_change_the_root() -> None:
    certified = []
    for change in (lambda _: None, stored_otherwise):
        trained = network()
        trained.get_buffer("bn1.running_mean").zero_()
        change(trained)
        certified.append(prove(trained))

    assert certified[0].root.sha256 == certified[1].root.sha256
    assert certified[0].hashes["conv1.weight"] == certified[1].hashes["conv1.weight"]


def other_components(self: Any, features: Tensor, weights: Tensor) -> Tensor:
    """Run the components after the chosen ones."""
    return honest(self, features, weights.roll(1, dims=1))


def one_component_less(self: Any, features: Tensor, weights: Tensor) -> Tensor:
    """Leave out the chosen component with the smallest weight."""
    smallest = weights.topk(self.evaluated, dim=1).values[:, -1:]
    return honest(self, features, weights * (weights > smallest))


def stale_weights(self: Any, features: Tensor, weights: Tensor) -> Tensor:
    """Run the components with weights that were changed by 1 % afterwards."""
    return honest(
        SimpleNamespace(
            **{**vars(self), **self._modules, "weights": [0.99 * w for w in self.weights]}
        ),
        features,
        weights,
    )


def another_order(self: Any, features: Tensor, weights: Tensor) -> Tensor:
    """Multiply the chosen components by each other's weights."""
    ordered, index = (
        part[:, : self.evaluated] for part in weights.sort(dim=1, descending=True, stable=True)
    )
    return honest(self, features, torch.zeros_like(weights).scatter(1, index, ordered.flip(1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", [other_components, one_component_less, stale_weights, another_order]
)
def test_another_form_than_the_dense_one_is_refused(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = trained(NAME, **GMSOP)
    monkeypatch.setattr(Components, "gathered_sum", form)
    checkpoint = save(network, NAME, tmp_path / "ckpt.pt", PREPROCESS)

    with pytest.raises(ParityError, match=r"file (differs|changes)"):
        # The proof of the network sees no form
        agreed(checkpoint, tmp_path / "model.onnx", batch=ALONE)
