"""A batch lies in memory that the next one uses again."""

import numpy as np
import pytest

from sopdeploy_service.inference.model_worker import Stack


def images(count: int, first: int = 0, side: int = 4) -> list[np.ndarray]:
    return [np.full((side, side, 3), first + number, np.uint8) for number in range(count)]


@pytest.mark.parametrize("counts", [(8,), (1, 8, 3), (2, 1, 2, 8)])
def test_a_batch_has_its_images_whatever_was_there_before(counts):
    stack = Stack(8)
    for first, count in enumerate(counts):
        given = images(count, 10 * first)
        assert np.array_equal(stack.of(given), np.stack(given))


def test_batches_share_their_memory_and_a_lone_image_keeps_its_own():
    stack = Stack(8)
    assert np.shares_memory(stack.of(images(3)), stack.of(images(8)))
    (alone,) = images(1)
    assert np.shares_memory(stack.of([alone]), alone)


def test_images_of_another_size_get_other_memory():
    stack = Stack(8)
    stack.of(images(2))
    assert stack.of(images(2, side=6)).shape == (2, 6, 6, 3)


def test_images_of_two_sizes_are_no_batch():
    with pytest.raises(ValueError, match="same shape"):
        Stack(8).of([*images(1), *images(1, side=6)])


def test_what_onnxruntime_gave_stays_when_the_memory_of_its_images_is_filled_anew(onnx_runtime):
    room = np.stack(images(2, 40, side=32))
    found = onnx_runtime.run(room)["logits"]
    kept = found.copy()
    room[:] = 200
    onnx_runtime.run(room)
    assert np.array_equal(found, kept)
