"""The Open Inference Protocol: parsed request bodies, responses, and the protocol over HTTP."""

import re
import struct
from typing import Any, get_args

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy.bundle.manifest import Manifest, TensorRecord
from sopdeploy_service.api.v2 import routes
from sopdeploy_service.api.v2.request import InferRequest, parse_body
from sopdeploy_service.api.v2.routes import stack_outputs
from sopdeploy_service.inference.model import State
from sopdeploy_service.inference.results import (
    INFERENCE_FAILED,
    NONFINITE,
    Prediction,
    RejectedError,
)
from sopdeploy_service.inference.service import Service
from sopdeploy_service.settings import Settings
from tests.support.service import running
from tests.support.strategies import json_bodies

LIMIT = 100_000

MANIFEST = Manifest.model_construct(
    inputs=(TensorRecord(name="images", dtype="uint8", shape=(None, 2, 2, 3)),),
    outputs=tuple(
        TensorRecord(name=name, dtype="float32", shape=(None, 7)) for name in ("logits", "gate")
    ),
)
MAX_IMAGES = 4


def read(text: Any, binary: bytes = b"", header: str | None = None) -> InferRequest:
    raw = text if isinstance(text, bytes) else orjson.dumps(text)
    if binary and header is None:
        header = str(len(raw))
    return parse_body(raw + binary, header, MANIFEST, MAX_IMAGES, LIMIT)


def sizes_named(message: str) -> set[str]:
    return {*re.findall(r"\b\d+\b", message)}


def rejected(*args: Any, **options: Any) -> tuple[str, int, str]:
    with pytest.raises(RejectedError) as caught:
        read(*args, **options)
    reason = caught.value.reason
    return reason.code, reason.status, reason.message


def tensor(**changes: Any) -> dict[str, Any]:
    """A valid request of one image with *changes* to its input; None removes a key."""
    item = {
        "name": "images",
        "datatype": "UINT8",
        "shape": [1, 2, 2, 3],
        "data": list(range(12)),
        **changes,
    }
    return {"inputs": [{key: value for key, value in item.items() if value is not None}]}


def files(*images: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def encoded(shape: list[int], size: int) -> dict[str, Any]:
    parameters = {"binary_data_size": size}
    return {
        "inputs": [
            {"name": "IMAGE", "datatype": "BYTES", "shape": shape, "parameters": parameters}
        ]
    }


NESTED = np.arange(12).reshape(1, 2, 2, 3).tolist()
RAGGED = [[[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10]]]]


WHOLE = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)


def test_a_tensor_is_flat_or_nested_uint8_or_fp32():
    for datatype, values in (("UINT8", WHOLE.astype(np.uint8)), ("FP32", WHOLE)):
        size = {"binary_data_size": values.nbytes}
        binary = tensor(datatype=datatype, data=None, parameters=size)
        as_json = [
            tensor(datatype=datatype, data=data) for data in (WHOLE.tolist(), list(range(12)))
        ]
        for asked, raw in (binary, values.tobytes()), *((asked, b"") for asked in as_json):
            images = read(asked, raw).images
            assert images.dtype == np.uint8
            assert np.array_equal(images, WHOLE)


def test_as_many_tensors_and_files_as_the_limit_are_accepted():
    largest = tensor(shape=[4, 2, 2, 3], data=WHOLE.tolist() * 4)
    assert len(read(largest, b"").images) == 4
    assert len(read(encoded([4], 20), files(*[b"x"] * 4)).images) == 4

    code, status, _ = rejected(tensor(shape=[5, 2, 2, 3], data=WHOLE.tolist() * 5))
    assert (code, status) == ("too_many_images", 400)


NO_PIXELS = {
    "scaled to 1": WHOLE / 255,
    "normalized": WHOLE - 6,
    "fractions of a resize": WHOLE + 0.5,
    "too large": WHOLE + 250,
    "far too large": WHOLE + 1e30,
    "not a number": np.where(WHOLE == 3, np.nan, WHOLE),
    "infinite": np.where(WHOLE == 3, np.inf, WHOLE),
}


