"""The short ways of a request give what the long ones give."""

import re

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sopdeploy_service.api.direct import read_query
from sopdeploy_service.api.schema import Classes
from sopdeploy_service.api.v1 import PLAIN
from sopdeploy_service.http.middleware import request_id
from sopdeploy_service.inference.results import SMALL_K, Ranking, format_prediction, softmax, top_indices

SMALL = arrays.arrays(np.float32, st.integers(1, 40), elements=st.integers(-3, 3).map(float))
SAME = arrays.arrays(np.float32, 300, elements=st.floats(-50, 50, width=32))


@given(SMALL, st.integers(1, 50))
def test_the_best_are_those_of_a_whole_stable_sort(values, count):
    assert top_indices(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


@given(st.lists(SAME, min_size=1, max_size=9), st.integers(1, 2 * SMALL_K))
def test_a_ranking_of_a_batch_is_that_of_each_image_alone(images, count):
    batch = Ranking(images)
    for place, logits in enumerate(images):
        places = top_indices(logits, count)
        alone = list(zip(places.tolist(), softmax(logits)[places].tolist(), strict=True))
        assert batch.top_k(place, count) == alone


@given(SMALL, st.integers(1, 50), st.none() | SMALL, st.lists(st.sampled_from(["exif_rotated", "x"])))
def test_an_answer_is_what_its_model_would_write(logits, top_k, gates, warnings):
    labels = [f"class {place}" for place in range(len(logits))]
    ranked = Ranking([logits]).top_k(0, top_k)
    found = format_prediction(ranked, labels, warnings=tuple(warnings), gates=gates)
    model = Classes.model_validate(found, strict=False)
    assert orjson.dumps(found) == orjson.dumps(model.model_dump(exclude_none=True))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", {}),
        ("top_k=3", {"top_k": 3}),
        ("model=a-b_c.1&version=0af&gates=true&top_k=1", {
            "model": "a-b_c.1", "version": "0af", "gates": True, "top_k": 1}),
        ("gates=false", {"gates": False}),
        ("top_k=0", None),
        ("top_k=+3", None),
        ("top_k=\u0663", None),
        ("top_k=1234567", None),
        ("gates=1", None),
        ("model=", None),
        ("model=a%20b", None),
        ("model=a+b", None),
        ("top_k=1&top_k=2", None),
        ("other=1", None),
        ("&", None),
        ("top_k=3;model=a", None),
        ("model=" + "a" * 600, None),
    ],
)  # fmt: skip
def test_only_a_plain_query_goes_the_short_way(query, found):
    assert read_query(query, PLAIN) == found


@pytest.mark.parametrize(
    ("plain", "other"),
    [
        ("top_k=2", "top_k=%32"),
        ("top_k=2", "top_k=02"),
        ("top_k=2", "top_k=7&top_k=2"),
        ("top_k=2", "top_k=2&unknown=1"),
        ("model=tiny", "model=t%69ny"),
        ("model=other", "model=%6fther"),
        ("version=abc", "version=%61bc"),
        ("gates=false", "gates=0"),
        ("gates=true", "gates=on"),
    ],
)
def test_both_ways_give_the_same_answer(client, jpeg, plain, other):
    short, long = (client.post(f"/v1/classify?{query}", content=jpeg) for query in (plain, other))
    assert (short.status_code, short.json()) == (long.status_code, long.json())


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("top_k=x", "query.top_k: Input should be a valid integer, unable to parse string as an integer"),
        ("top_k=0", "query.top_k: Input should be greater than or equal to 1"),
        ("top_k=1000001", "query.top_k: Input should be less than or equal to 1000000"),
        ("gates=perhaps", "query.gates: Input should be a valid boolean, unable to interpret input"),
    ],
)
def test_what_is_wrong_is_named_as_ever(client, jpeg, query, detail):
    reply = client.post(f"/v1/classify?{query}", content=jpeg)
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_parameter")
    assert reply.json()["detail"] == detail


def test_another_method_is_refused_on_the_short_way_too(client):
    assert client.get("/v1/classify").status_code == 405


def test_ids_of_requests_are_32_digits_and_none_is_given_twice():
    ids = [request_id({"type": "http", "headers": []}) for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(re.fullmatch(r"[0-9a-f]{32}", one) for one in ids)
