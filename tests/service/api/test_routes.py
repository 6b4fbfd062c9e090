"""`/v1/classify` and the status endpoints: responses, warnings, the card and metrics."""

import base64
import hashlib
import re
import threading
from dataclasses import replace

import pytest
from PIL import Image

from sopdeploy.base.files import read_file
from sopdeploy.images.limits import describe_formats
from sopdeploy_commands.predict import predict
from sopdeploy_service.api import web
from sopdeploy_service.api.status import read_card
from sopdeploy_service.api.web import DOCS, INDEX
from sopdeploy_service.http.api_keys import new_key
from tests.support.fake_runtime import FakeRuntime
from tests.support.pictures import encoded
from tests.support.service import CARD, wait_for


def test_a_raw_image_gives_its_classes_best_first(client, jpeg, bundle):
    headers = {"Content-Type": "image/jpeg", "X-Request-ID": "abc-1"}
    reply = client.post("/v1/classify", content=jpeg, headers=headers)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    assert reply.headers["x-model-digest"] == bundle.manifest.id
    assert reply.headers["x-request-id"] == "abc-1"

    stages = [part.split(";")[0].strip() for part in reply.headers["server-timing"].split(",")]
    assert stages == ["receive", "decode_queue", "decode", "queue", "infer"]
    found = probabilities(reply.json())
    assert len(found) == 5
    assert found == sorted(found, reverse=True)
    assert set(reply.json()["classes"][0]) == {"label", "probability"}


def probabilities(result):
    return [entry["probability"] for entry in result["classes"]]


def test_a_form_with_one_image_equals_the_raw_image(client, jpeg):
    raw = client.post("/v1/classify", content=jpeg).json()
    for field in ("image", "images", "file", "files"):
        assert client.post("/v1/classify", files={field: ("x.jpg", jpeg)}).json() == raw

    part = (
        b'--XX\r\nContent-Disposition: form-data; name="image"\r\n\r\n%b\r\n--XX--\r\nmore\r\n--XX'
        % jpeg
    )
    headers = {"Content-Type": "multipart/form-data; boundary=XX"}

    for preamble in (b"", b"\r\n", b"text of RFC 2046\r\n", b"--X\r\n-" * 2000 + b"\r\n"):
        assert (
            client.post("/v1/classify", content=preamble + part, headers=headers).json() == raw
        )


@pytest.mark.parametrize(
    ("query", "listed"), [("top_k=3", 3), ("top_k=1000", 7), ("model=t%69ny", 5)]
)
def test_query_parameters_select_classes_and_model(client, jpeg, query, listed):
    assert len(client.post(f"/v1/classify?{query}", content=jpeg).json()["classes"]) == listed


REJECTED = {
    "model=" + "a" * 600: (404, "unknown_model"),
    "version=abc": (404, "unknown_version"),
    "threshold=0.5": (400, "no_thresholds"),
    "reported=": (400, "not_keeping"),
    **dict.fromkeys(
        ["top_k=x", "top_k=0", "top_k=1000001", "top_k="], (422, "invalid_parameter")
    ),
}


@pytest.mark.parametrize("query", REJECTED)
def test_invalid_parameters_and_unknown_models_and_versions_are_rejected(client, jpeg, query):
    reply = client.post(f"/v1/classify?{query}", content=jpeg)
    assert (reply.status_code, reply.json()["code"]) == REJECTED[query]

    if reply.status_code == 422:
        assert reply.json()["detail"].startswith(f"query.{query.partition('=')[0]}: ")


@pytest.mark.parametrize("query", ["threshold=0.5", "reported="])
def test_a_parameter_that_does_not_apply_is_rejected_also_in_a_form(client, jpeg, query):
    name, _, value = query.partition("=")
    reply = client.post("/v1/classify", data={name: value}, files={"image": ("x.jpg", jpeg)})

    assert (reply.status_code, reply.json()["code"]) == REJECTED[query]


def test_an_invalid_request_id_is_replaced_by_a_unique_one(client):
    sent = ["", "a b", "x" * 65, "id;drop", "é".encode()]
    ids = {
        client.get("/livez", headers={"X-Request-ID": value}).headers["x-request-id"]
        for value in sent
    }

    assert len(ids) == len(sent)
    assert all(re.fullmatch(r"[0-9a-f]{32}", request_id) for request_id in ids)


