"""Correct roots satisfy the invariants; injected errors are detected and stop the export."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.errors import ParityError
from sopdeploy.layers import newton_schulz
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture.components import Convolutions, make_components
from sopdeploy.layers.mixture.gate import keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.graph import Deployed
from sopdeploy_export.parity.compare import measure_root, spectral_records, violation
from sopdeploy_export.parity.report import SpectralRecord
from sopdeploy_export.rewrites import newton_schulz as iteration
from sopdeploy_export.rewrites.linear import CompensatedAfter, RootThenLinear
from sopdeploy_export.rewrites.mixture import forms
from sopdeploy_export.rewrites.newton_schulz import LoweredRoot
from sopdeploy_export.rewrites.reference_formulas import ReferenceRoot
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


def with_classifier(part: ISqrtCov) -> nn.Module:
    return CompensatedAfter(RootThenLinear(LoweredRoot(part), nn.Linear(part.out_features, 3)))


CORRECT = {
    "shifted maps": (root(), maps(3, 24, 6, 6, offset=30.0)),
    "fewer positions than channels": (root(), maps(3, 24, 3, 3)),
    "many steps on a singular covariance": (root(15), maps(3, 24, 3, 3)),
    "one step": (root(1), maps(3, 24, 6, 6)),
    "Frobenius norm, not compensated": (
        root(prenorm="frobenius", compensate=False),
        maps(3, 24, 6, 6),
    ),
    "float16 between products": (root(stored="float16"), maps(3, 24, 6, 6)),
    "float16 maps": (root(), maps(3, 24, 6, 6).half()),
    "constant maps": (root(), torch.full((2, 24, 4, 4), 0.3)),
}


FORMS = (lambda part: part, LoweredRoot, with_classifier, ReferenceRoot)
PAIRS = [
    (case, form) for case in CORRECT for form in FORMS if (case, form) != ("shifted maps", ReferenceRoot)
]


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_every_correct_form_satisfies_the_invariants(case: str, form: Callable) -> None:
    part, given = CORRECT[case]
    found = measure_root("here", form(part).eval(), (given,))
    assert violation((found,)) is None, found
    assert found.allowed < 0.1


@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize("form", list(forms(2)))
def test_the_root_of_every_expert_is_measured(form: str, stored: str) -> None:
    torch.manual_seed(0)
    bank, _ = make_components(
        "sop", 10, Convolutions((9, 7)), components=6, counted=2, root=NewtonSchulzConfig(iterations=3)
    )
    bank.after.config = bank.after.config.model_copy(update={"stored": stored})
    weights = keep_largest(torch.randn(3, 6), 2)
    found = measure_root("mixture", forms(2)[form](bank).eval(), (maps(3, 10, 4, 4), weights))
    assert violation((found,)) is None, found
    assert (found.width, found.iterations) == (7, 3)


def rounded_operands(correct: Callable, left: Tensor, right: Tensor) -> Tensor:
    """Round float32 operands to the ten bits of TF32; float64 stays exact, so equivalence checks pass."""
    if left.dtype == torch.float32:
        left, right = left.half().float(), right.half().float()
    return correct(left, right)


def rounded_to_bfloat16(correct: Callable, left: Tensor, right: Tensor) -> Tensor:
    wide = [value if value.dtype == torch.float64 else value.bfloat16().float() for value in (left, right)]
    return correct(*wide)


def asymmetric(correct: Callable, self: LoweredRoot, given: Tensor) -> Tensor:
    """Change the upper triangle of the float32 root."""
    found = correct(self, given)
    return found if given.dtype == torch.float64 else found - 1e-3 * found.triu(1)


def one_step_less(correct: Callable, self: LoweredRoot, given: Tensor) -> Tensor:
    """Stop one step early, in float32 only."""
    if given.dtype == torch.float64:
        return correct(self, given)
    config = self.config
    self.config = config.model_copy(update={"iterations": config.iterations - 1})
    try:
        return correct(self, given)
    finally:
        self.config = config


ERRORS = {
    "a root that is not symmetric": (LoweredRoot, "matrix", asymmetric, root(), "root is not symmetric"),
    "one step too few": (LoweredRoot, "matrix", one_step_less, root(), "the residual of 5 steps differs"),
    "TF32 in the products": (
        iteration,
        "product",
        rounded_operands,
        root(),
        "not symmetric|another residual|of 5 steps",
    ),
    "bfloat16 instead of float16": (
        iteration,
        "product",
        rounded_to_bfloat16,
        root(stored="float16"),
        "not symmetric|another residual|of 5 steps",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_violated_invariant_is_detected_and_named(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, part, message = ERRORS[error]
    correct = getattr(owner, name)
    replaced = partial(wrong, correct) if owner is iteration else lambda *args: wrong(correct, *args)
    monkeypatch.setattr(owner, name, replaced)
    found = measure_root("pooling.root", LoweredRoot(part), (maps(3, 24, 6, 6),))
    named = violation((found,))
    assert named is not None, found
    assert re.match(rf"pooling\.root: .*({message})", named)


def test_the_error_of_the_papers_centering_matrix_on_shifted_maps_is_detected() -> None:
    part, given = CORRECT["shifted maps"]
    found = measure_root("pooling.root", ReferenceRoot(part), (given,))
    assert violation((found,)) is not None, found


def test_noise_in_the_library_itself_does_not_raise_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for owner, name in ((iteration, "product"), (newton_schulz, "_product")):
        monkeypatch.setattr(owner, name, partial(rounded_operands, getattr(owner, name)))
    found = measure_root("pooling.root", LoweredRoot(root()), (maps(3, 24, 6, 6),))
    assert violation((found,)) is not None, found


@pytest.mark.slow
def test_noise_that_also_raises_the_noise_floor_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ISQRT.trained(tmp_path / "ckpt.pt")
    monkeypatch.setattr(iteration, "product", partial(rounded_operands, iteration.product))
    with pytest.raises(ParityError, match=r"second-order module: fc\.root: .* limit .*; nothing was"):
        agreed(checkpoint, tmp_path / "model.onnx", "fp16")


def test_every_second_order_module_is_measured(probes: Tensor, preprocess: object) -> None:
    from tests.export.conftest import trained

    records = spectral_records(Deployed(trained("isqrt-resnet8"), preprocess).eval(), probes)
    (found,) = records
    assert (found.part, found.iterations, found.width) == ("pooling.root", 5, 64)
    assert found.asymmetry < 1e-5
    assert found.residual == pytest.approx(found.residual_exact, rel=1e-3)
    assert violation(records) is None


def test_the_first_violation_is_named() -> None:
    errors = {"asymmetry": 0, "residual": 0.2, "residual_exact": 0.2, "distance": 1e-7, "allowed": 1e-5}
    correct = SpectralRecord(part="one", width=4, iterations=3, stored="float32", **errors)
    broken = correct.model_copy(update={"part": "two", "distance": float("nan")})
    assert violation((correct, broken)) == "two: the root differs from that of 3 steps: by nan, limit 1e-05"
