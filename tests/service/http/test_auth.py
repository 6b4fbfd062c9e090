"""API keys, authentication and rate limits; the memory budget of bodies; disconnected clients."""

import asyncio
import errno
import hashlib
import itertools
import math
import os
import socket
import stat
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sopdeploy.errors import ConfigError
from sopdeploy_commands.app import app as cli
from sopdeploy_service.api import admission
from sopdeploy_service.app import create_app
from sopdeploy_service.http import api_keys
from sopdeploy_service.http.api_keys import (
    Key,
    KeyRing,
    TokenBucket,
    file_identity,
    find_key,
    new_key,
    read_again,
    read_keys,
)
from sopdeploy_service.inference import decoders
from sopdeploy_service.inference.results import RejectedError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.draining_server import DrainingServer
from sopdeploy_service.server.lifetime import Joined
from sopdeploy_service.settings import Settings
from tests.support.fake_runtime import FakeRuntime
from tests.support.raw import EXPECT, POST, connect, count, post_of, read
from tests.support.runtimes import Held
from tests.support.service import wait_for

DIGEST = hashlib.sha256(b"secret").hexdigest()


def entry(name: str = "app", sha256: str = DIGEST, more: str = "") -> str:
    return f'[[key]]\nname = "{name}"\nsha256 = "{sha256}"\n{more}\n'


def test_the_file_keeps_what_it_had_and_hashes_a_new_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    first = new_key(path, "phone", 10.0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# ours\n" + path.read_text())
    second = new_key(path, "ops")
    before = path.read_text()

    assert before.startswith("# ours\n")
    assert first != second
    assert first not in before
    assert list(tmp_path.iterdir()) == [path]
    for name in ("ops", "a b", ""):
        with pytest.raises(ConfigError):
            new_key(path, name)

    assert path.read_text() == before
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in (first, second)]
    phone, ops = read_keys(path)
    assert phone == Key(name="phone", sha256=digests[0], rate=10.0)
    assert ops.name == "ops"
    assert ops.sha256 == digests[1]
    assert ops.rate is None

    sent = (first.encode(), second.encode(), first.encode() + b" ", b"")
    assert [find_key((phone, ops), key) for key in sent] == [phone, ops, None, None]


