"""A body of the Open Inference Protocol is read for what it says, or refused with what it should say."""

import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy_service.api.v2.metadata import Signature, Tensor
from sopdeploy_service.api.v2.request import InferRequest, read_body
from sopdeploy_service.http.problems import RejectedError

LIMIT = 100_000
PIXELS = Signature(
    Tensor("images", "UINT8", (-1, 2, 2, 3)),
    (Tensor("logits", "FP32", (-1, 7)), Tensor("gate", "FP32", (-1, 4))),
    ("ant", "bee"),
    max_images=4,
)
FLOATS = Signature(Tensor("x", "FP32", (-1, 3)), PIXELS.outputs, (), max_images=4)


def read(
    text: Any, binary: bytes = b"", header: str | None = None, signature: Signature = PIXELS
) -> InferRequest:
    raw = text if isinstance(text, bytes) else orjson.dumps(text)
    if binary and header is None:
        header = str(len(raw))
    return read_body(raw + binary, header, signature, LIMIT)


def refused(*args: Any, **options: Any) -> tuple[str, int, str]:
    with pytest.raises(RejectedError) as caught:
        read(*args, **options)
    rejection = caught.value.rejection
    return rejection.code, rejection.status, rejection.message


def tensor(**changes: Any) -> dict[str, Any]:
    """A good request of one image, but for *changes* to its input; None takes a key away."""
    item = {"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": list(range(12)), **changes}
    return {"inputs": [{key: value for key, value in item.items() if value is not None}]}


def floats(data: bytes) -> bytes:
    return b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [' + data + b"]}]}"


def files(*images: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def encoded(shape: list[int], size: int) -> dict[str, Any]:
    parameters = {"binary_data_size": size}
    return {"inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": shape, "parameters": parameters}]}


NESTED = np.arange(12).reshape(1, 2, 2, 3).tolist()
RAGGED = [[[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10]]]]


@pytest.mark.parametrize("data", [list(range(12)), NESTED], ids=["flat", "nested"])
def test_a_tensor_in_json_is_read_flat_or_nested(data):
    images = read(tensor(data=data)).images
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.arange(12).reshape(1, 2, 2, 3))


def test_a_binary_tensor_is_read_from_behind_the_json():
    asked = tensor(data=None, parameters={"binary_data_size": 24}, shape=[2, 2, 2, 3])
    assert np.array_equal(read(asked, bytes(range(24))).images, np.arange(24).reshape(2, 2, 2, 3))


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_encoded_images_are_read_as_binary_and_as_base64(shape):
    body = files(b"one", b"")
    assert read(encoded(shape, len(body)), body).images == [b"one", b""]
    data = ["b25l", ""] if len(shape) == 1 else [["b25l"], [""]]
    asked = {"inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": shape, "data": data}]}
    assert read(asked).images == [b"one", b""]


def test_floats_are_read_with_all_their_digits():
    assert read(floats(b"0.1, 3, -1e-7"), signature=FLOATS).images.tolist() == [
        [np.float32(0.1), 3, np.float32(-1e-7)]
    ]


BAD_FLOATS = [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"1e39", b'"1"', b"null", b"true", b"[1]", b"{}"]


@pytest.mark.parametrize("number", BAD_FLOATS)
def test_a_float_that_is_not_a_finite_number_is_refused(number):
    code, status, _ = refused(floats(b"1, 2, " + number), signature=FLOATS)
    assert status == 400
    assert code in {"malformed_json", "wrong_data"}


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_binary_float_that_is_not_finite_is_refused(number):
    asked = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}}]
    }
    raw = np.array([1, number, 2], dtype="<f4").tobytes()
    assert refused(asked, raw, signature=FLOATS)[0] == "wrong_data"


HUGE = 2**40
BAD_SHAPES = [
    *(
        None,
        "1",
        12,
        {},
        [],
        [None],
        [[1], 2, 2, 3],
        [1, 2, 2],
        [1, 2, 2, 3, 1],
        [1, 2, 2, -3],
        [1, HUGE, HUGE, HUGE],
    ),
    *([first, 2, 2, 3] for first in (0, -1, 1.0, True, "1", 1e30)),
    [HUGE, HUGE, HUGE, 3],
]


@pytest.mark.parametrize("shape", BAD_SHAPES, ids=str)
def test_a_wrong_shape_is_refused_with_the_right_one(shape):
    code, status, message = refused(tensor(shape=shape))
    assert (code, status) == ("wrong_shape", 400)
    assert "[n, 2, 2, 3] with n from 1 to 4" in message


@pytest.mark.parametrize("shape", [[5, 2, 2, 3], [HUGE, 2, 2, 3]], ids=str)
def test_more_images_than_a_request_may_have_are_refused(shape):
    assert refused(tensor(shape=shape))[0] == "too_many_images"