@pytest.mark.parametrize("case", NO_PIXELS)
def test_fp32_that_is_not_pixels_is_rejected_with_what_to_send(case):
    values = NO_PIXELS[case].astype(np.float32)
    bodies = [
        (
            tensor(datatype="FP32", data=None, parameters={"binary_data_size": 48}),
            values.tobytes(),
        )
    ]
    if np.isfinite(values).all():  # JSON has no other numbers
        bodies.append((tensor(datatype="FP32", data=values.tolist()), b""))

    for asked, raw in bodies:
        code, status, message = rejected(asked, raw)
        assert (code, status) == ("wrong_data", 400)
        assert "normalization" in message


def test_encoded_images_may_be_binary_or_base64():
    body = files(b"one", b"")
    for shape, data in (([2], ["b25l", ""]), ([2, 1], [["b25l"], [""]])):
        assert read(encoded(shape, len(body)), body).images == [b"one", b""]
        asked = {
            "inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": shape, "data": data}]
        }
        assert read(asked).images == [b"one", b""]


HUGE = 2**40

BAD_SHAPES: list[Any] = [
    *(
        [],
        [1, 2, 2],
        [1, 2, 2, 3, 1],
        [1, 2, 2, -3],
        [0, 2, 2, 3],
        [-1, 2, 2, 3],
        [HUGE, HUGE, HUGE, 3],
    )
]
NO_SHAPES: list[Any] = [
    *(None, "1", [None], [[1], 2, 2, 3]),
    *([first, 2, 2, 3] for first in (1.0, True, "1", 1e30)),
]

BAD_DATATYPES = ["FP16", "BYTES", "", "X" * 1000]
BAD_NUMBERS = [256, -1, 1.5, "1", None, True, [1], {}, 2**63, "a" * 1000]

BAD_DATA = [
    *(
        RAGGED,
        list(range(11)),
        list(range(13)),
        [],
        [[]],
        "abc",
        {"a": 1},
        [list(range(12))],
        [NESTED],
    ),
    *([*range(11), number] for number in BAD_NUMBERS),
]

LONG_FIELDS = [
    ("shape", [1] * 17),
    ("shape", [1.5] * 10_000),
    ("name", "a" * 1001),
    ("datatype", "a" * 1001),
]

BAD_FIELDS: list[tuple[str, Any, str, str]] = [
    *(
        ("shape", shape, "wrong_shape", r"\[n, 2, 2, 3\] with n from 1 to 4")
        for shape in BAD_SHAPES
    ),
    *(("shape", shape, "malformed_request", r"inputs\.0\.shape") for shape in NO_SHAPES),
    ("shape", [HUGE, 2, 2, 3], "too_many_images", "the limit of this server"),
    *(
        ("data", data, "wrong_data", r"\[1, 2, 2, 3\]|whole numbers|0 and 255")
        for data in BAD_DATA
    ),
    *(("datatype", name, "wrong_datatype", "must be UINT8") for name in BAD_DATATYPES),
    *(
        (field, value, "malformed_request", rf"inputs\.0\.{field}")
        for field, value in LONG_FIELDS
    ),
]


@pytest.mark.parametrize(("field", "value", "expected", "text"), BAD_FIELDS, ids=str)
def test_a_wrong_field_is_rejected_with_the_right_one(field, value, expected, text):
    code, status, message = rejected(tensor(**{field: value}))

    assert (code, status) == (expected, 400)
    assert re.search(text, message)


GOOD = tensor()["inputs"][0]

