"""Two sandboxed front ends with an inference process respond and count as one process does.

Both kinds of servers get the same requests. They run images one by one (`max_batch=1`), so outputs are equal
to the last bit.
"""

import base64
import json
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import front_end_failures
import httpx
import numpy as np
import pytest

from sopdeploy.decision import Decision, Rejection
from sopdeploy_service.http.api_keys import new_key
from tests.attacks.test_bad_images import SEEDS
from tests.service.api import test_warnings
from tests.service.bundle_with_outputs import write_bundle_with_outputs
from tests.service.children import FRONT_ENDS, ONE_PROCESS, START_SECONDS, WAYS, ServerClient, serving
from tests.service.conftest import picture_bytes, write_bundle
from tests.service.front_ends import gated_process
from tests.service.raw import GET, connect, post_of, read


class Servers(NamedTuple):
    """A client of each kind of server; `keys` are API keys by name."""

    one: ServerClient
    several: ServerClient
    keys: dict[str, str]


@pytest.fixture(scope="module")
def servers(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    labels = Decision(activation="sigmoid", thresholds=(0.4, 0.6, 0.3, 0.5, 0.5, 0.7, 1.0))
    known = Decision(rejection=Rejection(score="energy", threshold=3.0))
    models = {
        "tiny": bundle_path,
        "labels": write_bundle(folder / "labels", decision=labels),
        "known": write_bundle(folder / "known", decision=known),
        "gated": write_bundle_with_outputs(bundle_path, folder / "gated"),
    }
    file = folder / "keys.toml"
    keys = {
        "user": new_key(file, "user"),
        "limited": new_key(file, "limited", 1e-6),
    }
    file.write_text(file.read_text().replace("burst = 32", "burst = 5"))
    settings = {"max_batch": 1, "keys": file, "max_images": 8}
    options = [word for name, value in settings.items() for word in ("--setting", f"{name}={value}")]
    sources = [f"{name}={path}" for name, path in models.items()]
    with ExitStack() as stack:
        found = [
            stack.enter_context(serving(*sources, *options, *WAYS[way])) for way in (ONE_PROCESS, FRONT_ENDS)
        ]
        for client in found:
            client.headers["x-api-key"] = keys["user"]
        yield Servers(*found, keys)


JPEG = picture_bytes()
TEXT = base64.b64encode(JPEG).decode()
FORM = {
    "files": [("image", ("a", JPEG, "image/jpeg")), ("image", b"no"), ("image", ("b", JPEG, "image/gif"))]
}
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
SHAPED = {"name": "images", "datatype": "UINT8", "shape": [2, 32, 32, 3]}
TENSOR = SHAPED | {"data": PIXELS.ravel().tolist()}
BYTES = {"name": "IMAGE", "datatype": "BYTES", "shape": [1], "data": [TEXT]}
HEAD = json.dumps({"inputs": [SHAPED | {"parameters": {"binary_data_size": PIXELS.size}}]}).encode()
Sent = tuple[str, str, dict[str, Any]]


def image(query: str, body: bytes = JPEG, **headers: str) -> Sent:
    return "POST", f"/v1/classify?model={query}", {"content": body, "headers": headers}


def tensors(model: str, tensor: dict[str, Any], *outputs: str) -> Sent:
    body = {"inputs": [tensor]} | ({"outputs": [{"name": name} for name in outputs]} if outputs else {})
    return "POST", f"/v2/models/{model}/infer", {"json": body}


def damaged(kind: str, number: int) -> bytes:
    """Change a few bytes of an image of *kind* and cut some."""
    rng = random.Random(f"{kind} {number}")  # the same in every run
    body = bytearray(SEEDS[kind])
    for _ in range(rng.randrange(6)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body[: rng.randrange(len(body) // 4, len(body) + 1)])


LABEL_QUERIES = ("", "&top_k=1", "&threshold=0", "&threshold=1", "&threshold=1.5")
PATHS = (
    "/info", "/v2", "/v2/models/gated", "/v2/models/labels/config", "/v2/models/none", "/livez", "/readyz",
    "/v2/health/ready", "/v2/models/tiny/ready", "/openapi.json", "/v1/card?model=gated", "/nothing", "/",
)  # fmt: skip
REQUESTS: dict[str, Sent] = {
    **{f"warnings: {name}": image("tiny", body) for name, (body, _) in test_warnings.CASES.items()},
    **{f"damaged {kind} {n}": image("tiny", damaged(kind, n)) for kind in SEEDS for n in range(2)},
    "another content type": image("tiny", **{"Content-Type": "image/png"}),
    "a form": ("POST", "/v1/classify?model=tiny&top_k=7", FORM),
    "base64": ("POST", "/v1/classify?model=tiny", {"json": {"images": [TEXT, "AAAA"], "top_k": 2}}),
    "an unknown model": image("none"),
    "no model": ("POST", "/v1/classify", {"content": JPEG}),
    **{f"several labels{query}": image(f"labels{query}") for query in LABEL_QUERIES},
    "a threshold without labels": image("tiny&threshold=0.5"),
    "known": image("known"),
    "not known": image("known", picture_bytes((20, 20, 20))),
    "known, and an error": ("POST", "/v1/classify?model=known", FORM),
    "gates": image("gated&gates=1"),
    "gates that are not requested": image("gated"),
    "embeddings of a form": ("POST", "/v1/embed?model=gated", FORM),
    "a model without features": ("POST", "/v1/embed?model=tiny", {"content": JPEG}),
    "a model without gates": image("tiny&gates=true"),
    "a tensor": tensors("gated", TENSOR),
    "a tensor and its embedding": tensors("gated", TENSOR, "gates", "embedding"),
    "a binary tensor": (
        "POST",
        "/v2/models/labels/infer",
        {"content": HEAD + PIXELS.tobytes(), "headers": {"Inference-Header-Content-Length": str(len(HEAD))}},
    ),
    "an image in a tensor": tensors("known", BYTES),
    "a damaged image in a tensor": tensors("known", BYTES | {"data": ["AAAA"]}),
    "too many images": tensors("tiny", TENSOR | {"shape": [9, 32, 32, 3]}),
    "an unknown output": tensors("tiny", TENSOR, "x"),
    **{path: ("GET", path, {}) for path in PATHS},
    "the models": ("POST", "/v2/repository/index", {}),
    "no key": image("tiny", **{"X-Api-Key": ""}),
    "a wrong key": image("tiny", **{"X-Api-Key": "x" * 43}),
}
HEADERS = ("content-type", "x-model-digest", "x-error-code", "retry-after", "www-authenticate", "connection")


def shown(reply: httpx.Response) -> tuple[int, dict[str, str], Any]:
    """Return status, headers and body of *reply*, without the id of its request."""
    headers = {name: reply.headers[name] for name in HEADERS if name in reply.headers}
    body = reply.json() if "json" in headers.get("content-type", "") else reply.text
    if isinstance(body, dict):
        body.pop("request_id", None)
    return reply.status_code, headers, body


@pytest.mark.parametrize("case", REQUESTS)
def test_every_response_is_that_of_one_process(servers: Servers, case: str) -> None:
    method, path, content = REQUESTS[case]
    expected, found = (shown(client.request(method, path, **content)) for client in servers[:2])
    assert found == expected
    assert expected[0] < 500


def test_a_rate_limit_counts_the_images_of_both_front_ends(servers: Servers) -> None:
    key = {"x-api-key": servers.keys["limited"]}
    for client in servers[:2]:
        replies = [client.post("/v1/classify?model=tiny", content=JPEG, headers=key) for _ in range(7)]
        remaining = [reply.headers["ratelimit-remaining"] for reply in replies]
        assert [reply.status_code for reply in replies] == [200] * 5 + [429] * 2
        assert remaining == ["4", "3", "2", "1", "0", "0", "0"]


COUNTED = r"sopdeploy_(?:(?:requests|rejected|unknown_images)_total|batch_size_(?:sum|count))"
SAMPLE = re.compile(rf"^({COUNTED}){{(.*)}} (\S+)$", re.M)


def totals(page: str) -> Counter[tuple[str, frozenset[str]]]:
    """Sum the counters in *page* over the processes."""
    found: Counter[tuple[str, frozenset[str]]] = Counter()
    for name, labels, value in SAMPLE.findall(page):
        kept = frozenset(label for label in labels.split(",") if not label.startswith("process="))
        if 'route="/metrics"' not in kept:
            found[name, kept] += float(value)
    return found


COUNTED_REQUESTS = (
    "a form",
    "known",
    "not known",
    "no model",
    "embeddings of a form",
    "a tensor",
    "/info",
)


def test_sums_of_metrics_over_the_processes_are_those_of_one_process(servers: Servers) -> None:
    changes = []
    for client in servers[:2]:
        before = totals(client.get("/metrics").text)
        for name in COUNTED_REQUESTS:
            method, path, content = REQUESTS[name]
            client.request(method, path, **content)
        page = client.get("/metrics").text
        changes.append(totals(page) - before)
    assert changes[0] == changes[1]
    assert sum(changes[0].values()) > 15
    assert set(re.findall(r'sopdeploy_connections{process="default:(\d)"}', page)) == {"0", "1"}
    names = {"default", "default:0", "default:1", "supervisor"}
    assert set(re.findall(r'^process_cpu_seconds_total{process="(.*?)"}', page, re.M)) == names
    one = servers[0].get("/metrics").text
    assert "\nprocess_resident_memory_bytes " in one
    assert "\nprocess_open_fds " in one


def test_a_drain_completes_the_requests_of_both_front_ends(bundle_path, tmp_path, monkeypatch, until) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setenv("GATE", str(gate))
    options = (*WAYS[FRONT_ENDS], "--setting", "batch_timeout_seconds=60", "--setting", "drain_seconds=60")
    with (
        serving(str(bundle_path), *options, program=gated_process.SERVE) as client,
        ExitStack() as stack,
        ThreadPoolExecutor(16) as pool,
    ):
        late = [stack.enter_context(connect(client)) for _ in range(8)]
        for wire in late:
            wire.sendall(GET + b"\r\n")
            assert read(wire, to_the_end=False).status == 200
        sent = [pool.submit(client.post, "/v1/classify", content=JPEG) for _ in range(16)]
        depth = r"^sopdeploy_queue_depth{.*} (\S+)"
        until(lambda: sum(map(float, re.findall(depth, client.get("/metrics").text, re.M))) == 16)
        client.child.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503)
        late.append(stack.enter_context(connect(client)))
        for wire in late:
            wire.sendall(post_of(JPEG))
            reply = read(wire)
            assert (reply.status, reply.code) == (503, "draining")
        gate.touch()
        assert [reply.result().status_code for reply in sent] == [200] * 16
        assert client.child.wait(START_SECONDS) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_stopped_processes_lose_and_delay_no_more_than_they_may() -> None:
    found = {result.case: result for result in front_end_failures.measure(rounds=50, engine_rounds=3)}
    limits = [result for result in found.values() if result.against == "limit"]
    assert [result for result in limits if result.ours > result.other] == []
    assert len(limits) == 3
    counts = [result for result in found.values() if result.unit in {"", "requests", "connections"}]
    assert {result.case: result.ours for result in counts if result.ours > 0} == {}
    assert len(counts) == 8
    assert found["front end killed: growth of the inference process's memory"].ours < 20
    assert found["front end killed: growth of the supervisor's memory"].ours < 5