def test_health_and_info(client, bundle):
    for path in ("/livez", "/readyz"):
        reply = client.get(path)
        assert reply.status_code == 200
        assert reply.json() == {"status": "ok"}

    (info,) = client.get("/info").json()["models"]
    assert info["name"] == "tiny"
    assert info["bundle"] == bundle.name
    assert info["id"] == bundle.manifest.id
    assert info["num_labels"] == 7
    assert info["device"] == "cpu"
    assert info["largest_batch"] == 4
    assert info["preprocess"]["crop"] == 32


def test_an_example_is_read_once_and_costs_a_key_one_image(
    serve_with, jpeg, tmp_path, monkeypatch
):
    content = jpeg + bytes(2 * web.PIECE_BYTES)
    num_reads = []

    def read_once(path, limit):
        num_reads.append(path)
        if len(num_reads) == 1:
            raise OSError
        return read_file(path, limit)

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(content)
    keys = tmp_path / "keys.toml"
    secret = new_key(keys, "page", 0.01)
    keys.write_text(keys.read_text().replace("burst = 64", "burst = 3"))
    monkeypatch.setattr(web, "read_file", read_once)
    client = serve_with(FakeRuntime(num_classes=7), examples=tmp_path / "images", keys=keys)
    headers = {"x-api-key": secret}

    assert client.get("/examples/1", headers=headers).status_code == 404  # of one example
    replies = [client.get("/examples/0", headers=headers) for _ in range(4)]
    assert [reply.status_code for reply in replies] == [404, 200, 200, 429]
    assert [reply.content == content for reply in replies[1:3]] == [True, True]
    assert len(num_reads) == 2


def test_an_example_on_a_disk_that_hangs_holds_no_request(
    serve_with, jpeg, tmp_path, monkeypatch
):
    released = threading.Event()

    def hang(*_given):
        assert released.wait(60)
        return b""

    (tmp_path / "a.jpg").write_bytes(jpeg)
    client = serve_with(FakeRuntime(num_classes=7), examples=tmp_path)
    monkeypatch.setattr(web, "read_file", hang)
    monkeypatch.setattr(web, "EXAMPLE_SECONDS", 0.01)

    assert client.get("/examples/0").status_code == 404
    wait_for(lambda: client.app.state.service.active_requests == 0)
    released.set()


def test_metrics_count_requests_batches_and_rejections(client, jpeg, bundle):
    client.post("/v1/classify", content=jpeg, headers={"X-Request-Attempt": "2"})
    client.post("/v1/classify", content=b"text")
    for number in range(3):
        client.get(f"/nothing/{number}")
    text = client.get("/metrics").text
    stages = ("receive", "decode_queue", "decode", "queue", "infer")

    for line in (
        'sopdeploy_requests_total{code="200",model="tiny",reason="",route="/v1/classify"}',
        'sopdeploy_requests_total{code="415",model="tiny",reason="not_an_image",route="/v1/classify"}',
        'sopdeploy_attempts_total{attempt="2"} 1.0',
        'sopdeploy_rejected_total{reason="not_an_image"}',
        'sopdeploy_request_duration_seconds_count{model="tiny",route="/v1/classify",status="2xx"}',
        'sopdeploy_request_duration_seconds_count{model="",route="other",status="4xx"}',
        *(f'sopdeploy_stage_duration_seconds_count{{stage="{stage}"}}' for stage in stages),
        'sopdeploy_batch_size_count{model="tiny"}',
        "sopdeploy_queue_depth 0.0",
        'sopdeploy_runtime_seconds_total{model="tiny"}',
        f'sopdeploy_bundle_info{{digest="{bundle.manifest.id}"',
        'route="other"',
    ):
        assert line in text, line

    # The description of the metric names the stages that are observed.
    (described,) = re.findall(r"^# HELP sopdeploy_stage_duration_seconds .*?: (.*)", text, re.M)
    observed = re.findall(r'^sopdeploy_stage_duration_seconds_count\{stage="(\w+)"', text, re.M)
    assert {*re.sub(r" \(.*?\)", "", described).split(", ")} == {*observed} == {*stages}

    assert "_created" not in text
    # Unknown paths share a label: clients cannot grow the metrics
    assert "/nothing" not in text