BAD_INPUTS = {
    "null": (None, "malformed_request"),
    "empty": ([], "wrong_inputs"),
    "not a list": ({"a": 1}, "malformed_request"),
    "not objects": ([1], "malformed_request"),
    "no name": ([{"datatype": "UINT8"}], "malformed_request"),
    "unknown": ([{**GOOD, "name": "x"}], "wrong_inputs"),
    "the same twice": ([GOOD, GOOD], "wrong_inputs"),
    "both": ([GOOD, {**GOOD, "name": "IMAGE"}], "wrong_inputs"),
    "no datatype": (tensor(datatype=None)["inputs"], "malformed_request"),
    "no data": (tensor(data=None)["inputs"], "wrong_data"),
    "data and binary data": (
        tensor(parameters={"binary_data_size": 12})["inputs"],
        "wrong_data",
    ),
}

LOGITS = {"name": "logits"}

BAD_VALUES = [
    ("id", 7, "malformed_request"),
    ("id", "a" * 1001, "malformed_request"),
    ("inputs", [0] * 17, "malformed_request"),
    ("outputs", [0] * 101, "malformed_request"),
    ("outputs", "logits", "malformed_request"),
    ("outputs", [{"name": "probabilities"}], "unknown_output"),
    ("outputs", [LOGITS] * 2, "duplicate_output"),
    ("outputs", [{**LOGITS, "parameters": {"classification": -1}}], "malformed_request"),
    ("outputs", [{**LOGITS, "parameters": {"classification": 3}}], "no_classification"),
    ("parameters", {"binary_data_output": "yes"}, "malformed_request"),
    ("parameters", {"timeout": 1.5}, "malformed_request"),
]

