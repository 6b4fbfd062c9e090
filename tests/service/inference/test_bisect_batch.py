"""An image that makes a batch fail is isolated; the other images keep their outputs."""

from collections.abc import Sequence

import numpy as np
import pytest

from sopdeploy_service.inference.model_worker import run_bisected
from sopdeploy_service.inference.results import ENGINE_FAILED, NONFINITE

RAISES = 13


class Network:
    """Logits are the first pixel; a batch with RAISES raises."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        first = np.array([image[0, 0] for image in images], np.float32)
        if (first == RAISES).any():
            raise RuntimeError("a bad image")
        return {"logits": first}


def images(*first: int) -> list[np.ndarray]:
    return [np.full((2, 2, 3), value, np.uint8) for value in first]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
def test_a_good_batch_takes_one_run(size: int) -> None:
    network = Network()
    found = run_bisected(network, images(*range(20, 20 + size)), ["logits"])
    assert [row["logits"][0] for row in found] == list(range(20, 20 + size))
    assert network.runs == 1


@pytest.mark.parametrize(
    ("size", "bad"),
    [(1, [0]), (2, [0]), (2, [1]), (7, [3]), (8, [0]), (8, [4]), (8, [7]), (64, [32]), (64, [3, 60])],
)
def test_bad_images_fail_alone(size: int, bad: list[int]) -> None:
    values = [RAISES if index in bad else 20 + index for index in range(size)]
    found = run_bisected(Network(), images(*values), ["logits"])
    assert [index for index, row in enumerate(found) if row is ENGINE_FAILED] == bad
    good = [index for index in range(size) if index not in bad]
    assert [found[index]["logits"][0] for index in good] == [values[index] for index in good]


def test_a_network_that_always_fails_takes_a_bounded_number_of_runs() -> None:
    network = Network()
    assert run_bisected(network, images(*[RAISES] * 64), ["logits"]) == [ENGINE_FAILED] * 64
    assert network.runs <= 25


@pytest.mark.parametrize("output", ["logits", "gate"])
def test_an_output_that_is_not_finite_fails_only_its_own_image(output: str) -> None:
    values = {"logits": np.zeros((3, 3), np.float32), "gate": np.zeros((3, 4), np.float32)}
    values[output][1, 2] = np.inf if output == "gate" else np.nan
    found = run_bisected(lambda _: values, images(1, 2, 3), ["logits"])
    assert [row is NONFINITE for row in found] == [False, True, False]


def test_an_output_with_too_few_rows_fails_the_batch() -> None:
    found = run_bisected(lambda _: {"logits": np.zeros((1, 3), np.float32)}, images(1, 2), ["logits"])
    assert len(found) == 2
    assert all(row is ENGINE_FAILED or row["logits"].shape == (3,) for row in found)
