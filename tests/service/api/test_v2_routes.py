"""The protocol over HTTP: every request gets a response in the protocol's form, and never a 5xx."""

import gzip
import tracemalloc
import zlib

import orjson
import pytest

from tests.service.raw import count

INFER = "/v2/models/tiny/infer"
ZEROS = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
GOOD = {"inputs": [ZEROS]}
RAW = orjson.dumps(GOOD)
GZIP = {"Content-Encoding": "gzip"}
LENGTH = "Inference-Header-Content-Length"


def post(client, body, path: str = INFER, **headers: str):
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return client.post(path, content=raw, headers=headers)


BAD_REQUESTS = {
    "an empty body": (b"", {}, 400, "malformed_json"),
    "a header length beyond the body": (GOOD, {LENGTH: "999999"}, 400, "bad_header_length"),
    "a body above the limit": (bytes(1_000_001), {}, 413, "too_large"),
    "another encoding": (GOOD, {"Content-Encoding": "br"}, 415, "unsupported_encoding"),
    "two encodings": (GOOD, {"Content-Encoding": "gzip, gzip"}, 415, "unsupported_encoding"),
    "no gzip": (GOOD, GZIP, 400, "bad_encoding"),
    "raw deflate": (zlib.compress(RAW)[2:-4], {"Content-Encoding": "deflate"}, 400, "bad_encoding"),
    "half a stream": (gzip.compress(RAW)[:-9], {"Content-Encoding": "gzip"}, 400, "bad_encoding"),
    "an empty stream": (b"", {"Content-Encoding": "gzip"}, 400, "bad_encoding"),
    "bytes after a stream": (gzip.compress(RAW) + b"x", {"Content-Encoding": "gzip"}, 400, "bad_encoding"),
    "two streams": (gzip.compress(RAW) * 2, {"Content-Encoding": "gzip"}, 400, "bad_encoding"),
    "a bomb": (gzip.compress(bytes(1_000_001)), {"Content-Encoding": "gzip"}, 413, "too_large"),
    "an invalid timeout": (GOOD, {"X-Request-Timeout-Ms": "-5"}, 400, "invalid_timeout"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_gets_an_error_object_and_its_code_in_a_header(client, case):
    body, headers, status, code = BAD_REQUESTS[case]
    reply = post(client, body, **headers)
    assert (reply.status_code, reply.headers["x-error-code"]) == (status, code)
    assert list(reply.json()) == ["error"]
    assert post(client, GOOD).status_code == 200


def test_a_bomb_costs_no_more_memory_than_the_limit(client):
    body = zlib.compress(bytes(200_000_000), 9)  # 194 kB; the limit of this server is 1 MB
    post(client, body, **{"Content-Encoding": "deflate"})  # imports and caches
    tracemalloc.start()
    reply = post(client, body, **{"Content-Encoding": "deflate"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (reply.status_code, reply.headers["x-error-code"]) == (413, "too_large")
    assert peak < 3_000_000
    assert count(client, "upload_bytes") == 0


def test_a_body_of_empty_blocks_ends_at_the_limit(client):
    stream = zlib.compressobj(wbits=31)
    body = stream.compress(b"") + b"".join(stream.flush(zlib.Z_FULL_FLUSH) for _ in range(4))
    empty = b"\0\0\0\xff\xff"  # a stored block of 0 bytes
    reply = client.post(INFER, content=iter([body, empty * 100_000, empty * 100_001]), headers=GZIP)
    assert (reply.status_code, reply.headers["x-error-code"]) == (413, "too_large")


MISSING = {
    ("GET", "/v2/models/other"): (404, "unknown_model"),
    ("GET", "/v2/models/tiny/versions/1"): (404, "unknown_version"),
    ("POST", "/v2/models/other/infer"): (404, "unknown_model"),
    ("POST", "/v2/models/..%2ftiny/infer"): (404, "not_found"),
    ("GET", "/v2/models/tiny/infer"): (405, "method_not_allowed"),
    ("GET", "/v2/logging"): (404, "not_found"),
}


@pytest.mark.parametrize("target", MISSING, ids=" ".join)
def test_missing_resources_get_an_error_object(client, target):
    reply = client.request(*target)
    assert (reply.status_code, reply.headers["x-error-code"]) == MISSING[target]
    assert list(reply.json()) == ["error"]


def test_the_current_version_can_also_be_named(client, bundle):
    for suffix in ("", "/ready", "/infer"):
        method, body = ("POST", orjson.dumps(GOOD)) if suffix == "/infer" else ("GET", None)
        both = [
            client.request(method, f"/v2/models/tiny{version}{suffix}", content=body)
            for version in ("", f"/versions/{bundle.manifest.id}")
        ]
        assert both[0].status_code == both[1].status_code == 200
        assert both[0].json() == both[1].json()
        assert both[0].headers["x-model-digest"] == bundle.manifest.id


def test_a_response_has_timings_and_echoes_any_id(client):
    reply = post(client, {**GOOD, "id": 'a"\n\u2028ü'})
    assert reply.json()["id"] == 'a"\n\u2028ü'
    stages = [part.split(";")[0].strip() for part in reply.headers["server-timing"].split(",")]
    assert stages == ["receive", "queue", "infer"]
    assert "id" not in post(client, GOOD).json()


def test_the_timeout_parameter_is_a_deadline(client):
    reply = post(client, {**GOOD, "parameters": {"timeout": 1}})
    assert (reply.status_code, reply.headers["x-error-code"]) == (504, "deadline")


def test_json_has_its_own_size_limit(serve_with, onnx_runtime):
    client = serve_with(onnx_runtime, max_json_bytes=1000)
    assert post(client, GOOD).headers["x-error-code"] == "json_too_large"
    binary = {key: value for key, value in ZEROS.items() if key != "data"}
    text = orjson.dumps({"inputs": [{**binary, "parameters": {"binary_data_size": 3072}}]})
    assert post(client, text + bytes(3072), **{LENGTH: str(len(text))}).status_code == 200
