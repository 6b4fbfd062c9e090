"""What must hold of a root whatever the picture: honest forms keep it, sabotaged ones stop the export."""

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
from sopdeploy.layers.mixture.components import make_components
from sopdeploy.layers.mixture.gate import keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.graph.torch_export import Deployed
from sopdeploy_export.parity.report import SpectralRecord
from sopdeploy_export.parity.spectral import record, spectral_records, violation
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


def as_library(part: ISqrtCov) -> nn.Module:
    return part


def with_classifier(part: ISqrtCov) -> nn.Module:
    return CompensatedAfter(RootThenLinear(LoweredRoot(part), nn.Linear(part.out_features, 3)))


HONEST = {
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


FORMS = (as_library, LoweredRoot, with_classifier, ReferenceRoot)
PAIRS = [(case, form) for case in HONEST for form in FORMS if (case, form) != ("shifted maps", ReferenceRoot)]


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_every_honest_form_keeps_the_invariants(case: str, form: Callable) -> None:
    part, given = HONEST[case]
    found = record("here", form(part).eval(), (given,))
    assert violation((found,)) is None, found
    assert found.allowed < 0.1


@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize("form", list(forms(2)))
def test_the_roots_of_experts_are_measured_one_by_one(form: str, stored: str) -> None:
    torch.manual_seed(0)
    bank, _ = make_components(
        "sop", 10, (9, 7), components=6, counted=2, root=NewtonSchulzConfig(iterations=3)
    )
    bank.after.config = bank.after.config.model_copy(update={"stored": stored})
    weights = keep_largest(torch.randn(3, 6), 2)
    found = record("mixture", forms(2)[form](bank).eval(), (maps(3, 10, 4, 4), weights))
    assert violation((found,)) is None, found
    assert (found.width, found.iterations) == (7, 3)


def rounded_operands(honest: Callable, left: Tensor, right: Tensor) -> Tensor:
    """Round float32 operands to TF32's ten bits; float64 stays exact, so that no proof in it sees this."""
    if left.dtype == torch.float32:
        left, right = left.half().float(), right.half().float()
    return honest(left, right)


def rounded_to_bfloat16(honest: Callable, left: Tensor, right: Tensor) -> Tensor:
    wide = [value if value.dtype == torch.float64 else value.bfloat16().float() for value in (left, right)]
    return honest(*wide)


def lopsided(honest: Callable, self: LoweredRoot, given: Tensor) -> Tensor:
    """Lose what float32 adds above the diagonal of the root."""
    found = honest(self, given)
    return found if given.dtype == torch.float64 else found - 1e-3 * found.triu(1)


def one_step_less(honest: Callable, self: LoweredRoot, given: Tensor) -> Tensor:
    """Stop early, in float32 only."""
    if given.dtype == torch.float64:
        return honest(self, given)
    rule, self.config = self.config, self.config.model_copy(update={"iterations": self.config.iterations - 1})
    try:
        return honest(self, given)
    finally:
        self.config = rule


SABOTAGE = {
    "a root that is not symmetric": (LoweredRoot, "matrix", lopsided, root(), "root is not symmetric"),
    "a step less than N": (LoweredRoot, "matrix", one_step_less, root(), "5 steps leave another residual"),
    "TF32 in the products": (
        iteration,
        "product",
        rounded_operands,
        root(),
        "not symmetric|another residual|of 5 steps",
    ),
    "bfloat16 where float16 was wished": (
        iteration,
        "product",
        rounded_to_bfloat16,
        root(stored="float16"),
        "not symmetric|another residual|of 5 steps",
    ),
}


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_a_broken_invariant_is_found_and_named(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, part, message = SABOTAGE[sabotage]
    honest = getattr(owner, name)
    replaced = partial(wrong, honest) if owner is iteration else lambda *args: wrong(honest, *args)
    monkeypatch.setattr(owner, name, replaced)
    found = record("pooling.root", LoweredRoot(part), (maps(3, 24, 6, 6),))
    named = violation((found,))
    assert named is not None, found
    assert re.match(rf"pooling\.root: its .*({message})", named)


def test_the_papers_centring_matrix_rounds_a_shift_times_itself_which_shows() -> None:
    part, given = HONEST["shifted maps"]
    found = record("pooling.root", ReferenceRoot(part), (given,))
    assert violation((found,)) is not None, found


def test_noise_in_the_librarys_own_products_does_not_raise_the_bound_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for owner in (iteration, newton_schulz):
        monkeypatch.setattr(owner, "product", partial(rounded_operands, owner.product))
    found = record("pooling.root", LoweredRoot(root()), (maps(3, 24, 6, 6),))
    assert violation((found,)) is not None, found


def test_noise_that_raises_the_noise_floor_with_it_still_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ISQRT.trained(tmp_path / "ckpt.pt")
    monkeypatch.setattr(iteration, "product", partial(rounded_operands, iteration.product))
    with pytest.raises(ParityError, match=r"second-order parts: fc\.root: its .* is allowed; nothing was"):
        agreed(checkpoint, tmp_path / "model.onnx", "fp16")


def test_spectra_are_measured_on_every_second_order_part(probes: Tensor, preprocess: object) -> None:
    from tests.export.conftest import trained

    records = spectral_records(Deployed(trained("isqrt-resnet8"), preprocess).eval(), probes)
    (found,) = records
    assert (found.part, found.iterations, found.width) == ("pooling.root", 5, 64)
    assert found.asymmetry < 1e-5
    assert found.residual == pytest.approx(found.residual_exact, rel=1e-3)
    assert violation(records) is None


def test_the_first_part_that_breaks_an_invariant_is_the_one_named() -> None:
    sound = SpectralRecord(
        part="one",
        width=4,
        iterations=3,
        stored="float32",
        asymmetry=0,
        residual=0.2,
        residual_exact=0.2,
        distance=1e-7,
        allowed=1e-5,
    )
    broken = sound.model_copy(update={"part": "two", "distance": float("nan")})
    assert violation((sound, broken)) == "two: its root is not that of 3 steps: off by nan, 1e-05 is allowed"


def test_a_half_precision_bundle_keeps_them_through_the_rules(tmp_path: Path) -> None:
    report = agreed(ISQRT.trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx", "fp16")
    assert report.passed
    assert [(found.part, found.stored) for found in report.spectral] == [("fc.root", "float32")]