BAD_NUMBERS = [256, -1, 1.0, True, "1", None, [1], 2**63]
BAD_DATA = [
    *(RAGGED, list(range(11)), list(range(13)), [], [[]], [NESTED], "abc", 5, {"a": 1}),
    *([*range(11), number] for number in BAD_NUMBERS),
]


@pytest.mark.parametrize("data", BAD_DATA, ids=str)
def test_data_that_does_not_fit_its_shape_or_type_is_refused(data):
    code, status, message = refused(tensor(data=data))
    assert (code, status) == ("wrong_data", 400)
    assert "[1, 2, 2, 3]" in message or "whole numbers" in message or "0 and 255" in message


@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "INT8", "uint8", "UINT8 ", "", "X" * 1000])
def test_another_datatype_is_refused_with_the_right_one(datatype):
    code, status, message = refused(tensor(datatype=datatype))
    assert (code, status) == ("wrong_datatype", 400)
    assert "must be UINT8" in message


GOOD = tensor()["inputs"][0]
BAD_REQUESTS = {
    "no object": ([1], "malformed_request"),
    "null": (None, "malformed_request"),
    "no inputs": ({}, "missing_input"),
    "empty inputs": ({"inputs": []}, "missing_input"),
    "inputs no list": ({"inputs": {"a": 1}}, "malformed_request"),
    "input no object": ({"inputs": [1]}, "malformed_request"),
    "input without a name": ({"inputs": [{"datatype": "UINT8"}]}, "malformed_request"),
    "input with a number for a name": ({"inputs": [{**GOOD, "name": 1}]}, "malformed_request"),
    "unknown input": ({"inputs": [{**GOOD, "name": "x"}]}, "unknown_input"),
    "an unknown input too": ({"inputs": [GOOD, {**GOOD, "name": "x"}]}, "unknown_input"),
    "input twice": ({"inputs": [GOOD, GOOD]}, "duplicate_input"),
    "both inputs": ({"inputs": [GOOD, {**GOOD, "name": "IMAGE"}]}, "too_many_inputs"),
    "no datatype": (tensor(datatype=None), "malformed_request"),
    "no data": (tensor(data=None), "wrong_data"),
    "data and binary data": (tensor(parameters={"binary_data_size": 12}), "wrong_data"),
    "parameters no object": (tensor(parameters=[1]), "malformed_request"),
    "id a number": ({**tensor(), "id": 7}, "malformed_request"),
    "outputs no list": ({**tensor(), "outputs": "logits"}, "malformed_request"),
    "unknown output": ({**tensor(), "outputs": [{"name": "probabilities"}]}, "unknown_output"),
    "output twice": ({**tensor(), "outputs": [{"name": "logits"}] * 2}, "duplicate_output"),
    "output without a name": ({**tensor(), "outputs": [{}]}, "malformed_request"),
    "binary_data a number": (
        {**tensor(), "outputs": [{"name": "logits", "parameters": {"binary_data": 1}}]},
        "malformed_request",
    ),
    "classification negative": (
        {**tensor(), "outputs": [{"name": "logits", "parameters": {"classification": -1}}]},
        "malformed_request",
    ),
    "classification true": (
        {**tensor(), "outputs": [{"name": "logits", "parameters": {"classification": True}}]},
        "malformed_request",
    ),
    "request parameters no object": ({**tensor(), "parameters": 3}, "malformed_request"),
    "binary_data_output a text": (
        {**tensor(), "parameters": {"binary_data_output": "yes"}},
        "malformed_request",
    ),
    "timeout negative": ({**tensor(), "parameters": {"timeout": -1}}, "malformed_request"),
    "timeout a float": ({**tensor(), "parameters": {"timeout": 1.5}}, "malformed_request"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_request_that_is_not_one_is_refused(case):
    text, wanted = BAD_REQUESTS[case]
    assert refused(text)[:2] == (wanted, 400)


BAD_JSON = {
    "empty": (b"", "malformed_json"),
    "cut short": (b'{"inputs": [', "malformed_json"),
    "lists 100000 deep": (b"[" * 100_000, "json_too_large"),
    "lists 49000 deep": (b"[" * 49_000 + b"]" * 49_000, "malformed_json"),
    "objects 2000 deep": (b'{"a":' * 2000 + b"1" + b"}" * 2000, "malformed_json"),
    "objects 10000 deep": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "json_too_complex"),
    "not UTF-8": (b'{"id": "\xff"}', "malformed_json"),
    "UTF-16": ('{"id": "a"}'.encode("utf-16"), "malformed_json"),
    "a key twice": (b'{"inputs": [], "inputs": []}', "duplicate_key"),
    "a key twice, once with an escape": (b'{"a\\"b": 1, "a\\u0022b": 2}', "duplicate_key"),
    "a key twice, deep": (b'{"a": [{"b" : 1, "b"\n:2}]}', "duplicate_key"),
    "two documents": (b"{}{}", "malformed_json"),
    "numbers that are no data": (
        b'{"shape": [' + b"1," * 49_000 + b'1], "a": [' + b"1," * 900 + b"1]}",
        "missing_input",
    ),
    "a thousand strings": (b'{"a": [' + b'"",' * 6000 + b'""]}', "json_too_complex"),
    "data that is no list": (b'{"inputs": [{"data": 1]}', "malformed_json"),
    "data cut short": (b'{"inputs": [{"data": [1, 2', "malformed_json"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_is_damaged_or_ambiguous_is_refused(case):
    text, wanted = BAD_JSON[case]
    limit = 99_999
    with pytest.raises(RejectedError) as caught:
        read_body(text, None, PIXELS, limit)
    rejection = caught.value.rejection
    assert (rejection.code, rejection.status) == (wanted, 413 if wanted == "json_too_large" else 400)


@pytest.mark.parametrize("header", ["-1", "1e3", "", "abc", "0x10", "9999999", "9" * 5000, "1.5", "²", "٣"])
def test_a_header_length_that_is_none_is_refused(header):
    assert refused(tensor(), b"x", header)[:2] == ("bad_header_length", 400)


@pytest.mark.parametrize("said", [0, 11, 13, 24, -12, 12.0, True, "12", 2**63, None])
def test_a_binary_size_that_lies_is_refused(said):
    asked = tensor(data=None, parameters={"binary_data_size": said})
    assert refused(asked, bytes(12))[0] in {"wrong_binary_size", "malformed_request", "wrong_data"}


def test_binary_data_without_the_header_or_beyond_the_tensor_is_refused():
    asked = tensor(data=None, parameters={"binary_data_size": 12})
    assert refused(asked)[0] == "wrong_binary_size"
    assert refused(asked, bytes(13))[0] == "wrong_binary_size"
    assert refused(tensor(), b"x")[0] == "wrong_binary_size"
    right = tensor(data=None, parameters={"binary_data_size": 13})
    assert "is 12 bytes, not 13" in refused(right, bytes(13))[2]


BAD_BYTES = [
    b"",
    b"\3\0\0",
    b"\4\0\0\0abc",
    b"\3\0\0\0abc",
    files(b"a", b"b") + b"x",
    b"\xff\xff\xff\xff" * 4,
]


@pytest.mark.parametrize("raw", BAD_BYTES)
def test_bytes_whose_lengths_lie_are_refused(raw):
    assert refused(encoded([2], len(raw)), raw, header=str(len(orjson.dumps(encoded([2], len(raw))))))[
        :2
    ] == (
        "wrong_binary_size",
        400,
    )


def test_all_outputs_come_where_none_is_named_and_as_the_request_says():
    assert [(w.tensor.name, w.binary, w.classes) for w in read(tensor()).outputs] == [
        ("logits", False, 0), ("gate", False, 0),
    ]  # fmt: skip
    outputs = [
        {"name": "gate"},
        {"name": "logits", "parameters": {"binary_data": False, "classification": 3}},
    ]
    asked = {
        **tensor(),
        "id": "a",
        "outputs": outputs,
        "parameters": {"binary_data_output": True, "timeout": 5000},
    }
    found = read(asked)
    assert [(w.tensor.name, w.binary, w.classes) for w in found.outputs] == [
        ("gate", True, 0),
        ("logits", False, 3),
    ]
    assert (found.id, found.timeout_seconds) == ("a", 0.005)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
INPUT = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["images", "IMAGE"]) | JSON,
        "datatype": st.sampled_from(["UINT8", "BYTES", "FP32"]) | JSON,
        "shape": st.sampled_from([[1], [1, 1], [1, 2, 2, 3]]) | JSON,
        "data": st.just(NESTED) | JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 30)}) | JSON,
    },
)
BODY = st.fixed_dictionaries(
    {},
    optional={"id": JSON, "inputs": st.lists(INPUT, max_size=2) | JSON, "outputs": JSON, "parameters": JSON},
)


@given(text=BODY | JSON, binary=st.binary(max_size=30))
def test_no_body_is_answered_with_anything_but_a_request_or_a_400(text, binary):
    status, images = 200, 1
    try:
        images = len(read(text, binary).images)
    except RejectedError as problem:
        status = problem.rejection.status
    assert status in {200, 400}
    assert 1 <= images <= 4


@given(st.binary(max_size=200), st.none() | st.text(max_size=5))
def test_no_bytes_at_all_are_answered_with_anything_but_a_400(body, header):
    with pytest.raises(RejectedError) as caught:
        read_body(body, header, PIXELS, LIMIT)
    assert caught.value.rejection.status == 400
