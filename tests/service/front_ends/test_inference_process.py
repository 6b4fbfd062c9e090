"""Front ends and an inference process in threads of this process, connected as real processes are."""

import asyncio
import contextlib
import logging
import queue
import select
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from logging.handlers import QueueHandler
from pathlib import Path
from random import Random

import httpx
import pytest
from fake_runtime import FakeRuntime

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy_service.front_ends import control
from sopdeploy_service.front_ends.channel import HEADER, IMAGE_HEAD, MessageKind, receive_blocking
from sopdeploy_service.front_ends.inference_process import InferenceProcess
from sopdeploy_service.front_ends.remote import RemoteRegistry, attach
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.service.bundle_with_outputs import write_bundle_with_outputs
from tests.service.conftest import Client, open_files, running
from tests.service.held import Held

IMAGE_BYTES = 32 * 32 * 3
LIMITED = Settings(queue_size=16, max_images=16)


class Group:
    """An inference process and what connects front ends to it, as the supervisor does."""

    def __init__(self, models: dict[str, LoadedModel], sources: list[str] | None = None) -> None:
        self.control, theirs = control.pair()

        async def run() -> None:
            registry = ModelRegistry(models, LIMITED, Metrics())
            self.process = InferenceProcess(registry, theirs, LIMITED, sources or [])
            await self.process.run()

        self.thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        self.thread.start()
        self.control.setblocking(True)
        while self.control.recv(4096) != control.NEW_MODELS:
            pass

    def connect(self) -> socket.socket:
        """Return the channel of a new front end."""
        ours, theirs = socket.socketpair()
        with ours:
            control.send_files(self.control, b"0", ours.fileno())
        return theirs

    def stop(self) -> None:
        self.control.close()
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def group(bundle: Bundle) -> Iterator[Callable[..., Group]]:
    """`group(runtime, bundle)` starts an inference process."""
    with ExitStack() as stack:

        def start(runtime: Runtime, used: Bundle = bundle) -> Group:
            loaded = LoadedModel(bundle=used, runtime=runtime, replays={})
            started = Group({"tiny": loaded})
            stack.callback(started.stop)
            return started

        yield start


@contextmanager
def front_end(group: Group, bundle: Bundle) -> Iterator[Client]:
    """A server without a runtime of its own."""
    create_registry = partial(RemoteRegistry, group.connect())
    with running(
        FakeRuntime(num_classes=7), bundle, Settings(), names=(), create_registry=create_registry
    ) as client:
        yield client


def test_images_of_ended_requests_leave_the_queue(group, bundle, jpeg, until) -> None:
    runtime = Held(largest_batch=1)
    with front_end(group(runtime), bundle) as client:
        late = {"x-request-timeout-ms": "150"}
        codes = [client.post("/v1/classify", content=jpeg, headers=late).status_code for _ in range(3)]
        assert codes[0] == 504
        assert set(codes) <= {503, 504}  # the estimate may already know
        with contextlib.suppress(httpx.TimeoutException):
            client.post("/v1/classify", content=jpeg, timeout=0.2)
        runtime.gate.set()
        until(lambda: client.post("/v1/classify", content=jpeg).status_code == 200)
        assert len(runtime.batches) <= 3


def attach_to(client: Client, group: Group) -> None:
    """Give the front end of *client* a channel to *group*, as the supervisor does."""
    asyncio.run_coroutine_threadsafe(attach(client.app.state.service, group.connect()), client.loop)


def test_while_the_inference_process_is_replaced_its_front_end_answers_503_and_then_200(
    group, bundle, jpeg, until
) -> None:
    runtime = Held()
    shared = group(runtime)
    with front_end(shared, bundle) as client, ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.post, "/v1/classify", content=jpeg)
        assert runtime.entered.wait(60)
        shared.control.close()
        reply = held.result()
        runtime.gate.set()  # otherwise the thread of this test would stay
        assert (reply.status_code, reply.headers["retry-after"]) in {(503, "5"), (503, "1")}
        shared.thread.join(60)
        until(lambda: client.get("/readyz").status_code == 503)
        reply = client.post("/v1/classify", content=jpeg)
        assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (
            503,
            "runtime_dead",
            "5",
        )
        assert (client.get("/livez").status_code, client.get("/v2/health/live").status_code) == (200, 200)
        reason = "the inference process has ended; it is started again"
        assert client.get("/readyz").json() == {"status": "runtime_restarting", "reason": reason}
        with group(FakeRuntime(num_classes=7)).connect():  # ends without having sent models
            pass
        attach_to(client, group(FakeRuntime(num_classes=7)))
        until(lambda: client.get("/readyz").json() == {"status": "ok"})
        assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_a_reload_serves_other_bundles_and_loses_no_request(make_bundle, tmp_path, jpeg, until) -> None:
    first = make_bundle(tmp_path)
    settings = Settings(threads=1)
    shared = Group({"tiny": load_model(first, settings)}, [str(tmp_path)])
    stopped, replies = threading.Event(), []

    def send() -> None:
        while not stopped.is_set():
            replies.append(client.post("/v1/classify", content=jpeg))

    def reload() -> bytes:
        control.send_files(shared.control, control.RELOAD)
        while (news := shared.control.recv(4096)) != control.NEW_MODELS and log.empty():
            until(lambda: select.select([shared.control], [], [], 1)[0])
        return news

    log: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = QueueHandler(log)
    handler.setLevel("ERROR")
    logging.getLogger("sopdeploy.models").addHandler(handler)
    with front_end(shared, open_bundle(first)) as client, ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(send) for _ in range(4)]
        try:
            until(lambda: len(replies) > 20)
            second = make_bundle(tmp_path, seed=1)
            assert reload() == control.NEW_MODELS
            attach_to(client, shared)
            until(lambda: client.get("/info").json()["models"][0]["id"] == second.name.rpartition("-")[2])
            served = len(replies)
            until(lambda: len(replies) > served + 20)
            make_bundle(tmp_path, seed=2, wrong_by=1.0)
            assert reload() != control.NEW_MODELS
        finally:
            stopped.set()
        for each in sending:
            each.result()
        assert client.get("/info").json()["models"][0]["bundle"] == second.name
    logging.getLogger("sopdeploy.models").removeHandler(handler)
    record = log.get()
    assert "not reloaded, the bundles in use stay" in record.getMessage()
    assert "probes: output 'logits' deviates" in record.getMessage()
    assert record.exc_info is None
    assert {reply.status_code for reply in replies} == {200}
    assert {first.name, second.name} == {f"tiny-{reply.headers['x-model-digest']}" for reply in replies}
    shared.stop()