BAD_REQUESTS = {
    "a list": ([1], "malformed_request"),
    "null": (None, "malformed_request"),
    "no inputs": ({}, "malformed_request"),
    **{
        f"inputs: {name}": ({"inputs": inputs}, code)
        for name, (inputs, code) in BAD_INPUTS.items()
    },
    **{f"{key}: {value}": ({**tensor(), key: value}, code) for key, value, code in BAD_VALUES},
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_an_invalid_request_is_rejected(case):
    text, expected = BAD_REQUESTS[case]
    assert rejected(text)[:2] == (expected, 400)


# A response has at most 254 levels, and so has a request.
DEPTHS = {
    253: "malformed_request",
    **dict.fromkeys((254, 255, 256, 1022, 1023, 1024), "malformed_json"),
}

BAD_JSON = {
    "empty": (b"", "malformed_json"),
    "lists 100000 deep": (b"[" * 100_000, "json_too_large"),
    "lists 49000 deep": (b"[" * 49_000 + b"]" * 49_000, "malformed_json"),
    **{
        f"lists {n} deep": (b'{"x": ' + b"[" * n + b"]" * n + b"}", code)
        for n, code in DEPTHS.items()
    },
    "objects 10000 deep": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "json_too_complex"),
    "not UTF-8": (b'{"id": "\xff"}', "malformed_json"),
    "two documents": (b"{}{}", "malformed_json"),
    "numbers that are not data": (b'{"a": [' + b"1," * 49_900 + b"1]}", "malformed_request"),
    "a million lists": (b"[" + b"[]," * 1_000_000 + b"[]]", "json_too_complex"),
    "a million escapes": (b'["' + b"\\\\" * 500_001 + b'"]', "json_too_complex"),
    "a million numbers": (b"[" + b"1," * 1_010_000 + b"1]", "json_too_complex"),
    "a thousand strings": (b'{"a": [' + b'"",' * 6000 + b'""]}', "json_too_complex"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_malformed_json_is_rejected(case):
    text, expected = BAD_JSON[case]
    with pytest.raises(RejectedError) as caught:
        parse_body(
            text, None, MANIFEST, MAX_IMAGES, 10_000_000 if len(text) > 10**6 else 99_999
        )

    reason = caught.value.reason
    assert reason.code == expected
    assert reason.status == (413 if expected == "json_too_large" else 400)


def test_binary_data_with_a_wrong_header_or_size_is_rejected():
    for header in ("-1", "1e3", "", "9999999", "9" * 5000, "²"):
        assert rejected(tensor(), b"x", header)[:2] == ("bad_header_length", 400)
    for size in (0, 11, 13, -12, 12.0, 2**63, None):
        asked = tensor(data=None, parameters={"binary_data_size": size})
        assert rejected(asked, bytes(12))[0] in {
            "wrong_binary_size",
            "malformed_request",
            "wrong_data",
        }

    asked, right = (
        tensor(data=None, parameters={"binary_data_size": size}) for size in (12, 13)
    )
    for sent in (asked,), (asked, bytes(13)), (tensor(), b"x"):
        assert rejected(*sent)[0] == "wrong_binary_size"

    assert {"12", "13"} <= sizes_named(rejected(right, bytes(13))[2])
    floats = tensor(datatype="FP32", data=None, parameters={"binary_data_size": 12})
    assert {"12", "48"} <= sizes_named(rejected(floats, bytes(12))[2])

    # Elements of wrong lengths
    for raw in (b"", b"\3\0\0", b"\4\0\0\0abc", files(b"a", b"b") + b"x"):
        asked = encoded([2], len(raw))
        header = str(len(orjson.dumps(asked)))
        assert rejected(asked, raw, header=header)[:2] == ("wrong_binary_size", 400)


def test_all_outputs_are_the_default_and_parameters_apply_to_each():
    assert list(read(tensor()).is_binary.items()) == [("logits", False), ("gate", False)]

    outputs = [{"name": "gate"}, {**LOGITS, "parameters": {"binary_data": False}}]
    parameters = {"binary_data_output": True, "timeout": 5000}
    found = read({**tensor(), "id": "a", "outputs": outputs, "parameters": parameters})

    assert list(found.is_binary.items()) == [("gate", True), ("logits", False)]
    assert (found.id, found.timeout_seconds) == ("a", 0.005)


VALID = {
    **tensor(data=NESTED),
    "id": "a",
    "outputs": [{**LOGITS, "parameters": {"binary_data": False}}],
}


@given(
    body=json_bodies(VALID),
    binary=st.binary(max_size=30),
    header=st.none() | st.text(max_size=5),
)
def test_a_damaged_request_is_a_request_or_a_400(body, binary, header):
    status = 200
    images = 1
    try:
        images = len(parse_body(body + binary, header, MANIFEST, MAX_IMAGES, LIMIT).images)
    except RejectedError as problem:
        status = problem.reason.status

    assert status in {200, 400}
    assert images == 1


OUTPUT_VALUES = {
    "logits": np.array([[0.1, 1e-7, -3.4e38], [2, 2, 5]], dtype=np.float32),
    "gate": np.array([[1 / 3, 1], [0, 2 / 3]], dtype=np.float32),
}


def prediction(index: int) -> Prediction:
    outputs = {name: values[index] for name, values in OUTPUT_VALUES.items()}
    return Prediction(outputs, {}, np.zeros((2, 2, 3), np.uint8))


def test_outputs_are_stacked_by_name_or_the_first_rejection_is_raised():
    found = stack_outputs([prediction(0), prediction(1)])
    assert list(found) == ["logits", "gate"]
    assert all(np.array_equal(found[name], OUTPUT_VALUES[name]) for name in OUTPUT_VALUES)
    with pytest.raises(RejectedError) as caught:
        stack_outputs([prediction(0), NONFINITE, INFERENCE_FAILED])

    reason = caught.value.reason
    assert (reason.code, reason.status) == (NONFINITE.code, 500)
    assert reason.message == f"image 1: {NONFINITE.message}"


INFER = "/v2/models/tiny/infer"
ZEROS = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
GOOD_REQUEST = {"inputs": [ZEROS]}
LENGTH_HEADER = "Inference-Header-Content-Length"


def post(client, body, path: str = INFER, **headers: str):
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return client.post(path, content=raw, headers=headers)


MISSING = {
    ("GET", "/v2/models/other"): (404, "unknown_model"),
    ("GET", "/v2/models/tiny/versions/1"): (404, "unknown_version"),
    ("POST", "/v2/models/other/infer"): (404, "unknown_model"),
    ("POST", "/v2/models/..%2ftiny/infer"): (404, "not_found"),
    ("GET", "/v2/models/tiny/infer"): (405, "method_not_allowed"),
    ("GET", "/v2/logging"): (404, "not_found"),
    **{
        ("GET", f"/v2/models/{path}stats"): (404, "not_found")
        for path in ("", "tiny/", "tiny/versions/1/")
    },
}


def test_the_server_is_described_at_the_path_with_a_slash_too(client):
    assert client.get("/v2/").json() == client.get("/v2").json()


def test_statistics_are_refused_with_the_place_of_the_figures(client):
    assert "/metrics" in client.get("/v2/models/stats").json()["error"]


def test_a_model_may_be_called_stats(onnx_runtime, bundle):
    with running(onnx_runtime, bundle, Settings(), names=["stats"]) as client:
        assert client.get("/v2/models/stats").json()["name"] == "stats"


def test_missing_resources_get_an_error_object(client):
    for target, expected in MISSING.items():
        reply = client.request(*target)

        assert (reply.status_code, reply.headers["x-error-code"]) == expected
        assert list(reply.json()) == ["error"]


@pytest.mark.parametrize("state", get_args(State))
def test_a_model_is_ready_unless_the_server_starts_or_ends(client, monkeypatch, state) -> None:
    monkeypatch.setattr(Service, "state", property(lambda _: state))
    reply = client.get("/v2/models/tiny/ready")
    is_ready = state not in {"starting", "draining"}

    assert (reply.status_code, reply.json()["ready"]) == (200 if is_ready else 503, is_ready)


def test_the_current_version_can_also_be_named(client, bundle):
    for suffix in ("", "/ready", "/infer"):
        method, body = (
            ("POST", orjson.dumps(GOOD_REQUEST)) if suffix == "/infer" else ("GET", None)
        )
        both = [
            client.request(method, f"/v2/models/tiny{version}{suffix}", content=body)
            for version in ("", f"/versions/{bundle.manifest.id}")
        ]

        assert both[0].status_code == both[1].status_code == 200
        assert both[0].json() == both[1].json()
        assert both[0].headers["x-model-digest"] == bundle.manifest.id


def test_a_response_has_timings_an_id_and_a_deadline(client):
    reply = post(client, {**GOOD_REQUEST, "id": 'a"\n\u2028ü'})
    assert reply.json()["id"] == 'a"\n\u2028ü'

    stages = [part.split(";")[0].strip() for part in reply.headers["server-timing"].split(",")]
    assert stages == ["receive", "queue", "infer"]
    assert "id" not in post(client, GOOD_REQUEST).json()

    reply = post(client, {**GOOD_REQUEST, "parameters": {"timeout": 1}})
    assert (reply.status_code, reply.headers["x-error-code"]) == (504, "deadline")


def test_json_has_its_own_size_limit(serve_with, onnx_runtime, monkeypatch):
    monkeypatch.setattr(routes, "MAX_JSON_BYTES", 1000)
    client = serve_with(onnx_runtime)
    assert post(client, GOOD_REQUEST).headers["x-error-code"] == "json_too_large"

    binary = {key: value for key, value in ZEROS.items() if key != "data"}
    text = orjson.dumps({"inputs": [{**binary, "parameters": {"binary_data_size": 3072}}]})
    assert (
        post(client, text + bytes(3072), **{LENGTH_HEADER: str(len(text))}).status_code == 200
    )


def test_json_has_the_smallest_number_for_the_logit_of_a_masked_class():
    values = {"logits": np.array([[1.5, -np.inf]], np.float32)}
    text, _ = routes.format_response({}, values, {"logits": False})
    data = np.array(orjson.loads(text)["outputs"][0]["data"], np.float32)
    assert data.tolist() == [1.5, float(np.finfo(np.float32).min)]

    body, headers = routes.format_response({}, values, {"logits": True})
    binary = body[int(headers[routes.HEADER_LENGTH]) :]
    np.testing.assert_equal(np.frombuffer(binary, "<f4"), values["logits"][0])
