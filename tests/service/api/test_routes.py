import orjson
import pytest


def test_a_raw_image_gets_its_classes_best_first(client, jpeg):
    reply = client.post("/v1/classify", content=jpeg, headers={"Content-Type": "image/jpeg"})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    found = [entry["probability"] for entry in reply.json()["classes"]]
    assert len(found) == 5
    assert found == sorted(found, reverse=True)
    assert set(reply.json()["classes"][0]) == {"label", "probability"}


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_wrong_content_type_does_not_matter(client, jpeg, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    assert client.post("/v1/classify", content=jpeg, headers=headers).status_code == 200


@pytest.mark.parametrize("field", ["image", "images", "file", "files"])
def test_a_form_with_one_image_is_answered_like_the_raw_image(client, jpeg, field):
    raw = client.post("/v1/classify", content=jpeg)
    form = client.post("/v1/classify", files={field: ("x.jpg", jpeg)})
    assert form.json() == raw.json()


def test_a_form_with_several_images_is_answered_in_order(client, make_picture):
    pictures = [make_picture(colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    alone = [client.post("/v1/classify", content=picture).json() for picture in pictures]
    together = client.post("/v1/classify", files=[("image", picture) for picture in pictures])
    results = together.json()["results"]
    assert [labels(entry) for entry in results] == [labels(entry) for entry in alone]
    for entry, lone in zip(results, alone, strict=True):
        assert probabilities(entry) == pytest.approx(probabilities(lone), abs=1e-6)


def labels(answer):
    return [entry["label"] for entry in answer["classes"]]


def probabilities(answer):
    return [entry["probability"] for entry in answer["classes"]]


def test_a_bad_image_among_several_has_an_error_in_its_place(client, jpeg):
    files = [("image", jpeg), ("image", b"no image"), ("image", jpeg)]
    reply = client.post("/v1/classify", files=files)
    assert reply.status_code == 200
    first, bad, last = reply.json()["results"]
    assert labels(first) == labels(last)
    assert (bad["error"]["code"], bad["error"]["status"]) == ("not_an_image", 415)


@pytest.mark.parametrize(("top_k", "classes"), [(1, 1), (3, 3), (7, 7), (1000, 7)])
def test_top_k_says_how_many_classes_come(client, jpeg, top_k, classes):
    reply = client.post(f"/v1/classify?top_k={top_k}", content=jpeg)
    assert len(reply.json()["classes"]) == classes


@pytest.mark.parametrize("top_k", ["0", "-1", "many", "1e3", "99999999999999999999"])
def test_a_wrong_top_k_is_refused_by_name(client, jpeg, top_k):
    reply = client.post(f"/v1/classify?top_k={top_k}", content=jpeg)
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_parameter")
    assert "top_k" in reply.json()["detail"]


def test_every_answer_names_the_bundle_the_request_and_where_the_time_went(client, jpeg, bundle):
    reply = client.post("/v1/classify", content=jpeg, headers={"X-Request-ID": "abc-1"})
    assert reply.headers["x-model-digest"] == bundle.manifest.id
    assert reply.headers["x-request-id"] == "abc-1"
    stages = [part.split(";")[0].strip() for part in reply.headers["server-timing"].split(",")]
    assert stages == ["receive", "decode", "queue", "infer"]


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "id;drop", "é".encode()])
def test_a_harmful_request_id_is_replaced(client, sent):
    found = client.get("/livez", headers={"X-Request-ID": sent}).headers["x-request-id"]
    assert len(found) == 32
    assert found.isalnum()


def test_the_health_pages_say_ok_while_images_are_answered(client):
    for path in ("/livez", "/readyz"):
        reply = client.get(path)
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


def test_info_says_which_network_answers(client, bundle):
    (info,) = client.get("/info").json()["models"]
    assert info["name"] == "tiny"
    assert (info["bundle"], info["id"]) == (bundle.name, bundle.manifest.id)
    assert (info["labels"], info["device"]) == (7, "cpu")
    assert info["preprocess"]["crop"] == 32
    assert info["largest_batch"] == 4


def test_the_metrics_count_requests_batches_and_refusals(client, jpeg, bundle):
    client.post("/v1/classify", content=jpeg)
    client.post("/v1/classify", content=b"text")
    text = client.get("/metrics").text
    for line in (
        'sopdeploy_requests_total{code="200",model="tiny",route="/v1/classify"}',
        'sopdeploy_rejected_total{reason="not_an_image"}',
        'sopdeploy_request_duration_seconds_count{route="/v1/classify"}',
        *(
            f'sopdeploy_stage_duration_seconds_count{{stage="{stage}"}}'
            for stage in ("receive", "decode", "queue", "infer")
        ),
        'sopdeploy_batch_size_count{model="tiny"}',
        "sopdeploy_queue_depth 0.0",
        "sopdeploy_engine_busy_ratio",
        'sopdeploy_nonfinite_outputs_total{model="tiny"} 0.0',
        f'sopdeploy_bundle_info{{digest="{bundle.manifest.id}"',
    ):
        assert line in text, line


def test_unknown_paths_share_one_label_so_clients_cannot_grow_the_metrics(client):
    for number in range(3):
        client.get(f"/nothing/{number}")
    text = client.get("/metrics").text
    assert "/nothing" not in text
    assert 'route="other"' in text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/classify/", 404, "not_found"),
        ("GET", "/v1/classify", 405, "method_not_allowed"),
        ("POST", "/readyz", 405, "method_not_allowed"),
    ],
)
def test_wrong_paths_and_methods_are_problems_too(client, method, path, status, code):
    reply = client.request(method, path)
    assert reply.headers["content-type"] == "application/problem+json"
    assert set(reply.json()) == {"type", "title", "status", "code", "detail"}
    assert (reply.status_code, reply.json()["status"], reply.json()["code"]) == (status, status, code)


def test_the_api_describes_itself(client):
    paths = orjson.loads(client.get("/openapi.json").content)["paths"]
    assert set(paths["/v1/classify"]["post"]["requestBody"]["content"]) == {
        "image/*",
        "multipart/form-data",
        "application/json",
    }
    assert client.get("/docs").status_code == 200


def test_two_servers_in_one_process_do_not_share_metrics(serve_with, onnx_runtime, jpeg):
    first, second = serve_with(onnx_runtime), serve_with(onnx_runtime)
    first.post("/v1/classify", content=jpeg)
    assert 'route="/v1/classify"' in first.get("/metrics").text
    assert 'route="/v1/classify"' not in second.get("/metrics").text
