"""Operators whose ONNX form differs from ATen for values that no probe reaches are refused or mended."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export import operators
from sopdeploy_export.graph import capture_any_batch, generated_images
from sopdeploy_export.operators import check_operators
from tests.export.once import ALONE
from tests.export.user_network.networks import export_small, trained, variant


class Part(nn.Module):
    """A function as a part of a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, pixels: Tensor) -> Tensor:
        return self.function(pixels)


def check(function: Callable[[Tensor], Tensor], preprocess: Preprocess) -> None:
    network = nn.Sequential(nn.Identity(), Part(function)).eval()
    check_operators(capture_any_batch(network, preprocess, ALONE), generated_images(preprocess.crop)[:1])


SORTED = r"use torch\.sort\(stable=True\)"
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3).mean((2, 3)), r"avg_pool2d.* instead of"),
    "strides": (lambda x: torch.as_strided(x, (1, 3), (768, 256)), r"as_strided.* instead of"),
    "ties of topk": (lambda x: x.flatten(1).topk(5)[1].float(), rf"topk.*{SORTED}"),
    "ties of argsort": (lambda x: x.flatten(1).argsort(1)[:, :5].float(), rf"argsort.*{SORTED}"),
    "overflow": (lambda x: torch.logaddexp(x, 2 * x).mean((2, 3)), r"logaddexp.* inf instead of 100 for 100"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_operator_whose_onnx_form_differs_is_named_with_its_part(
    case: str, preprocess: Preprocess
) -> None:
    function, message = REFUSED[case]
    with pytest.raises(
        LoweringError, match=rf"aten\.{message.split('.*')[0]}\S* in 1: .*{message.split('.*')[1]}"
    ):
        check(function, preprocess)


EQUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "logsigmoid": F.logsigmoid,
    "atan2": lambda x: torch.atan2(x, x + 1),
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "sign": torch.sign,
    "largest": lambda x: x.amax(1),
    "largest values": lambda x: x.flatten(1).topk(5)[0],
    "stable sort": lambda x: x.flatten(1).sort(dim=1, stable=True)[1].float(),
    "stable argsort": lambda x: x.flatten(1).argsort(dim=1, stable=True, descending=True).float(),
    "activations": lambda x: F.elu(x) + F.gelu(x) + F.mish(x) + F.hardswish(x) + F.silu(x) + F.softplus(x),
    "pooling": lambda x: F.max_pool2d(F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), 3, 2, 1),
    "norms": lambda x: F.layer_norm(F.group_norm(F.normalize(x), 3), (16,)),
}


@pytest.mark.parametrize("case", EQUAL)
def test_equal_operators_are_accepted_and_compared_once(
    case: str, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(lambda x: EQUAL[case](x).flatten(1), preprocess)
    monkeypatch.setattr(operators, "_compare", lambda calls: pytest.fail("again") if calls else [])
    check(lambda x: EQUAL[case](x).flatten(1), preprocess)


def test_an_export_compares_the_operators(tmp_path: Path) -> None:
    network = variant(
        lambda self, x: self.fc(self.features(F.avg_pool2d(x, 2, divisor_override=3))), aux=False
    )
    with pytest.raises(LoweringError, match=r"aten\.avg_pool2d\.default: .* instead of"):
        export_small(trained(network), tmp_path / "out")
    assert not (tmp_path / "out").exists()
