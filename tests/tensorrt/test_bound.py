"""I/O binding of onnxruntime on the CPU, with the calls of the GPU path."""

from pathlib import Path
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


def test_every_batch_gets_its_own_outputs_in_any_order_of_sizes(session: Any) -> None:
    bound_session = over(session)
    batches = [some_images(count, seed) for seed, count in enumerate([1, 4, 1, 2, 4, 4, 1])]
    outputs = [
        bound_session.run(images.copy(), list(SHAPES)) for images in batches
    ]  # the next batch overwrites none
    for images, found in zip(batches, outputs, strict=True):
        assert list(found) == list(SHAPES)
        np.testing.assert_array_equal(found["sums"], images.astype(np.float32).sum(axis=(1, 2)))
        np.testing.assert_array_equal(found["doubled"], images * np.float32(2))


def test_tensors_on_the_device_exist_once_per_padded_size(session: Any) -> None:
    runs: list[Any] = []
    counted = SimpleNamespace(
        io_binding=session.io_binding,
        run_with_iobinding=lambda binding: (runs.append(binding), session.run_with_iobinding(binding)),
    )
    bound_session = over(counted)
    for count in (1, 2, 3, 4, 5, 3, 1, 6):  # 6 is not one of them
        images = some_images(count, count)
        found = bound_session.run(images, list(SHAPES))
        np.testing.assert_array_equal(found["doubled"], images * np.float32(2))
    assert [len({id(run) for run in runs}), len(runs)] == [5, 8]
    assert runs[2] is runs[3]