def test_keys_that_are_created_at_the_same_time_are_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = threading.Thread(target=new_key, args=(tmp_path / "keys.toml", "other"))

    def meanwhile(*_given: object, **_options: object) -> None:  # between reading and writing
        monkeypatch.undo()
        other.start()
        other.join(0.5)  # it waits for this thread, or would be done

    new_key(tmp_path / "keys.toml", "first")
    monkeypatch.setattr(os, "chown", meanwhile)
    new_key(tmp_path / "keys.toml", "second")
    other.join()
    assert {key.name for key in read_keys(tmp_path / "keys.toml")} == {
        "first",
        "second",
        "other",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[key", "not TOML"),
        (entry() + entry(), "name app"),
        (entry() + entry("b"), "sha256"),
        (entry(sha256="abc"), "key.0.sha256"),
        (entry(more="rate = 0"), "key.0.rate"),
        (entry(more='secret = "x"'), "key.0.secret: "),
    ],
)
def test_an_invalid_key_file_is_a_one_line_error(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(ConfigError, match="`sopdeploy key` creates"):
        read_keys(path)

    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys(path)
    assert "\n" not in str(caught.value)


def test_a_server_does_not_start_without_a_key_in_its_file(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").touch()
    with pytest.raises(ConfigError, match="has no key"):
        create_app({}, Settings(keys=tmp_path / "keys.toml"))


def test_the_command_prints_only_the_key_on_stdout(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    done = CliRunner().invoke(cli, ["key", "lab", "--keys", str(path), "--rate", "5"])
    assert done.exit_code == 0

    found = find_key(read_keys(path), done.stdout.strip().encode())
    assert found is not None
    assert (found.name, found.rate) == ("lab", 5.0)

    again = CliRunner().invoke(cli, ["key", "lab", "--keys", str(path)])
    assert again.exit_code == 2
    assert "another name" in again.stderr


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Keys by name, and the path of their file as `path`."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    made = {
        "free": new_key(path, "free"),
        "four": new_key(path, "four", 0.5),
        "path": str(path),
    }
    path.write_text(path.read_text().replace("burst = 64", "burst = 4"))
    return made


@pytest.fixture
def locked(serve_with, keys: dict[str, str]) -> httpx.Client:
    return serve_with(FakeRuntime(num_classes=7), keys=keys["path"])


def test_requests_without_a_key_are_401_except_probes_metrics_and_pages(
    locked, keys, jpeg
) -> None:
    replies = [locked.post("/v1/classify", content=jpeg)]
    replies += map(locked.get, ("/info", "/nothing", "/openapi.json"))
    for reply in replies:
        assert (reply.status_code, reply.json()["code"]) == (401, "unauthenticated")
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.headers["www-authenticate"].startswith("Bearer")
        assert reply.headers["x-request-id"]

    open_paths = ("/livez", "/readyz", "/metrics", "/", "/docs")
    assert [locked.get(path).status_code for path in open_paths] == [200] * 5
    assert 'rejected_total{reason="unauthenticated"} 4.0' in locked.get("/metrics").text
    key = keys["free"].encode()

    for headers, status in (
        ({b"Authorization": b"bearer  " + key}, 200),
        ({b"Authorization": b"Basic abc", b"X-API-Key": key}, 200),
        ({b"Authorization": b"Bearer"}, 401),
        ({b"Authorization": b"Bearer \xfcml\xe4ut"}, 401),
    ):
        assert (
            locked.post("/v1/classify", content=jpeg, headers=headers).status_code == status
        ), headers


FOREIGN = {
    "a name that resolves to this address": {"host": "attacker.example"},
    "a page of another host": {"origin": "https://attacker.example"},
    "a page of another port": {"origin": "http://127.0.0.1:1"},
    "an image in a page of another host": {"sec-fetch-site": "cross-site"},
}


def test_on_loopback_without_keys_foreign_pages_are_refused(serve_with, keys, jpeg) -> None:
    client = serve_with(FakeRuntime(num_classes=7))
    others = serve_with(FakeRuntime(num_classes=7), host="0.0.0.0")  # noqa: S104
    with_keys = serve_with(FakeRuntime(num_classes=7), keys=keys["path"])
    own = {"origin": str(client.base_url).rstrip("/"), "sec-fetch-site": "same-origin"}

    assert client.post("/v1/classify", content=jpeg, headers=own).status_code == 200
    for foreign in FOREIGN.values():
        for path in ("/v1/classify", "/metrics", "/v1/card", "/info"):
            method = "POST" if path == "/v1/classify" else "GET"
            refused = client.request(method, path, content=jpeg, headers=foreign)
            assert (refused.status_code, refused.json()["code"]) == (403, "foreign_request")
        assert client.get("/readyz", headers=foreign).status_code == 200
        for server in (others, with_keys):
            headers = {**foreign, "x-api-key": keys["free"]}
            assert server.post("/v1/classify", content=jpeg, headers=headers).status_code == 200


def test_the_rate_limit_counts_every_image_and_tells_when_to_retry(
    locked, keys, jpeg, monkeypatch
) -> None:
    now = float(math.ceil(time.monotonic()))  # exact sums, whatever the uptime
    monkeypatch.setattr(api_keys, "time", SimpleNamespace(monotonic=lambda: now))
    mine = {"x-api-key": keys["four"]}

    def post(images: int, headers: dict[str, str] = mine) -> httpx.Response:
        return locked.post("/v1/classify", files=[("image", jpeg)] * images, headers=headers)

    large = post(5)
    assert (large.status_code, large.json()["code"]) == (400, "too_many_images")
    assert "(4)" in large.json()["detail"]
    now += 2  # as long as one image: the work on a request that is refused
    form = post(3)
    assert form.status_code == 200
    assert (form.headers["ratelimit-limit"], form.headers["ratelimit-remaining"]) == ("4", "1")
    assert form.headers["ratelimit-reset"] == "6"
    rejected = post(3)
    assert (rejected.status_code, rejected.json()["code"]) == (429, "rate_limited")
    assert rejected.headers["retry-after"] == "4"
    assert rejected.headers["ratelimit-remaining"] == "1"
    assert [post(1).status_code, post(1).status_code] == [200, 429]
    other = post(1, {"x-api-key": keys["free"]})
    assert other.status_code == 200
    assert "ratelimit-limit" not in other.headers


JSON = {"content-type": "application/json"}
V2 = "/v2/models/tiny/infer"
LENGTH = "inference-header-content-length"
TENSOR = b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [%b]}]}'
# Path, headers, body: tokens that it costs
REFUSED = {
    "no JSON": ((V2, {}, b"{{{{"), 1),
    "one long text among numbers": (
        (V2, {}, TENSOR % (b'"a",' * 3071 + b'"%b"' % (b"a" * 3_000_000))),
        4,
    ),
    "a million inputs": ((V2, {}, b'{"inputs": [' + b"0," * 999_999 + b"0]}"), 3),
    "a wrong header": ((V2, {LENGTH: "x"}, b"{}"), 1),
    "too many numbers": (
        ("/v1/classify", JSON, b'{"images": [' + b"0," * 1_500_000 + b"0]}"),
        4,
    ),
    "no image in a form": (
        ("/v1/classify", {"content-type": "multipart/form-data; boundary=X"}, b"--X--"),
        1,
    ),
    "no features": (("/v1/embed", {}, b"x" * 2_000_000), 1),  # the body is not read
    "compressed": (("/v1/classify", {"content-encoding": "gzip"}, b"x" * 2_000_000), 1),
    "a deadline during the parsing": (
        (V2, {"x-request-timeout-ms": "1"}, b"[" * 2_000_000),
        None,
    ),
    "an image that cannot be decoded": (("/v1/classify", {}, b"BM" + bytes(2_000_000)), 1),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_work_costs_tokens(serve_with, tmp_path, monkeypatch, case) -> None:
    now = float(math.ceil(time.monotonic()))  # exact sums, whatever the uptime
    monkeypatch.setattr(api_keys, "time", SimpleNamespace(monotonic=lambda: now))
    secret = new_key(tmp_path / "keys.toml", "app", 1.0)
    client = serve_with(FakeRuntime(num_classes=7), keys=tmp_path / "keys.toml")
    (path, headers, body), cost = REFUSED[case]
    reply = client.post(path, content=body, headers={**headers, "x-api-key": secret})

    assert 400 <= reply.status_code < 600

    left = int(reply.headers["ratelimit-remaining"])
    assert left < 64 if cost is None else left == 64 - cost


def test_a_key_without_tokens_pays_for_refused_work_first(
    serve_with, tmp_path, monkeypatch, jpeg
) -> None:
    now = float(math.ceil(time.monotonic()))  # exact sums, whatever the uptime
    monkeypatch.setattr(api_keys, "time", SimpleNamespace(monotonic=lambda: now))
    secret = new_key(tmp_path / "keys.toml", "app", 1.0)
    text = (tmp_path / "keys.toml").read_text()
    (tmp_path / "keys.toml").write_text(text.replace("burst = 64", "burst = 4"))
    client = serve_with(FakeRuntime(num_classes=7), keys=tmp_path / "keys.toml")
    two = [("image", jpeg), ("image", bytes(3_500_000))]
    mine = {"x-api-key": secret}

    # The key has 4 tokens. After reading 5.5 MB that are not JSON it owes 2, so it has 1 after 3 s.
    assert (
        client.post(V2, content=b"{" * 5_500_000, headers=mine).headers["ratelimit-remaining"]
        == "0"
    )

    refused = client.post("/v1/classify", content=jpeg, headers=mine)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")

    # One token is too few for a form of two images, and reading it costs 3: it owes 2 again.
    now += 3
    assert client.post("/v1/classify", files=two, headers=mine).status_code == 429
    assert client.post("/v1/classify", content=jpeg, headers=mine).headers["retry-after"] == "3"

    # After 4 s it has 2, which pay for both images.
    now += 4
    assert client.post("/v1/classify", files=two, headers=mine).status_code == 200


@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0, 30)), max_size=40), st.floats(0.1, 50)
)
def test_no_sequence_of_requests_gets_more_than_burst_plus_rate_times_time(steps, rate) -> None:
    with pytest.MonkeyPatch.context() as patch:
        now = 1000.0
        patch.setattr(api_keys, "time", SimpleNamespace(monotonic=lambda: now))
        bucket = TokenBucket(rate, 8, [0.0, 0.0])
        taken = 0
        began = now

        for images, pause in steps:
            try:
                bucket.spend(images)
                taken += images
            except RejectedError as problem:
                if problem.reason.retry_after is not None:
                    now += problem.reason.retry_after
                    bucket.spend(images, check_only=True)  # the announced time is sufficient
            assert taken <= 8 + rate * (now - began) + 1e-6
            now += pause
            assert 0 <= int(bucket.headers()["RateLimit-Remaining"]) <= 8


