"""`/v1/classify` and the status endpoints: responses, headers, parameters and metrics."""

import re
import shutil

import pytest

from sopdeploy.bundle.folder import keep_in_memory, open_bundle
from sopdeploy_service.settings import Settings


def test_a_raw_image_gives_its_classes_best_first(client, jpeg):
    reply = client.post("/v1/classify", content=jpeg, headers={"Content-Type": "image/jpeg"})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    found = probabilities(reply.json())
    assert len(found) == 5
    assert found == sorted(found, reverse=True)
    assert set(reply.json()["classes"][0]) == {"label", "probability"}


@pytest.mark.parametrize("field", ["image", "images", "file", "files"])
def test_a_form_with_one_image_equals_the_raw_image(client, jpeg, field):
    raw = client.post("/v1/classify", content=jpeg)
    assert client.post("/v1/classify", files={field: ("x.jpg", jpeg)}).json() == raw.json()


def labels(result):
    return [entry["label"] for entry in result["classes"]]


def probabilities(result):
    return [entry["probability"] for entry in result["classes"]]


@pytest.mark.parametrize("preamble", [b"", b"\r\n", b"text of RFC 2046\r\n", b"--X\r\n-" * 2000 + b"\r\n"])
def test_a_form_may_have_text_before_and_after_its_parts(client, jpeg, preamble):
    part = b'--XX\r\nContent-Disposition: form-data; name="image"\r\n\r\n%b\r\n--XX--\r\nmore\r\n--XX' % jpeg
    headers = {"Content-Type": "multipart/form-data; boundary=XX"}
    reply = client.post("/v1/classify", content=preamble + part, headers=headers)
    assert (reply.status_code, reply.json()) == (200, client.post("/v1/classify", content=jpeg).json())


def test_a_form_with_several_images_gives_results_in_order(client, make_picture):
    images = [make_picture(color) for color in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    alone = [client.post("/v1/classify", content=image).json() for image in images]
    results = client.post("/v1/classify", files=[("image", image) for image in images]).json()["results"]
    assert [labels(result) for result in results] == [labels(result) for result in alone]
    for together, single in zip(results, alone, strict=True):
        assert probabilities(together) == pytest.approx(probabilities(single), abs=1e-6)


@pytest.mark.parametrize(
    ("query", "listed"),
    [("top_k=3", 3), ("top_k=1000", 7), ("top_k=2&unknown=1", 2), ("gates=0", 5), ("model=t%69ny", 5)],
)
def test_query_parameters_select_classes_and_model(client, jpeg, query, listed):
    assert len(client.post(f"/v1/classify?{query}", content=jpeg).json()["classes"]) == listed


REJECTED = {
    "model=" + "a" * 600: (404, "unknown_model"),
    "version=abc": (404, "unknown_version"),
    "gates=true": (400, "no_gates"),
    "threshold=0.5": (400, "no_thresholds"),
    **dict.fromkeys(
        ["top_k=x", "top_k=0", "top_k=1000001", "top_k=", "gates=perhaps"], (422, "invalid_parameter")
    ),
}


@pytest.mark.parametrize("query", REJECTED)
def test_invalid_parameters_and_unknown_models_and_versions_are_rejected(client, jpeg, query):
    reply = client.post(f"/v1/classify?{query}", content=jpeg)
    assert (reply.status_code, reply.json()["code"]) == REJECTED[query]
    if reply.status_code == 422:
        assert reply.json()["detail"].startswith(f"query.{query.partition('=')[0]}: Input should be")


def test_response_headers_have_bundle_request_id_and_timing(client, jpeg, bundle):
    reply = client.post("/v1/classify", content=jpeg, headers={"X-Request-ID": "abc-1"})
    assert reply.headers["x-model-digest"] == bundle.manifest.id
    assert reply.headers["x-request-id"] == "abc-1"
    stages = [part.split(";")[0].strip() for part in reply.headers["server-timing"].split(",")]
    assert stages == ["receive", "decode", "queue", "infer"]


def test_an_invalid_request_id_is_replaced_by_a_unique_one(client):
    sent = ["", "a b", "x" * 65, "id;drop", "é".encode()]
    ids = {client.get("/livez", headers={"X-Request-ID": value}).headers["x-request-id"] for value in sent}
    assert len(ids) == len(sent)
    assert all(re.fullmatch(r"[0-9a-f]{32}", request_id) for request_id in ids)


def test_health_and_info(client, bundle):
    for path in ("/livez", "/readyz"):
        reply = client.get(path)
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
    (info,) = client.get("/info").json()["models"]
    assert (info["name"], info["bundle"], info["id"]) == ("tiny", bundle.name, bundle.manifest.id)
    assert (info["num_labels"], info["device"], info["largest_batch"]) == (7, "cpu", 4)
    assert info["preprocess"]["crop"] == 32


def test_a_server_says_that_its_bundle_was_deleted(run_server, onnx_runtime, bundle_path, tmp_path, jpeg):
    copy = shutil.copytree(bundle_path, tmp_path / bundle_path.name)
    with run_server(onnx_runtime, keep_in_memory(open_bundle(copy)), Settings()) as client:
        assert client.get("/readyz").json() == {"status": "ok"}
        shutil.rmtree(copy)
        reply = client.get("/readyz")
        reason = f"{copy}: the bundle was deleted; it is served until this process ends"
        assert (reply.status_code, reply.json()) == (200, {"status": "ok", "reason": reason})
        assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_metrics_count_requests_batches_and_rejections(client, jpeg, bundle):
    client.post("/v1/classify", content=jpeg)
    client.post("/v1/classify", content=b"text")
    for number in range(3):
        client.get(f"/nothing/{number}")
    text = client.get("/metrics").text
    stages = ("receive", "decode", "queue", "infer")
    for line in (
        'sopdeploy_requests_total{code="200",model="tiny",route="/v1/classify"}',
        'sopdeploy_rejected_total{reason="not_an_image"}',
        'sopdeploy_request_duration_seconds_count{model="tiny",route="/v1/classify"}',
        'sopdeploy_request_duration_seconds_count{model="",route="other"}',
        'sopdeploy_inference_seconds_count{model="tiny",part="fail"}',
        *(f'sopdeploy_stage_duration_seconds_count{{stage="{stage}"}}' for stage in stages),
        'sopdeploy_batch_size_count{model="tiny"}',
        "sopdeploy_queue_depth 0.0",
        'sopdeploy_runtime_seconds_total{model="tiny"}',
        'sopdeploy_nonfinite_outputs_total{model="tiny"} 0.0',
        f'sopdeploy_bundle_info{{digest="{bundle.manifest.id}"',
        'route="other"',
    ):
        assert line in text, line
    assert "_created" not in text
    assert "/nothing" not in text  # unknown paths share a label: clients cannot grow the metrics
