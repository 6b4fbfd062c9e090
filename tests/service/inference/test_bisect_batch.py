"""One bad image fails alone."""

from collections.abc import Sequence

import numpy as np
import pytest

from sopdeploy_service.inference.bisect_batch import run_bisected
from sopdeploy_service.inference.results import ENGINE_FAILED, NONFINITE

BAD, STRANGE = 13, 17


class Network:
    """Logits are the first pixel; raises for a batch with BAD in it, gives NaN for STRANGE."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        first = np.array([image[0, 0] for image in images], np.float32)
        if (first == BAD).any():
            raise RuntimeError("a bad image")
        first[first == STRANGE] = np.nan
        return {"logits": first}


def images(*first: int) -> list[np.ndarray]:
    return [np.full((2, 2, 3), value, np.uint8) for value in first]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
def test_a_good_batch_costs_one_run(size: int) -> None:
    network = Network()
    found = run_bisected(network, images(*range(20, 20 + size)), ["logits"])
    assert [row["logits"][0] for row in found] == list(range(20, 20 + size))
    assert network.runs == 1


@pytest.mark.parametrize("size", [1, 2, 7, 8, 64])
def test_an_image_that_makes_the_engine_raise_fails_alone(size: int) -> None:
    for place in {0, size // 2, size - 1}:
        values = [20 + other for other in range(size)]
        values[place] = BAD
        found = run_bisected(Network(), images(*values), ["logits"])
        assert found[place] is ENGINE_FAILED
        assert all(
            row["logits"][0] == value
            for row, value in zip(found, values, strict=True)
            if row is not found[place]
        )


def test_two_bad_images_of_64_are_both_singled_out() -> None:
    values = [20] * 64
    values[3] = values[60] = BAD
    found = run_bisected(Network(), images(*values), ["logits"])
    assert [place for place, row in enumerate(found) if row is ENGINE_FAILED] == [3, 60]


def test_an_engine_that_always_fails_costs_a_bounded_number_of_runs() -> None:
    network = Network()
    found = run_bisected(network, images(*[BAD] * 64), ["logits"])
    assert found == [ENGINE_FAILED] * 64
    assert network.runs <= 25


def test_an_output_that_is_not_finite_fails_its_own_image_only() -> None:
    first, strange, last = run_bisected(Network(), images(20, STRANGE, 21), ["logits"])
    assert (first["logits"][0], last["logits"][0]) == (20, 21)
    assert strange is NONFINITE


def test_a_second_output_that_is_not_finite_fails_its_image_too() -> None:
    def network(batch: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        gate = np.zeros((len(batch), 4), np.float32)
        gate[1, 2] = np.inf
        return {"logits": np.zeros((len(batch), 3), np.float32), "gate": gate}

    found = run_bisected(network, images(1, 2, 3), ["logits"])
    assert [row is NONFINITE for row in found] == [False, True, False]


def test_an_output_with_too_few_rows_fails_the_batch() -> None:
    found = run_bisected(lambda _: {"logits": np.zeros((1, 3), np.float32)}, images(1, 2), ["logits"])
    assert len(found) == 2
    assert all(row is ENGINE_FAILED or row["logits"].shape == (3,) for row in found)
