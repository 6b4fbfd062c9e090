"""A wrong gathered form of a mixture is in all graphs of the proof; the comparison of the file refuses it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sopdeploy.errors import ParityError
from sopdeploy.layers.mixture.components import Components
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export_checkpoint
from tests.export.conftest import GMSOP, PREPROCESS, save, trained
from tests.export.once import proving_once

Form = Callable[[Any, Tensor, Tensor], Tensor]
NAME = "gmsop-16-8-resnet18"
honest: Form = Components.gathered_sum


def other_components(self: Any, features: Tensor, weights: Tensor) -> Tensor:
    """Run the components after the chosen ones."""
    return honest(self, features, weights.roll(1, dims=1))


def one_component_less(self: Any, features: Tensor, weights: Tensor) -> Tensor:
    """Leave out the chosen component with the smallest weight."""
    smallest = weights.topk(self.counted, dim=1).values[:, -1:]
    return honest(self, features, weights * (weights > smallest))


def stale_weights(self: Any, features: Tensor, weights: Tensor) -> Tensor:
    """Run the components with weights that were changed by 1 % afterwards."""
    return honest(
        SimpleNamespace(**{**vars(self), **self._modules, "weights": [0.99 * w for w in self.weights]}),
        features,
        weights,
    )


def another_order(self: Any, features: Tensor, weights: Tensor) -> Tensor:
    """Multiply the chosen components by each other's weights."""
    ordered, index = (part[:, : self.counted] for part in weights.sort(dim=1, descending=True, stable=True))
    return honest(self, features, torch.zeros_like(weights).scatter(1, index, ordered.flip(1)))


@pytest.mark.parametrize("form", [other_components, one_component_less, stale_weights, another_order])
def test_another_form_than_the_dense_one_is_refused(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = trained(NAME, **GMSOP)
    torch.nn.init.normal_(network.get_parameter("gate.weight"), std=0.1)
    monkeypatch.setattr(Components, "gathered_sum", form)
    checkpoint = save(network, NAME, tmp_path / "ckpt.pt", PREPROCESS)
    with proving_once(alone=True), pytest.raises(ParityError, match=r"the exported file (drifts|changes)"):
        export_checkpoint(checkpoint, tmp_path / "out", options=ExportOptions(detach=True, max_batch=1))
    assert not (tmp_path / "out").exists()
