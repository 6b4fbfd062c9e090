"""The operators of many programs are right in ONNX, and the list of their forms ships."""

from functools import partial

import pytest
import torch

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.lower.compared import LIST
from tests.operators.compare import compare_forms
from tests.operators.programs import FUNCTIONS, OF_TIMM, OWN, Program, build_of_timm

ALONE, SEVERAL = BatchRange(optimum=1, maximum=1), BatchRange(optimum=2, maximum=4)
FOUND: set[str] = set()  # by the tests of this file


def find(program: Program, batch: BatchRange = SEVERAL) -> set[str]:
    build, side = program
    torch.manual_seed(0)
    found = {*compare_forms(build().eval(), Preprocess(resize=side, crop=side), batch)}
    FOUND.update(found)
    return found


def listed() -> set[str]:
    return {*LIST.read_text(encoding="utf-8").splitlines()}


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(ALONE, id="alone", marks=pytest.mark.nightly),
        pytest.param(SEVERAL, id="several"),
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_forms_of_functions_are_right_and_in_the_list(
    name: str, batch: BatchRange, pytestconfig: pytest.Config
) -> None:
    found = find(FUNCTIONS[name], batch)
    assert pytestconfig.getoption("--rewrite-goldens") or found <= listed()


@pytest.mark.parametrize("name", OWN)
def test_the_forms_of_the_catalog_are_right_and_in_the_list(
    name: str, pytestconfig: pytest.Config
) -> None:
    found = find(OWN[name])
    assert pytestconfig.getoption("--rewrite-goldens") or found <= listed()


@pytest.mark.nightly
@pytest.mark.parametrize("name", OF_TIMM)
def test_the_forms_of_networks_of_timm_are_right_and_in_the_list(
    name: str, pytestconfig: pytest.Config
) -> None:
    found = find((partial(build_of_timm, name), OF_TIMM[name][1]))
    assert pytestconfig.getoption("--rewrite-goldens") or found <= listed()


def test_the_list_has_the_forms_of_all_versions(pytestconfig: pytest.Config) -> None:
    """The last test of the file: with `make goldens`, it adds what the others found to the list."""
    if pytestconfig.getoption("--rewrite-goldens"):
        LIST.write_text("\n".join(sorted(listed() | FOUND)) + "\n", encoding="utf-8")
    assert listed() >= FOUND
