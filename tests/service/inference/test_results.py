"""An answer ranks classes, and its fields are those of the response model."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sopdeploy.decision import Decision, Rejection, softmax, top_indices
from sopdeploy.http_api import Classes
from tests.service.held import Held
from tests.service.raw import count

SMALL = arrays.arrays(np.float32, st.integers(1, 40), elements=st.integers(-3, 3).map(float))


@given(SMALL, st.integers(1, 50))
def test_top_indices_equals_a_stable_sort(values, count):
    assert top_indices(values, count) == np.argsort(-values, kind="stable")[:count].tolist()


@given(SMALL, st.integers(1, 50), st.none() | st.just(Rejection(score="energy", threshold=2.0)))
def test_the_fields_of_an_answer_are_a_valid_response_model(logits, top_k, rejection):
    labels = [f"class {index}" for index in range(len(logits))]
    found = Decision(rejection=rejection).answer(logits, top_k).fields(labels)
    model = Classes.model_validate(found, strict=False)
    assert orjson.dumps(found) == orjson.dumps(model.model_dump(exclude_none=True, exclude={"warnings"}))


@pytest.mark.parametrize(
    ("logits", "top_k", "labels"),
    [
        ([1, 3, 2], 3, ["b", "c", "a"]),
        ([1, 3, 2], 1, ["b"]),
        ([2, 2, 2], 2, ["a", "b"]),
        ([0, 5, 5], 99, ["b", "c", "a"]),
        ([100, 90, 80], 2, ["a", "b"]),
    ],
)
def test_classes_are_sorted_and_ties_keep_the_label_order(logits, top_k, labels):
    found = Decision().answer(np.array(logits, np.float32), top_k).fields(["a", "b", "c"])
    assert [entry["label"] for entry in found["classes"]] == labels


@pytest.mark.parametrize(
    "logits", [[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [1e-45, 0.0, -1e-45], [1, 2, 3]]
)
def test_softmax_of_any_logits_is_the_distribution_of_its_definition(logits):
    values = np.array(logits, np.float32)
    found = softmax(values)
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1, abs=1e-12)
    exponentials = np.exp(values.astype(np.float64) - values.max())
    np.testing.assert_allclose(found, exponentials / exponentials.sum(), rtol=1e-12)


def test_requests_in_one_batch_get_as_many_classes_as_they_want(serve_with, jpeg, until):
    runtime = Held()
    client = serve_with(runtime)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(client.post, "/v1/classify", content=jpeg)]
        assert runtime.entered.wait(60)
        paths = [f"/v1/classify?top_k={top_k}" for top_k in (1, 99, 3)]
        futures += [pool.submit(client.post, path, content=jpeg) for path in paths]
        until(lambda: count(client, "queue_depth") == 4)
        until(lambda: count(client, 'stage_duration_seconds_count{stage="decode"}') == 4)
        runtime.gate.set()
        classes = [future.result(60).json()["classes"] for future in futures]
    assert runtime.batches == [1, 3]
    assert [len(listed) for listed in classes] == [5, 1, 7, 3]
    assert all(listed == classes[2][: len(listed)] for listed in classes)
