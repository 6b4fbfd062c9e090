"""Two processes compute what one computes with the whole batch; three mistakes that look right do not."""

from pathlib import Path

import pytest
from torch import Tensor

from tests.sopdeploy.training.distributed import cases, ranks

CASES, LONG_CASES, MISTAKES = cases.cases(), cases.long_cases(), cases.mistakes()
LOOSE = 1e-6  # one step in float32; after ten, rounding has grown


def short(_folder: Path | None = None) -> dict[str, dict[str, Tensor]]:
    """Return what the short cases and the mistakes learn here."""
    mistaken = {name: case for name, (_, case) in MISTAKES.items()}
    return {name: case() for name, case in (CASES | mistaken).items()}


def long(_folder: Path | None = None) -> dict[str, dict[str, Tensor]]:
    """Return what the long cases learn here."""
    return {name: case() for name, case in LONG_CASES.items()}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Return what each of two processes has learnt, by case."""
    return ranks.run_in_processes(f"{__name__}:short", tmp_path_factory.mktemp("two"), world=2)


@pytest.fixture(scope="module")
def of_one():
    """Return what one process has learnt, by case."""
    return {name: case() for name, case in CASES.items()}


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the largest difference of two numbers of the same name, buffers included."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_learns_with_twice_the_batch(name, of_one, of_two) -> None:
    bound = LOOSE if "float32" in name else 1e-10
    assert difference(of_one[name], of_two[0][name]) <= bound
    assert difference(of_two[0][name], of_two[1][name]) == 0


@pytest.mark.slow
def test_a_hundred_steps_are_the_same(tmp_path) -> None:
    first, second = ranks.run_in_processes(f"{__name__}:long", tmp_path, world=2)
    found = {name: difference(state, first[name]) for name, state in long().items()}
    assert max(found.values()) <= 1e-10, found
    assert all(difference(first[name], second[name]) == 0 for name in found)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen_in_the_first_step(name, of_one, of_two) -> None:
    right, _ = MISTAKES[name]
    parameters = [key for key in of_one[right] if "running" not in key]
    wrong = of_two[0][name]
    assert difference({k: of_one[right][k] for k in parameters}, {k: wrong[k] for k in parameters}) > 1e-4
