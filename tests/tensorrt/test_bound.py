"""I/O binding of onnxruntime on the CPU, with the calls of the GPU path."""

from pathlib import Path
from threading import Semaphore
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sopdeploy_service.runtime.base import padded_sizes
from sopdeploy_service.runtime.onnxruntime import BoundSession

SHAPES = {"sums": (3,), "doubled": (2, 2, 3)}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp("bound") / "two.onnx"
    nodes = [
        helper.make_node("Cast", ["images"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["wide", "axes"], ["sums"], keepdims=0),
        helper.make_node("Add", ["wide", "wide"], ["doubled"]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])
        for name, shape in SHAPES.items()
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 2, 2, 3])
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])
    graph = helper.make_graph(nodes, "two", [images], outputs, [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def over(session: Any) -> BoundSession:
    return BoundSession(onnxruntime, session, "cpu", "images", SHAPES, padded_sizes(5))


def some_images(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)


def test_every_batch_gets_its_own_outputs_from_tensors_that_exist_once_per_padded_size(session: Any) -> None:
    runs: list[Any] = []
    counted = SimpleNamespace(
        io_binding=session.io_binding,
        run_with_iobinding=lambda binding: (runs.append(binding), session.run_with_iobinding(binding)),
    )
    bound_session = over(counted)
    batches = [some_images(count, count) for count in (1, 2, 3, 4, 5, 3, 1, 6)]  # 6 is not one of them
    outputs = [bound_session.begin(images.copy(), list(SHAPES))() for images in batches]
    for images, found in zip(batches, outputs, strict=True):  # the next batch overwrites none
        assert list(found) == list(SHAPES)
        np.testing.assert_array_equal(found["sums"], images.astype(np.float32).sum(axis=(1, 2)))
        np.testing.assert_array_equal(found["doubled"], images * np.float32(2))
    assert [len({id(run) for run in runs}), len(runs)] == [5, 8]
    assert runs[2] is runs[3]


class Gated:
    """A session in which each run waits for `gate`; those whose number is in *failing* then fail."""

    def __init__(self, session: Any, failing: tuple[int, ...] = ()) -> None:
        self.io_binding, self.gate, self._session = session.io_binding, Semaphore(0), session
        self.failing, self.bindings = failing, list[Any]()

    def run_with_iobinding(self, binding: Any) -> None:
        self.bindings.append(binding)
        assert self.gate.acquire(timeout=60)
        if len(self.bindings) - 1 in self.failing:
            raise RuntimeError("CUDA failure 2: out of memory")
        self._session.run_with_iobinding(binding)


@pytest.mark.parametrize("failing", [(), (0,), (1, 2)])
def test_a_batch_is_collected_while_another_runs_and_no_buffer_is_reused_before_its_run_ended(
    session: Any, failing: tuple[int, ...]
) -> None:
    gated = Gated(session, failing)
    bound_session = over(gated)
    batches = [some_images(4, seed) for seed in range(5)]
    sent = [images.copy() for images in batches]
    ends = [bound_session.begin(sent[0], list(SHAPES))]
    for number, images in enumerate(batches):
        if number + 1 < len(batches):
            ends.append(bound_session.begin(sent[number + 1], list(SHAPES)))  # run `number` has not ended
            sent[number + 1].fill(0)  # the worker may overwrite its images
        gated.gate.release()
        if number in failing:
            with pytest.raises(RuntimeError, match="out of memory"):
                ends[number]()
        else:
            np.testing.assert_array_equal(ends[number]()["doubled"], images * np.float32(2))
    bound_session.close()
    assert len({id(binding) for binding in gated.bindings}) == 2
    assert gated.bindings[0] is gated.bindings[2]


def test_images_that_cannot_be_collected_cost_no_buffer(session: Any) -> None:
    gated = Gated(session)
    bound_session = over(gated)
    gated.gate.release(2)
    images = some_images(2)
    for _ in range(2):
        with pytest.raises(ValueError, match="shape"):
            bound_session.begin([images[0], images[1][:1]], ["sums"])
        bound_session.begin(images, ["sums"])()
    assert gated.bindings[0] is gated.bindings[1]


def test_a_closed_session_has_no_thread_and_no_tensors(session: Any) -> None:
    bound_session = over(session)
    bound_session.begin(some_images(2), ["sums"])()
    thread = bound_session._thread
    for _ in range(2):
        bound_session.close()
    assert not thread.is_alive()
    assert not bound_session._free
