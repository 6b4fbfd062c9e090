"""An export warns of operators that no test compares with PyTorch, and of indices of equal values."""

import re
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sopdeploy.errors import ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.lower.compared import part_of
from sopdeploy_export.lower.to_onnx import lower
from tests.export.once import ALONE
from tests.export.user_network.networks import export_small, trained, variant
from tests.operators.compare import Minimal

SORTED = r".*which of equal values comes first.*use torch\.sort\(stable=True\)$"
NOT_COMPARED = r"^no test compares the ONNX forms of aten\.{}\.default in forward with PyTorch"
WARNED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "indices of topk": (lambda x: x.topk(5)[1], rf"^aten\.topk\.default in forward{SORTED}"),
    "indices of argsort": (
        lambda x: x.argsort(1)[:, :5],
        rf"^aten\.argsort\.default in forward{SORTED}",
    ),
    "indices of sort": (
        lambda x: x.sort(descending=True)[1],
        rf"^aten\.sort\.default in forward{SORTED}",
    ),
    "an operator that overflows": (
        lambda x: torch.logaddexp(x, 2 * x),
        NOT_COMPARED.format("logaddexp"),
    ),
    "arguments that no form has": (
        lambda x: F.avg_pool2d(x[:, None], (1, 2), divisor_override=2).flatten(1),
        NOT_COMPARED.format("avg_pool2d"),
    ),
}


def multiply_rows(x: Tensor) -> Tensor:
    return torch.einsum("zyx, zwx -> zyw", x, x).flatten(1)


TABLE = nn.Parameter(torch.arange(768.0).flip(0))
QUIET: dict[str, Callable[[Tensor], Tensor]] = {
    "values of topk": lambda x: x.topk(5)[0],
    "indices of a stable sort": lambda x: x.sort(dim=1, stable=True)[1],
    "indices of a stable argsort": lambda x: x.argsort(dim=1, stable=True),
    "indices of a stored table": lambda x: x + TABLE.sort()[1],
    "an equation with other letters": lambda x: multiply_rows(x.reshape(-1, 3, 256)),
    "activations": lambda x: F.gelu(x) + F.silu(x),
    "normalized rows": lambda x: F.normalize(x),
}


def warn_of(function: Callable[[Tensor], Tensor], preprocess: Preprocess) -> list[str]:
    network = Minimal(lambda x: function(x.flatten(1)).float()).eval()
    found: list[str] = []
    lower(capture_any_batch(network, preprocess, ALONE), ("logits",), found)
    return found


@pytest.mark.parametrize("case", WARNED)
def test_a_form_that_can_differ_is_named_in_one_warning(
    case: str, preprocess: Preprocess
) -> None:
    function, message = WARNED[case]
    (warning,) = warn_of(function, preprocess)
    assert re.search(message, warning), warning


@pytest.mark.parametrize("case", QUIET)
def test_a_form_that_tests_compare_causes_no_warning(case: str, preprocess: Preprocess) -> None:
    assert warn_of(QUIET[case], preprocess) == []


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
    with pytest.raises(ParityError, match=r"differs by .* in logits from float64"):
        export_small(trained(network), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_warns_in_its_result(tmp_path: Path) -> None:
    network = variant(
        lambda self, x: self.fc(self.features(x)) + 1e-9 * x.flatten(1).topk(1)[1].float(),
        aux=False,
    )
    exported = export_small(trained(network), tmp_path)
    assert any("which of equal values comes first" in warning for warning in exported.warnings)