def test_each_image_has_its_own_warnings(client, jpeg, bundle_path, tmp_path):
    plain = Image.new("RGB", (48, 40), (200, 30, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    animated = encoded(
        plain, "GIF", save_all=True, append_images=[Image.new("RGB", (48, 40), (0, 0, 99))]
    )
    rotated = encoded(plain, "JPEG", exif=exif)
    several = ["first_frame_only"]
    expected = {jpeg: [], rotated: ["exif_rotated"], animated: several, animated[:-40]: several}
    paths = [tmp_path / str(number) for number in range(len(expected))]
    for path, body in zip(paths, expected, strict=True):
        path.write_bytes(body)
    results = client.post("/v1/classify", files=[("image", body) for body in expected]).json()[
        "results"
    ]

    assert [entry["warnings"] for entry in results] == list(expected.values())

    found = predict(bundle_path, paths, threads=1)
    assert [list(entry.warnings) for entry in found] == list(expected.values())


def test_the_card_has_readme_and_certificate_of_the_bundle(carded_client, carded_bundle):
    card = carded_client.get("/v1/card").json()
    assert card["text"].startswith("# tiny\n")
    assert card["bundle"] == carded_bundle.name
    counts = {
        "num_removed": 1,
        "bytes_removed": 8,
        "num_kept": 2,
        "num_operations": 3,
        "num_images": 12,
    }
    compared = ["trained", "detached", "plain"]

    assert card["certificate"] == {
        "proof": "three-way", "compared": compared, "detached": ["gate.noise"], "root": "4" * 64,
        "onnx_root": "6" * 64, **counts,
    }  # fmt: skip

    reply = carded_client.get("/v1/card?model=other")
    assert (reply.status_code, reply.json()["code"]) == (404, "unknown_model")


def test_the_card_is_of_the_files_that_were_read(carded_bundle, tmp_path):
    card = read_card(replace(carded_bundle, path=tmp_path / "deleted"))
    assert card.text == CARD
    assert card.certificate is not None

    empty = read_card(replace(carded_bundle, contents={}))
    assert empty.text == ""
    assert empty.certificate is None


@pytest.mark.parametrize(("path", "page"), [("/", INDEX), ("/docs", DOCS)])
def test_the_content_security_policy_allows_exactly_the_inline_scripts(client, path, page):
    reply = client.get(path)
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"

    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    inline = re.findall(r"<(style|script)>(.*?)</\1>", reply.text, re.DOTALL)
    sources = re.findall(r"<(?:script|link)[^>]* (?:src|href)=\"(?!data:)([^\"]*)", reply.text)

    assert sources == (
        ["docs/swagger-ui.css", "docs/swagger-ui-bundle.js"] if path == "/docs" else []
    )
    assert len(inline) == reply.text.count("<style") + reply.text.count("<script>")

    for _, text in inline:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert not re.search(r"\son\w+=|\sstyle=|javascript:|(src|href)=\"(https?:)?//", reply.text)
    assert reply.text == page.html.replace("{formats}", describe_formats(last_word="or"))


@pytest.mark.parametrize(
    ("body", "status"), [("image", 200), ("empty", 400), ("text", 415), ("form", 422)]
)
def test_a_request_without_a_query_is_answered_as_one_with_a_query(client, jpeg, body, status):
    form = b'--XX\r\nContent-Disposition: form-data; name="top_k"\r\n\r\nmany\r\n--XX\r\n'
    image = b'Content-Disposition: form-data; name="image"\r\n\r\n%b\r\n--XX--\r\n' % jpeg
    content = {"image": jpeg, "empty": b"", "text": b"no image", "form": form + image}[body]
    kind = "multipart/form-data; boundary=XX" if body == "form" else "image/jpeg"
    headers = {"Content-Type": kind, "X-Request-ID": "abc-1"}

    def count_requests():
        page = client.get("/metrics").text
        name = rf'sopdeploy_requests_total{{.*code="{status}".*route="/v1/classify".*}} (\S+)'
        return sum(float(count) for count in re.findall(name, page))

    before = count_requests()
    direct = client.post("/v1/classify", content=content, headers=headers)
    routed = client.post("/v1/classify?utm_source=mail", content=content, headers=headers)
    assert direct.status_code == routed.status_code == status
    assert direct.json() == routed.json()
    assert set(direct.headers) == set(routed.headers)
    assert count_requests() == before + 2
