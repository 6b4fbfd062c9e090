"""Front ends and an engine in threads of this process, connected as real processes are."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from sopdeploy.bundle.class_maps import read_class_maps
from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy_service.api import status
from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.http.rate_limits import SharedSpending, TokenBucket
from sopdeploy_service.inference.engine_process import client as client_module
from sopdeploy_service.inference.engine_process.channel import RECORD, Kind, open_pair
from sopdeploy_service.inference.engine_process.client import EngineClient
from sopdeploy_service.inference.engine_process.engine import Engine
from sopdeploy_service.inference.engine_process.models import EngineModel, ModelTable
from sopdeploy_service.inference.engine_process.slots import PAGE, Request, Slots, slot_bytes
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.results import RejectedError
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.fake import FakeRuntime
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.service import raw
from tests.service.bundle_with_maps import write_bundle_with_maps
from tests.service.children import PYTHONPATH
from tests.service.conftest import Client, GatedRuntime, open_files, running
from tests.service.held import Held


@dataclass
class Group:
    """An engine and what connects front ends to it, as the supervisor does."""

    table: ModelTable
    settings: Settings
    stack: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        self.broker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.engine = Engine(self.table, theirs)
        self.thread = threading.Thread(target=self.engine.run, daemon=True)
        self.thread.start()

    def connect(self, name: str = "0") -> EngineClient:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.stack.enter_context(ours)
        client = EngineClient(theirs)
        self.reconnect(ours, name)
        client.connect()
        self.fronts = ours
        return client

    def reconnect(self, broker: socket.socket, name: str = "0") -> None:
        ends = open_pair()
        socket.send_fds(self.broker, [name.encode()], [ends[0].fileno()])
        socket.send_fds(broker, [b"engine"], [ends[1].fileno()])
        for end in ends:
            end.close()

    def stop(self) -> None:
        self.engine.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.broker.close()


def fake_table(models: dict[str, LoadedModel], settings: Settings) -> SimpleNamespace:
    numbered = {
        name: [EngineModel(name, number, loaded, settings)]
        for number, (name, loaded) in enumerate(models.items(), 1)
    }
    return SimpleNamespace(models=lambda: numbered, change=lambda *_: None)


@pytest.fixture
def group(bundle: Bundle) -> Iterator[Callable[..., Group]]:
    with ExitStack() as stack:

        def make(runtime: Runtime | None = None, used: Bundle = bundle, **settings: object) -> Group:
            chosen = Settings(max_queue_delay_ms=0, **settings)
            if runtime is None:
                table = ModelTable([bundle.path], chosen)
            else:
                maps = read_class_maps(used.path, used.manifest)
                loaded = LoadedModel(bundle=used, runtime=runtime, replays={}, class_maps=maps)
                table = fake_table({"tiny": loaded}, chosen)
            made = Group(table, chosen)
            made.start()
            stack.callback(made.stack.close)
            stack.callback(made.stop)
            return made

        yield make


@contextmanager
def front_end(group: Group, bundle: Bundle, **changes: object) -> Iterator[Client]:
    """A server without a runtime of its own."""
    engine = group.connect()
    settings = group.settings.model_copy(update=changes)
    with running(FakeRuntime(classes=7), bundle, settings, names=(), engine=engine) as client:
        client.engine = engine
        yield client


def test_a_front_end_answers_as_a_single_process_does(
    group, bundle, onnx_runtime, jpeg, make_picture
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    tensor = {"name": "images", "datatype": "UINT8", "shape": pixels.shape, "data": pixels.ravel().tolist()}
    requests = [
        ("POST", "/v1/classify", {"content": jpeg}),
        (
            "POST",
            "/v1/classify",
            {"files": [("image", jpeg), ("image", b"no"), ("image", make_picture(kind="PNG"))]},
        ),
        ("POST", "/v2/models/tiny/infer", {"json": {"inputs": [tensor]}}),
        ("GET", "/info", {}),
        ("GET", "/v1/card", {}),
        ("GET", "/v2/models/tiny", {}),
        ("GET", "/v2/models/tiny/config", {}),
        ("GET", "/readyz", {}),
        ("POST", "/v1/models/tiny/rollback", {}),
    ]
    shared = group()
    with front_end(shared, bundle) as remote, running(onnx_runtime, bundle, Settings()) as local:
        for method, path, body in requests:
            found, expected = (client.request(method, path, **body) for client in (remote, local))
            assert (found.status_code, found.json()) == (expected.status_code, expected.json()), path
        assert remote.get("/selftest").json()["deviation"] == {"logits": 0.0}
        page = remote.get("/metrics").text
        assert 'sopdeploy_batch_size_sum{model="tiny"} 9.0' in page  # of five requests with nine images
        assert remote.engine.num_free == 256
        assert remote.engine.waiting() == ()


def test_feature_maps_and_gates_return_through_the_slot(group, gated_bundle, jpeg) -> None:
    shared = group(GatedRuntime(classes=7), gated_bundle)
    with front_end(shared, gated_bundle) as client:
        answer = client.post("/v1/classify?gates=true", content=jpeg)
        assert sum(gate["weight"] > 0 for gate in answer.json()["gates"]) >= 1
        assert client.get("/v1/card").json()["text"].startswith("# tiny")


def test_a_load_and_a_rollback_reach_every_front_end_before_the_answer(
    bundle, make_bundle, tmp_path, jpeg, until
) -> None:
    first = make_bundle(tmp_path)
    settings = Settings(model_control=True)
    shared = Group(ModelTable([first], settings), settings)
    shared.start()
    with shared.stack, ExitStack() as stack:
        stack.callback(shared.stop)
        clients = [stack.enter_context(front_end(shared, bundle)) for _ in range(2)]
        second = make_bundle(tmp_path, seed=2)
        digests = {path.name.rpartition("-")[2] for path in (first, second)}
        before = clients[0].post("/v1/classify", content=jpeg).headers["x-model-digest"]
        assert clients[0].post("/v2/repository/models/tiny/load").status_code == 200
        after = [client.post("/v1/classify", content=jpeg).headers["x-model-digest"] for client in clients]
        assert {before, *after} == digests
        assert after[0] == after[1]
        assert clients[1].post("/v1/models/tiny/rollback").json()["id"] == before
        assert [client.get("/info").json()["models"][0]["id"] for client in clients] == [before] * 2
        assert (
            clients[0].post("/v2/repository/models/none/load").json()["error"].startswith("none: no bundle")
        )
        assert clients[0].post("/v2/repository/models/tiny/unload").status_code == 200
        assert clients[1].get("/readyz").json() == {"status": "no_model"}
        until(lambda: not shared.engine._models)


def test_without_a_free_slot_a_request_is_rejected_before_its_body_is_decoded(
    group, bundle, jpeg, until, monkeypatch
) -> None:
    monkeypatch.setattr("sopdeploy_service.inference.engine_process.slots.MAX_SLOTS", 2)
    runtime = Held(largest_batch=1)
    shared = group(runtime)
    with front_end(shared, bundle) as client, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(client.post, "/v1/classify", content=jpeg) for _ in range(2)]
        until(lambda: client.engine.num_free == 0)
        full = client.post("/v1/classify", content=jpeg)
        assert (full.status_code, full.json()["code"], full.headers["retry-after"]) == (
            503,
            "slots_full",
            "1",
        )
        runtime.gate.set()
        assert [reply.result().status_code for reply in held] == [200, 200]
        until(lambda: client.engine.num_free == 2)


def test_slots_return_after_deadlines_and_disconnects(group, bundle, jpeg, until) -> None:
    runtime = Held(largest_batch=1)
    shared = group(runtime)
    with front_end(shared, bundle) as client:
        late = {"x-request-timeout-ms": "150"}
        codes = [client.post("/v1/classify", content=jpeg, headers=late).status_code for _ in range(3)]
        assert codes[0] == 504
        assert set(codes) <= {503, 504}  # the estimate may already know
        with contextlib.suppress(httpx.ReadTimeout):
            client.post("/v1/classify", content=jpeg, timeout=0.2)
        runtime.gate.set()
        until(lambda: client.engine.num_free == 256)
        assert len(runtime.batches) <= 2  # the others left the queue
        assert client.post("/v1/classify", content=jpeg).status_code == 200


@pytest.mark.parametrize("failure", ["dead", "hung"])
def test_without_an_engine_requests_get_503_at_once_until_it_is_back(
    group, bundle, jpeg, until, monkeypatch, failure
) -> None:
    runtime = Held()
    shared = group(runtime)
    with front_end(shared, bundle) as client, ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.post, "/v1/classify", content=jpeg)
        assert runtime.entered.wait(20)
        if failure == "dead":
            threading.Timer(0.2, runtime.gate.set).start()  # otherwise the thread of this test would stay
            shared.stop()
        else:
            monkeypatch.setattr(client_module, "HUNG_SECONDS", -1.0)
        assert held.result().json()["code"] == "engine_dead"
        answer = client.post("/v1/classify", content=jpeg)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert client.get("/readyz").json() == {"status": "engine_restarting"}
        assert client.get("/livez").status_code == 200
        runtime.gate.set()
        if failure == "dead":
            shared.table = fake_table(
                {"tiny": LoadedModel(bundle=bundle, runtime=runtime, replays={})}, Settings()
            )
            shared.start()
            shared.reconnect(shared.fronts)
        else:
            monkeypatch.setattr(client_module, "HUNG_SECONDS", 20.0)
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/v1/classify", content=jpeg).status_code == 200
        until(lambda: client.engine.num_free == 256)


def replace_model(shared: Group, bundle: Bundle) -> None:
    """Make the engine serve *bundle*, as the model with number 2, instead of all others."""
    loaded = LoadedModel(bundle=bundle, runtime=FakeRuntime(classes=7), replays={})
    new = EngineModel("tiny", 2, loaded, Settings())
    shared.table.models = lambda: {"tiny": [new]}
    shared.engine.call_soon_threadsafe(shared.engine._adopt_models)
    shared.engine.call_soon_threadsafe(lambda: shared.engine._announce(list(shared.engine.fronts.values())))


def test_slots_of_ended_requests_return_when_their_model_is_replaced(group, bundle, jpeg, until) -> None:
    runtime = Held(largest_batch=1)
    shared = group(runtime)
    with front_end(shared, bundle) as client:
        for _ in range(3):  # one runs, two are queued
            with contextlib.suppress(httpx.ReadTimeout):
                client.post("/v1/classify", content=jpeg, timeout=0.1)
        replace_model(shared, bundle)
        until(lambda: list(shared.engine._models) == [2])
        runtime.gate.set()
        until(lambda: client.engine.num_free == 256)
        assert shared.engine._images == 0


def test_an_image_that_is_sent_after_its_model_was_released_does_not_end_the_front_end(
    group, bundle, jpeg, until, monkeypatch
) -> None:
    shared = group(FakeRuntime(classes=7))
    copying, released, copyto = threading.Event(), threading.Event(), np.copyto

    def copy_late(*arrays: np.ndarray) -> None:
        copying.set()
        released.wait(20)
        copyto(*arrays)

    copier = SimpleNamespace(copyto=copy_late)
    monkeypatch.setattr("sopdeploy_service.inference.engine_process.remote.np", copier)
    with front_end(shared, bundle) as client:
        with raw.connect(client) as wire:
            wire.sendall(raw.post_of(jpeg))
            assert copying.wait(20)
        replace_model(shared, bundle)
        until(lambda: list(shared.engine._models) == [2])
        released.set()
        until(lambda: client.engine.num_free == 256)
        assert len(shared.engine.fronts) == 1


@pytest.mark.parametrize(("path", "reader"), [("/selftest", "read_probes"), ("/v1/card", "read_card")])
def test_a_model_that_is_read_while_it_is_replaced_keeps_its_files(
    group, bundle, until, monkeypatch, path, reader
) -> None:
    reading, replaced, read = threading.Event(), threading.Event(), getattr(status, reader)

    def read_late(*values: object) -> object:
        reading.set()
        replaced.wait(20)
        return read(*values)

    monkeypatch.setattr(status, reader, read_late)
    shared = group()
    with front_end(shared, bundle) as client, ThreadPoolExecutor(1) as pool:
        found = pool.submit(client.get, path)
        assert reading.wait(20)
        before = client.app.state.service.registry.find()
        replace_model(shared, bundle)
        until(lambda: client.app.state.service.registry.find() is not before)
        until(lambda: before._file.closed or not before.unused.is_set())
        replaced.set()
        assert found.result().status_code == 200


def test_a_larger_input_gets_larger_slots_and_the_old_ones_are_given_up(group, bundle, jpeg, until) -> None:
    shared = group(FakeRuntime(classes=7))
    with front_end(shared, bundle) as client:
        assert client.post("/v1/classify", content=jpeg).status_code == 200
        images = bundle.manifest.inputs[0].model_copy(update={"shape": (None, 96, 96, 3)})
        rules = bundle.manifest.preprocess.model_copy(update={"crop": 96, "resize": 96})
        manifest = bundle.manifest.model_copy(update={"inputs": (images,), "preprocess": rules})
        replace_model(shared, replace(bundle, manifest=manifest))
        until(lambda: client.get("/v2/models/tiny").json()["inputs"][0]["shape"] == [-1, 96, 96, 3])
        assert client.post("/v1/classify", content=jpeg).status_code == 200
        (front,) = shared.engine.fronts.values()
        until(lambda: list(front.memories) == [1])
        until(lambda: len(shared.engine._models) == 1)


@pytest.mark.parametrize("seed", range(12))
def test_no_bytes_of_a_front_end_disturb_the_engine_or_another_front_end(
    group, bundle, jpeg, until, seed
) -> None:
    random = Random(seed)
    shared = group(FakeRuntime(classes=7))
    with front_end(shared, bundle) as client:
        for _ in range(8):
            evil = shared.connect("evil")
            memory, channel = evil._pool, evil._channel
            channel.setblocking(False)
            for _ in range(random.choice([1, 20])):
                slot = random.randrange(memory.slots.count)
                if random.random() < 0.7:
                    start = random.randrange(PAGE + 128 * memory.slots.count)
                    length = random.randrange(1, 200)
                    memory.slots._memory[start : start + length] = random.randbytes(length)
                if random.random() < 0.5:
                    request = Request(random.choice([0, 1, 2]), random.randrange(4), 9, 0.0, float("nan"), 1)
                    memory.slots.write_request(slot, request)
                kind = random.choice([Kind.SUBMIT, Kind.SUBMIT, *Kind, 77])
                record = RECORD.pack(
                    kind, random.choice([0, 0, 9]), random.choice([slot, 65535]), random.choice([1, 2])
                )
                with contextlib.suppress(OSError):
                    channel.send(random.choice([record, record, random.randbytes(random.randrange(1, 64))]))
            evil.stop()
        assert client.post("/v1/classify", content=jpeg).status_code == 200
        until(lambda: len(shared.engine.fronts) == 1)
        assert client.engine.num_free == 256


ATTACKS = {
    "a slot that does not exist": (Kind.SUBMIT, 0, 60_000, 1),
    "memory that does not exist": (Kind.SUBMIT, 5, 0, 1),
    "another generation": (Kind.SUBMIT, 0, 0, 7),
    "a model that does not exist": (Kind.SUBMIT, 0, 1, 1),
    "memory in use": (Kind.UNMAPPED, 0, 0, 0),
    "an unknown record": (99, 0, 0, 0),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_front_end_that_breaks_the_protocol_is_cut_off_and_reported(group, bundle, attack) -> None:
    shared = group(FakeRuntime(classes=7))
    evil = shared.connect("evil")
    evil._pool.slots.write_request(1, Request(99, 0, 0, 0.0, 0.0, 1))
    evil._channel.send(RECORD.pack(*ATTACKS[attack]))
    evil._channel.settimeout(20)
    while evil._channel.recv(1000):
        pass
    shared.broker.settimeout(20)
    while (message := shared.broker.recv(100)) == b"beat":
        pass
    assert message == b"replace evil"
    evil.stop()


def test_fifty_front_ends_and_engines_leave_nothing_behind(group, bundle, jpeg, until) -> None:
    shared = group(FakeRuntime(classes=7))
    with front_end(shared, bundle) as client:
        assert client.post("/v1/classify", content=jpeg).status_code == 200
        shared.connect().stop()
        until(lambda: len(shared.engine.fronts) == 1)
        before = open_files()
        for _ in range(50):
            other = shared.connect()
            (slot,) = other.take(1)
            now = time.monotonic()
            other.submit(
                slot,
                SimpleNamespace(on_reply=lambda *_: None),
                Request(1, 0, 0, now, now + 9, slot.generation),
            )
            other.stop()
            del slot, other  # they keep the memory mapped
        until(lambda: len(shared.engine.fronts) == 1)
        until(lambda: open_files() <= before + 50)  # brokers of the test
        shared.stack.close()
        until(lambda: open_files() <= before)
        assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_a_call_at_the_end_of_the_loop_writes_before_its_descriptor_is_closed(monkeypatch, until) -> None:
    shared = Group(fake_table({}, Settings()), Settings())
    shared.start()
    write = os.eventfd_write

    def write_late(number: int, value: int) -> None:
        until(lambda: not shared.engine._running)  # the loop has already run the callback
        shared.thread.join(0.2)
        write(number, value)

    monkeypatch.setattr(os, "eventfd_write", write_late)
    shared.stop()
    with pytest.raises(RuntimeError, match="has ended"):
        shared.engine.stop()


def test_slots_are_sealed_page_aligned_and_at_most_39_mb() -> None:
    size = slot_bytes((224, 224, 3), [(None, 1000)])
    slots = Slots.create(size)
    total = os.fstat(slots.file).st_size
    assert (slots.count, size % PAGE, total <= 39_000_000) == (250, 0, True) or slots.count > 250
    for change in (total + PAGE, total - PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(slots.file, change)
    assert slots.pixels(3, (224, 224, 3)).ctypes.data % PAGE == 0
    assert slot_bytes((32, 32, 3), [(None, 10), (None, 512, 7, 7)]) == -(-4 * (10 + 512 * 49) // PAGE) * PAGE
    slots.close()


def test_front_ends_share_the_rate_limit_of_a_key() -> None:
    file = SharedSpending.create(2)
    buckets = [TokenBucket(1e-6, 10, SharedSpending(file, row, 2), 3) for row in range(2)]
    os.close(file)
    buckets[0].spend(6)
    buckets[1].spend(4)
    for bucket in buckets:
        with pytest.raises(RejectedError):
            bucket.spend(1)
        assert bucket.headers()["RateLimit-Remaining"] == "0"


def test_slots_return_if_another_front_end_spends_the_last_tokens_of_a_key(
    group, bundle, jpeg, tmp_path, monkeypatch
) -> None:
    class Contested(TokenBucket):
        """Another front end spends all tokens between the check and the payment of each request."""

        def spend(self, images: int, *, check_only: bool = False) -> None:
            self._tokens = float(self.burst) if check_only else 0.0
            super().spend(images, check_only=check_only)

    monkeypatch.setattr("sopdeploy_service.http.middleware.TokenBucket", Contested)
    keys = tmp_path / "keys.toml"
    secret = new_key(keys, "one", rate=1e-6, burst=9, admin=False)
    with front_end(group(FakeRuntime(classes=7), keys=keys), bundle) as client:
        for _ in range(2):
            answer = client.post("/v1/classify", content=jpeg, headers={"x-api-key": secret})
            assert answer.json()["code"] == "rate_limited"
        assert client.engine.num_free == 256
        assert client.app.state.service.admitted == 0


def test_an_engine_process_imports_no_server_no_event_loop_and_no_image_library() -> None:
    banned = (
        "asyncio",
        "PIL",
        "fastapi",
        "starlette",
        "uvicorn",
        "httpx",
        "http",
        "prometheus_client",
        "torch",
    )
    code = (
        "import sys, sopdeploy_service.inference.engine_process.main as main\n"
        f"print([name for name in {banned} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        check=True,
    )
    assert done.stdout == "[]\n"


# Side of the images, floats of the outputs, largest of `max_images` and batch -> slots, MB of a front end.
SIZES: dict[str, tuple[int, int, int, int, float]] = {
    "32 pixels": (32, 10, 32, 256, 1.1),
    "224 pixels": (224, 1000, 32, 256, 38.8),
    "299 pixels": (299, 1000, 32, 144, 39.0),
    "384 pixels": (384, 1000, 32, 88, 38.9),
    "512 pixels": (512, 1000, 32, 49, 38.5),
    "512 pixels and batches of 64": (512, 1000, 64, 64, 50.3),
    "1024 pixels": (1024, 1000, 32, 32, 100.7),
    "100,000 classes": (224, 100_000, 32, 97, 39.0),
    "the features of ResNet-50": (224, 1000 + 2048 * 7 * 7, 32, 96, 38.9),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_front_end_gets_39_mb_of_slots_or_as_many_as_a_request_and_a_batch_need(case: str) -> None:
    side, floats, smallest, count, megabytes = SIZES[case]
    slots = Slots.create(slot_bytes((side, side, 3), [(None, floats)]), smallest)
    size = os.fstat(slots.file).st_size
    assert (slots.count, round(size / 1e6, 1)) == (count, megabytes)
    assert size <= 39_000_000 or count == smallest
    slots.close()


def test_outputs_larger_than_the_image_return_through_the_slot(group, bundle) -> None:
    logits = bundle.manifest.outputs[0].model_copy(update={"shape": (None, 100_000)})
    manifest = bundle.manifest.model_copy(update={"outputs": (logits,)})
    many = replace(bundle, manifest=manifest, labels=tuple(map(str, range(100_000))))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    requests = [
        {
            "inputs": [
                {"name": "images", "datatype": "UINT8", "shape": part.shape, "data": part.ravel().tolist()}
            ]
        }
        for part in (pixels[:1], pixels[:3])
    ]
    runtime = FakeRuntime(classes=100_000)
    with front_end(group(runtime, many), bundle) as remote, running(runtime, many, Settings()) as local:
        assert remote.engine.num_free == 97
        for request in requests:
            found, expected = (
                client.post("/v2/models/tiny/infer", json=request) for client in (remote, local)
            )
            assert (found.status_code, found.content) == (200, expected.content)


def test_a_batch_may_have_images_with_and_without_features(
    group, bundle, bundle_path, tmp_path, make_picture, until
) -> None:
    class Gated(OnnxRuntime):
        gate, batches = threading.Event(), []

        def run_outputs(self, images, names):
            self.gate.wait(20)
            self.batches.append(len(images))
            return super().run_outputs(images, names)

    maps = open_bundle(write_bundle_with_maps(bundle_path, tmp_path))
    runtime = Gated(maps, threads=1)
    shared = group(runtime, maps)
    pictures = [make_picture((9, 200 - 20 * number, 60)) for number in range(5)]
    queries = ["", "?explain=true", "", "?explain_label=dog", "?gates=true"]

    def ask(client: Client, number: int) -> object:
        return client.post(f"/v1/classify{queries[number]}", content=pictures[number]).json()

    with front_end(shared, bundle) as client, ThreadPoolExecutor(5) as pool:
        asked = []
        for number in range(5):
            asked.append(pool.submit(ask, client, number))
            until(lambda count=number + 1: len(client.engine.waiting()) == count)
        runtime.gate.set()
        together = [one.result() for one in asked]
        alone = [ask(client, number) for number in range(5)]
    assert runtime.batches[0] < len(pictures)  # the others had to wait for the gate
    assert max(runtime.batches) > 1
    for found, expected in zip(together, alone, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert flat(found[key]) == pytest.approx(flat(value), rel=1e-5), key


def flat(value: object) -> list[float]:
    """List the numbers in *value*, a part of a JSON document."""
    if isinstance(value, dict):
        return [number for _, part in sorted(value.items()) for number in flat(part)]
    if isinstance(value, list | tuple):
        return [number for part in value for number in flat(part)]
    return [float(value)] if isinstance(value, int | float) else []
