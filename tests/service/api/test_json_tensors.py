"""Numbers read from JSON text are those of a JSON parser, or are rejected."""

import json

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sopdeploy_service.api.v2.json_tensors import NumberList, extract_lists
from sopdeploy_service.api.v2.metadata import Tensor
from sopdeploy_service.inference.results import RejectedError

BYTES = Tensor("images", "UINT8", (-1, 2, 2))
FLOATS = Tensor("x", "FP32", (-1, 2, 2))
SHAPE = (1, 2, 2)

TEXTS = [
    '{"inputs": [{"name": "x", "data": [1, 2]}]}',
    '{"inputs": [{"data": [[1], [2]], "name": "x"}]}',
    '{"inputs": [{"data" : [ 1 ,2\n] , "name": "x"}, {"data":[]}]}',
    '{"id": "\\"data\\": [1]", "inputs": [{"data": ["a", "b"]}]}',
    '{"id": "data", "inputs": [{"data": [1, null]}, {"data": [true]}, {"data": 5}, {"data": {"data": [1]}}]}',
    '{"inputs": [{"data": [[1], "a"]}, {"data": [[1], {}]}], "data": [7]}',
    '{"inputs": {"data": [1]}}',
    '[{"data": [1]}, "\\\\", "data"]',
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_extracted_lists_and_the_rest_are_the_document(text):
    rest, lists = extract_lists(text.encode())
    known = {token: json.loads(found.text) for token, found in lists.items()}

    def plain(node):
        if isinstance(node, dict):
            return {key: plain(inner) for key, inner in node.items()}
        if isinstance(node, list):
            return [plain(inner) for inner in node]
        return known.get(node, node) if isinstance(node, str) else node

    assert plain(orjson.loads(rest)) == json.loads(text)


CHANGES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 2), st.text("[],0125 -.eE\n", max_size=2)), max_size=3
)


@pytest.mark.parametrize("tensor", [BYTES, FLOATS], ids=lambda tensor: tensor.datatype)
@given(nested=st.booleans(), changes=CHANGES)
@example(nested=True, changes=[(6, 1, ""), (8, 0, "]")])
@example(nested=True, changes=[(0, 20, "[[[1,2],[3]4]]")])
@example(nested=True, changes=[(0, 20, "[[[1,2]3,[4,5]]]")])
@example(nested=True, changes=[(0, 20, "[[[1,2],3[4,5]]]")])
def test_any_text_is_read_as_a_parser_reads_it(tensor, nested, changes):
    text = "[[[1,2],[3,4]]]" if nested else "[1, 2, 3, 4]"
    for start, length, new in changes:
        text = text[:start] + new + text[start + length :]
    try:
        found = NumberList(text.encode()).read(tensor, SHAPE)
    except RejectedError:
        found = None
    try:
        expected = np.array(orjson.loads(text), np.float64)
    except ValueError:
        expected = np.zeros(0)
    valid = expected.shape in {SHAPE, (4,)} and np.isfinite(expected.astype(np.float32)).all()
    if tensor is BYTES:
        valid = valid and not set(text) & set(".eE") and expected.min() >= 0 and expected.max() <= 255
    assert (found is not None) == valid
    if found is not None:
        assert np.array_equal(found, expected.reshape(SHAPE).astype(found.dtype))
