"""Correct roots are within their limits; injected errors are detected and stop the export."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sopdeploy.errors import ParityError
from sopdeploy.layers import isqrt_cov as layer
from sopdeploy.layers import newton_schulz
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.graph import Deployed
from sopdeploy_export.parity.report import SpectralRecord
from sopdeploy_export.parity.spectral import measure_root, spectral_records, violation
from tests.sweep.smallest import NARROW
from tests.sweep.steps import Small, agreed

ISQRT = Small("isqrt-resnet8", 16, {"pooling": {"kind": "isqrt", **NARROW}})


def maps(*shape: int, offset: float = 0.0) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape).relu() + offset


def root(iterations: int = 5, stored: str = "float32", **config: object) -> ISqrtCov:
    part = ISqrtCov(24, NewtonSchulzConfig(iterations=iterations, **config))
    part.config = part.config.model_copy(update={"stored": stored})
    return part


CORRECT = {
    "shifted maps": (root(), maps(3, 24, 6, 6, offset=30.0)),
    "many steps on a singular covariance": (root(15), maps(3, 24, 3, 3)),
    "Frobenius norm, not compensated": (
        root(prenorm="frobenius", compensate=False),
        maps(3, 24, 6, 6),
    ),
    "float16 between products": (root(stored="float16"), maps(3, 24, 6, 6)),
    "float16 maps": (root(), maps(3, 24, 6, 6).half()),
    "constant maps": (root(), torch.full((2, 24, 4, 4), 0.3)),
}


@pytest.mark.parametrize("case", CORRECT)
def test_every_correct_root_is_within_its_limit(case: str) -> None:
    part, given = CORRECT[case]
    found = measure_root("here", part.eval(), (given,))
    assert violation((found,)) is None, found
    assert found.allowed < 0.1


def rounded_operands(correct: Callable, left: Tensor, right: Tensor) -> Tensor:
    """Round float32 operands to the ten bits of TF32; float64 stays exact, so equivalence checks pass."""
    if left.dtype == torch.float32:
        left, right = left.half().float(), right.half().float()
    return correct(left, right)


def one_step_less(correct: Callable, features: Tensor, config: NewtonSchulzConfig) -> Tensor:
    """Stop one step early, in float32 only."""
    fewer = config.iterations - (features.dtype != torch.float64)
    return correct(features, config.model_copy(update={"iterations": fewer}))


ERRORS = {
    "one step too few": (layer, "covariance_root", one_step_less),
    "TF32 in the products": (newton_schulz, "_product", rounded_operands),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_wrong_root_is_detected_and_named(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = ERRORS[error]
    monkeypatch.setattr(owner, name, partial(wrong, getattr(owner, name)))
    found = measure_root("pooling.root", root(), (maps(3, 24, 6, 6),))
    assert str(violation((found,))).startswith("pooling.root: the root differs from that of 5 steps: by ")


@pytest.mark.slow
def test_noise_that_also_raises_the_noise_floor_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ISQRT.trained(tmp_path / "ckpt.pt")
    wrong = partial(rounded_operands, newton_schulz._product)
    monkeypatch.setattr(newton_schulz, "_product", wrong)
    with pytest.raises(ParityError, match=r"second-order module: pooling\.root: .* limit .*; nothing was"):
        agreed(checkpoint, tmp_path / "model.onnx", "fp16")


def test_every_second_order_module_is_measured(probes: Tensor, preprocess: object) -> None:
    from tests.export.conftest import trained

    records = spectral_records(Deployed(trained("isqrt-resnet8"), preprocess).eval(), probes)
    (found,) = records
    assert (found.part, found.iterations) == ("pooling.root", 5)
    assert violation(records) is None


def test_the_first_violation_is_named() -> None:
    correct = SpectralRecord(part="one", iterations=3, stored="float32", distance=1e-7, allowed=1e-5)
    broken = correct.model_copy(update={"part": "two", "distance": float("nan")})
    assert violation((correct, broken)) == "two: the root differs from that of 3 steps: by nan, limit 1e-05"