@pytest.mark.parametrize(
    ("tokens", "remaining"), [(0.99, 0), (0.9999999, 1), (1.0, 1), (8.0, 8)]
)
def test_as_many_images_as_a_response_announces_are_accepted(tokens, remaining, monkeypatch):
    monkeypatch.setattr(api_keys, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    bucket = TokenBucket(1.0, 8, [tokens, 1000.0])
    assert bucket.headers()["RateLimit-Remaining"] == str(remaining)
    with pytest.raises(RejectedError):
        bucket.spend(remaining + 1)

    bucket.spend(remaining)


def test_refused_work_costs_at_most_the_burst_in_advance(monkeypatch) -> None:
    monkeypatch.setattr(api_keys, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    bucket = TokenBucket(1.0, 8, [8.0, 1000.0])

    assert bucket.charge(10) == -2
    assert bucket.charge(100) == -8
    assert bucket.headers()["RateLimit-Reset"] == "16"


def test_many_slow_and_large_uploads_leave_budget_for_small_images(
    serve_with, jpeg, monkeypatch
):
    monkeypatch.setattr(decoders, "MAX_UPLOAD_BYTES", 8_000_000)
    monkeypatch.setattr(admission, "BODY_GRACE_SECONDS", 60)
    client = serve_with(FakeRuntime(num_classes=7), max_body_bytes=2_000_000)
    codes = []

    with ExitStack() as stack:
        uploads = [stack.enter_context(connect(client)) for _ in range(12)]
        for wire in uploads:
            wire.sendall(POST + b"Content-Length: 1900000\r\n\r\n")

        for _ in range(9):
            for wire in list(uploads):
                try:
                    wire.sendall(bytes(200_000))
                except OSError:
                    uploads.remove(wire)
            assert count(client, "upload_bytes") <= 7_000_000
            assert client.post("/v1/classify", content=jpeg).status_code == 200

        wait_for(lambda: count(client, 'rejected_total{reason="uploads_full"}') >= 8)
        for wire in uploads:
            wire.settimeout(1)
            try:
                codes.append(read(wire, to_the_end=False).code)
            except TimeoutError:
                codes.append("waiting")

    assert 2 <= codes.count("waiting") <= 4
    wait_for(lambda: count(client, "upload_bytes") == 0)


def test_an_upload_without_budget_is_429_before_the_body_is_sent(serve_with, monkeypatch):
    monkeypatch.setattr(decoders, "MAX_UPLOAD_BYTES", 2_300_000)
    monkeypatch.setattr(admission, "BODY_GRACE_SECONDS", 60)
    client = serve_with(FakeRuntime(num_classes=7), max_body_bytes=2_000_000)

    with connect(client) as first, connect(client) as second:
        first.sendall(POST + b"Content-Length: 1900000\r\n\r\n" + bytes(1_800_000))
        wait_for(lambda: count(client, "upload_bytes") >= 1_800_000)
        second.sendall(POST + b"Content-Length: 1900000\r\n" + EXPECT + b"\r\n")
        reply = read(second, to_the_end=False)

    assert reply.status == 429
    assert reply.code == "uploads_full"
    assert reply.headers["retry-after"] == "2"


GONE = 'requests_total{code="499",model="tiny",reason="client_gone",route="/v1/classify"}'


def test_a_disconnect_after_some_bytes_of_the_body_is_counted(serve_with, jpeg):
    runtime = FakeRuntime(num_classes=7)
    client = serve_with(runtime)
    for sent in (0, 0, 1, 1, 100):
        with connect(client) as wire:
            wire.sendall(post_of(jpeg)[: len(post_of(jpeg)) - len(jpeg) + sent])
            wait_for(lambda sent=sent: count(client, "upload_bytes") == sent)
    wait_for(lambda: count(client, GONE) == 5)

    assert count(client, "upload_bytes") == 0
    assert runtime.batches == []
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_a_disconnect_while_queued_or_running_frees_the_queue(serve_with, jpeg):
    runtime = Held(largest_batch=1)
    client = serve_with(runtime)
    running = connect(client)
    running.sendall(post_of(jpeg))

    assert runtime.entered.wait(60)
    queued = [connect(client) for _ in range(6)]
    for wire in queued:
        wire.sendall(post_of(jpeg))
    wait_for(lambda: count(client, "queue_depth") == 7)

    assert count(client, "upload_bytes") == 7 * len(jpeg)
    for wire in [running, *queued]:
        wire.close()
    wait_for(lambda: count(client, GONE) == 7)

    assert count(client, "queue_depth") == count(client, "upload_bytes") == 0
    runtime.gate.set()
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    assert runtime.batches == [1, 1]


def test_a_client_that_ends_its_side_of_the_connection_has_gone(serve_with, jpeg):
    runtime = Held(largest_batch=1)
    client = serve_with(runtime)
    running = connect(client)
    running.sendall(post_of(jpeg))

    assert runtime.entered.wait(60)
    with running, connect(client) as queued:
        queued.sendall(post_of(jpeg))
        wait_for(lambda: count(client, "queue_depth") == 2)
        for wire in (running, queued):
            wire.shutdown(socket.SHUT_WR)  # and reads on
            assert wire.recv(1) == b""

    wait_for(lambda: count(client, GONE) == 2)
    runtime.gate.set()
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    assert runtime.batches == [1, 1]  # not the one that was queued


def test_a_file_of_the_user_of_the_container_stays_that_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.toml"
    given = []
    stat_of = os.stat
    new_key(path, "phone")
    owner = os.stat_result((*stat_of(path)[:4], 10001, 10001, *stat_of(path)[6:]))
    monkeypatch.setattr(Path, "stat", lambda _self, **_: owner)
    monkeypatch.setattr(
        os, "chown", lambda file, *ids, **_options: given.append((Path(file).name, *ids))
    )
    new_key(path, "tablet")
    monkeypatch.undo()
    ((name, *ids),) = given

    assert name.startswith("keys.toml.")
    assert ids == [10001, 10001]
    assert [key.name for key in read_keys(path)] == ["phone", "tablet"]


def test_a_file_of_another_user_is_one_line_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(api_keys, "read_text", refuse)
    with pytest.raises(ConfigError, match=f"chown {os.geteuid()}"):
        read_keys(tmp_path / "keys.toml")


def test_reloaded_keys_replace_those_before_and_keep_the_state_of_their_limits(
    tmp_path,
) -> None:
    path = tmp_path / "keys.toml"
    first = new_key(path, "first", rate=1e-6)
    second = new_key(path, "second")
    ring = KeyRing(read_keys(path))
    _, bucket = ring.find(first.encode())
    bucket.spend(60)
    third = new_key(tmp_path / "other.toml", "third", rate=1e-6)
    ring.replace((*read_keys(tmp_path / "other.toml"), *read_keys(path)[:1]))

    assert ring.find(second.encode()) is None
    remaining = [
        ring.find(key.encode())[1].headers()["RateLimit-Remaining"] for key in (first, third)
    ]

    assert remaining == ["4", "64"]


UNUSABLE_KEYS = {"no file": None, "no key": "", "damaged": "[[key]", "no hash": "[[key]]\n"}


@pytest.mark.parametrize("name", UNUSABLE_KEYS)
def test_unreadable_keys_leave_those_in_use_in_one_line(tmp_path, caplog, name) -> None:
    path = tmp_path / "keys.toml"
    if UNUSABLE_KEYS[name] is not None:
        path.write_text(UNUSABLE_KEYS[name])
    metrics = Metrics()
    reading = read_again(Settings(keys=path), metrics.keys_unreadable)

    assert asyncio.run(reading) is None
    assert metrics.registry.get_sample_value("sopdeploy_keys_unreadable") == 1

    (line,) = caplog.messages
    assert f" {path}: " in line


def test_a_server_in_one_process_accepts_new_keys_after_a_reload(tmp_path) -> None:
    path = tmp_path / "keys.toml"
    ring = KeyRing((Key(name="a", sha256=DIGEST),))
    new = new_key(path, "b")
    server = DrainingServer.__new__(DrainingServer)
    metrics = Metrics()
    metrics.keys_unreadable.set(1)
    server._service = SimpleNamespace(settings=Settings(keys=path), metrics=metrics)
    server._app = SimpleNamespace(state=SimpleNamespace(keys=ring))
    asyncio.run(server._reload_keys())

    assert ring.find(b"secret") is None
    assert ring.find(new.encode())[0].name == "b"
    assert metrics.registry.get_sample_value("sopdeploy_keys_unreadable") == 0


def test_a_changed_key_file_has_another_identity(tmp_path) -> None:
    path = tmp_path / "keys.toml"
    identities = [file_identity(path)]
    for name in ("a", "b"):
        new_key(path, name)
        identities.append(file_identity(path))
    path.chmod(0)  # it cannot be read any more
    identities.append(file_identity(path))

    assert len(set(identities)) == 4


def test_reloads_that_are_requested_during_one_are_one_more() -> None:
    async def scenario() -> int:
        gate = asyncio.Event()
        count = itertools.count()

        async def work() -> bool:
            next(count)
            await gate.wait()
            return True

        joined = Joined(work, tries_again=True)
        for _ in range(200):
            joined.request()
            await asyncio.sleep(0)
        gate.set()
        for _ in range(5):
            await asyncio.sleep(0)
        return next(count)

    assert asyncio.run(scenario()) == 2


# Seconds of requests, the outcomes of the work, and the seconds at which it is done
TRIES = {
    "success at once": ([0], [True], True, [0]),
    "success after three failures": ([0], [False] * 3 + [True], True, [0, 1, 3, 7]),
    "pauses that stop growing": (
        [0], [False] * 11, True, [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 811],
    ),
    "a request in a pause": ([0, 5], [False] * 3 + [False, True], True, [0, 1, 3, 5, 6]),
    "a request after success": ([0, 9], [False, True, False, True], True, [0, 1, 9, 10]),
    "work that is not tried again": ([0, 9], [False, False], False, [0, 9]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("requests", "outcomes", "tries_again", "expected"), TRIES.values(), ids=TRIES
)
def test_work_that_fails_is_tried_again_after_growing_pauses(
    requests, outcomes, tries_again, expected
) -> None:
    class Loop(asyncio.SelectorEventLoop):
        """An event loop whose time passes at once."""

        now = 0.0

        def time(self) -> float:
            return self.now

        def _run_once(self) -> None:
            if not self._ready and self._scheduled:
                self.now = self._scheduled[0].when()
            super()._run_once()

    times: list[float] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        async def work() -> bool:
            times.append(loop.time())
            return outcomes[len(times) - 1]

        joined = Joined(work, tries_again=tries_again)
        for second in requests:
            loop.call_at(second, joined.request)
        await asyncio.sleep(expected[-1] + 0.5)

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(scenario())
    assert times == expected