def test_a_front_end_may_start_after_the_folder_of_the_bundle_was_deleted(
    bundle_path, tmp_path, group
) -> None:
    folder = shutil.copytree(bundle_path, tmp_path / bundle_path.name)
    loaded = load_model(folder, Settings(threads=1))
    shutil.rmtree(folder)
    with front_end(group(loaded.runtime, loaded.bundle), loaded.bundle) as client:
        for path in ("/v1/card", "/selftest", "/info"):
            assert client.get(path).status_code == 200


def message(kind: int, number: int, body: bytes = b"") -> bytes:
    return HEADER.pack(kind, number, len(body)) + body


def image(model: int = 0, size: int = IMAGE_BYTES) -> bytes:
    return IMAGE_HEAD.pack(model, False, 0.0, float("inf")) + bytes(size)


ATTACKS = {
    "no pixels": message(MessageKind.IMAGE, 1, image(size=0)),
    "too many pixels": message(MessageKind.IMAGE, 1, image(size=IMAGE_BYTES + 1)),
    "half a header": message(MessageKind.IMAGE, 1, b"x"),
    "an image that is sent twice": message(MessageKind.IMAGE, 1, image()) * 2,
    "too many images": b"".join(message(MessageKind.IMAGE, number, image()) for number in range(17)),
    "an unknown message": message(99, 0),
    "an image for an unknown model": message(MessageKind.IMAGE, 1, image(model=1)),
    "a body of 4 GB": HEADER.pack(MessageKind.IMAGE, 1, 0xFFFF_FFFF),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_front_end_that_breaks_the_protocol_is_replaced(group, bundle, make_picture, until, attack) -> None:
    runtime = Held()
    shared = group(runtime)
    with shared.connect() as connection:
        connection.settimeout(20)
        with contextlib.suppress(ConnectionError):  # it may end before it has read all
            connection.sendall(ATTACKS[attack])
        with contextlib.suppress(ConnectionError):
            while True:
                receive_blocking(connection)
    runtime.gate.set()
    until(lambda: shared.control.recv(4096) == control.BAD_FRONT_END + b": 0")  # for the supervisor
    with front_end(shared, bundle) as client:
        assert client.post("/v1/classify", content=make_picture(kind="PNG")).status_code == 200


@pytest.mark.parametrize("seed", range(2))
def test_no_bytes_of_a_front_end_disturb_another_front_end(group, bundle, jpeg, until, seed) -> None:
    random = Random(seed)
    shared = group(FakeRuntime(num_classes=7))
    with front_end(shared, bundle) as client:
        assert client.post("/v1/classify", content=jpeg).status_code == 200  # opens a connection
        before = open_files()
        for _ in range(8):
            with shared.connect() as connection, contextlib.suppress(OSError):
                for _ in range(random.choice([1, 20])):
                    body = random.choice([image(), random.randbytes(random.randrange(64))])
                    kind = random.choice([MessageKind.IMAGE, *MessageKind, 77])
                    connection.sendall(message(kind, random.randrange(4), body)[: random.randrange(1, 99)])
        assert client.post("/v1/classify", content=jpeg).status_code == 200
        until(lambda: open_files() <= before)


def test_a_batch_may_have_images_with_and_without_features(
    group, bundle, bundle_path: Path, tmp_path: Path, jpeg, until
) -> None:
    class Gated(OnnxRuntime):
        gate, batches = threading.Event(), []

        def run(self, images):
            self.gate.wait(60)
            self.batches.append(len(images))
            return super().run(images)

    outputs = open_bundle(write_bundle_with_outputs(bundle_path, tmp_path))
    runtime = Gated(outputs, threads=1)
    paths = ["/v1/classify", "/v1/embed", "/v1/classify?gates=true"]
    shared = group(runtime, outputs)
    with front_end(shared, bundle) as client, ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(client.post, path, content=jpeg) for path in paths]
        until(lambda: sum(len(each.images) for each in shared.process._front_ends) == len(paths))
        runtime.gate.set()
        together = [reply.result().json() for reply in replies]
        alone = [client.post(path, content=jpeg).json() for path in paths]
    assert max(runtime.batches) > 1
    assert [found.keys() for found in together] == [found.keys() for found in alone]
    assert together[1]["embedding"] == pytest.approx(alone[1]["embedding"])
