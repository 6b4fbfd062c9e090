"""An export finds the operators whose indices of equal values PyTorch does not define."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.lower.order import find_order
from tests.export.conftest import Minimal
from tests.export.once import ALONE
from tests.export.user_network.networks import export_small, trained, variant

TABLE = nn.Parameter(torch.arange(768.0).flip(0))
# What a network computes of its pixels (B, 768), and the operator that is found.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "indices of topk": (lambda x: x.topk(5)[1], ["aten.topk.default in forward"]),
    "indices of argsort": (
        lambda x: x.argsort(1)[:, :5],
        ["aten.argsort.default in forward"],
    ),
    "indices of sort": (
        lambda x: x.sort(descending=True)[1],
        ["aten.sort.default in forward"],
    ),
    "values of topk": (lambda x: x.topk(5)[0], []),
    "indices of a stable sort": (lambda x: x.sort(dim=1, stable=True)[1], []),
    "indices of a stable argsort": (lambda x: x.argsort(dim=1, stable=True), []),
    "indices of a stored table": (lambda x: x + TABLE.sort()[1], []),
}


@pytest.mark.parametrize("case", CASES)
def test_only_indices_that_can_differ_are_found(case: str, preprocess: Preprocess) -> None:
    function, expected = CASES[case]
    network = Minimal(lambda images: function(images.flatten(1)).float()).eval()
    assert find_order(capture_any_batch(network, preprocess, ALONE)) == expected


def test_an_export_warns_in_its_result(tmp_path: Path) -> None:
    network = variant(
        lambda self, x: self.fc(self.features(x)) + 1e-9 * x.flatten(1).topk(1)[1].float(),
        aux=False,
    )
    exported = export_small(trained(network), tmp_path)

    assert any("equal values" in warning for warning in exported.warnings)
