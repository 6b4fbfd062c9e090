"""Front ends and an inference process in threads of this process, connected as real processes are."""

import asyncio
import contextlib
import io
import logging
import queue
import re
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
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from fake_runtime import FakeRuntime
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.bundle.class_maps import read_class_maps
from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy_service.front_ends import control
from sopdeploy_service.front_ends.channel import HEADER, IMAGE_HEAD, JPEG_HEAD, MessageKind, receive_blocking
from sopdeploy_service.front_ends.inference_process import InferenceProcess
from sopdeploy_service.front_ends.remote import RemoteRegistry, attach
from sopdeploy_service.images import loaders
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.server.launch import EXIT_RUNTIME_DEAD
from sopdeploy_service.settings import Settings
from tests.service.bundle_with_maps import write_bundle_with_maps
from tests.service.conftest import RULES, Client, open_files, running, write_bundle
from tests.service.held import Held
from tests.service.images.test_fast_decode import encode
from tests.service.images.test_nvimagecodec import OTHERS, READ

IMAGE_BYTES = 32 * 32 * 3
DEFAULTS = Settings()
LIMITED = Settings(queue_size=16, max_images=16)
ON_GPU = LIMITED.model_copy(update={"decode": "nvimagecodec"})


class Group:
    """An inference process and what connects front ends to it, as the supervisor does."""

    def __init__(
        self, models: dict[str, LoadedModel], sources: list[str] | None = None, settings: Settings = LIMITED
    ) -> None:
        self.control, theirs = control.pair()

        async def run() -> None:
            registry = ModelRegistry(models, settings, Metrics(), store=None)
            self.process = InferenceProcess(registry, theirs, settings, sources or [])
            self.code = await self.process.run()

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
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def group(bundle: Bundle) -> Iterator[Callable[..., Group]]:
    """`group(runtime, bundle)` starts an inference process."""
    with ExitStack() as stack:

        def start(runtime: Runtime, used: Bundle = bundle, settings: Settings = LIMITED) -> Group:
            maps = read_class_maps(used.path, used.manifest)
            loaded = LoadedModel(
                bundle=used, runtime=runtime, replays={}, decode=settings.decode, class_maps=maps
            )
            started = Group({"tiny": loaded}, settings=settings)
            stack.callback(started.stop)
            return started

        yield start


@contextmanager
def front_end(group: Group, bundle: Bundle, settings: Settings = DEFAULTS) -> Iterator[Client]:
    """A server without a runtime of its own."""
    create_registry = partial(RemoteRegistry, group.connect())
    with running(
        FakeRuntime(num_classes=7), bundle, settings, names=(), create_registry=create_registry
    ) as client:
        yield client


class Recording(FakeRuntime):
    """Keeps the images that it runs."""

    def __init__(self) -> None:
        super().__init__(num_classes=7)
        self.images: list[NDArray[np.uint8]] = []

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        self.images += [*images.copy()]
        return super().run(images)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_jpegs_of_front_ends_get_the_pixels_of_a_single_process_on_one_gpu_context(
    group, codec, tmp_path, monkeypatch, fit
) -> None:
    bundle = open_bundle(write_bundle(tmp_path, preprocess=RULES.model_copy(update={"fit": fit})))
    alone, shared, found = Recording(), Recording(), []
    with running(alone, bundle, ON_GPU) as client:
        found.append([client.post("/v1/classify", content=body).json() for body in (*READ, *OTHERS)])
    users: list[threading.Thread] = []
    monkeypatch.setattr(loaders, "gpu_loader", lambda: users.append(threading.current_thread()) or codec)
    process = group(shared, bundle, ON_GPU)
    with front_end(process, bundle, ON_GPU) as client:
        found.append([client.post("/v1/classify", content=body).json() for body in (*READ, *OTHERS)])
        (model,) = client.get("/info").json()["models"]
        metrics = client.get("/metrics").text
        assert client.app.state.service.registry.jpegs == 0
    assert set(users) == {process.thread}
    assert model["decode"] == "nvimagecodec"
    assert "sopdeploy_decoders 2.0" in metrics  # none waits for the GPU
    batches = codec._decoder.batches
    assert len(batches) == 2 * len(READ) + 2 * (fit == "pad")  # padded, a strip is no exception
    np.testing.assert_array_equal(alone.images, shared.images)
    shown = [[(reply["classes"], reply["warnings"]) for reply in replies] for replies in found]
    assert shown[0] == shown[1]


LEFT = Image.new("RGB", (300, 200), (128, 128, 128))  # the last pixel has libjpeg's color for missing data
SAVED = io.BytesIO()
LEFT.save(SAVED, "JPEG")
# What the GPU gets and does -> status, code, counted failures, batches of the GPU.
NOT_ON_GPU: dict[str, tuple[bytes, bool, int, tuple[int, str | None, str, list[int]]]] = {
    "the GPU fails": (READ[0], True, 32, (200, None, "1.0", [1])),
    "the GPU is busy": (READ[0], False, 0, (200, None, "0.0", [])),
    "a file too long for a message": (encode((900, 700)), False, 32, (200, None, "0.0", [])),
    "a gray corner": (SAVED.getvalue(), False, 32, (200, None, "0.0", [1])),
    "a truncated file": (READ[3][:-2000] + b"\xff\xd9", False, 32, (422, "truncated_image", "0.0", [1])),
    "a header only": (READ[0][:20] + b"\xff\xd9", False, 32, (422, "damaged_image", "0.0", [])),
}


@pytest.mark.parametrize("case", NOT_ON_GPU)
def test_a_front_end_decodes_what_the_gpu_does_not(group, bundle, codec, monkeypatch, case) -> None:
    body, fails, jpegs, expected = NOT_ON_GPU[case]
    monkeypatch.setattr("sopdeploy_service.front_ends.remote.MAX_JPEGS", jpegs)
    monkeypatch.setattr("sopdeploy_service.front_ends.remote.MAX_MESSAGE_BYTES", 200_000)
    codec._decoder.fail = (lambda bodies: [None] * len(bodies)) if fails else None
    with front_end(group(FakeRuntime(num_classes=7), bundle, ON_GPU), bundle, ON_GPU) as client:
        reply = client.post("/v1/classify", content=body)
        page = client.get("/metrics").text
    failed = re.search(r"sopdeploy_failed_gpu_decodes_total (\d.*)", page)[1]
    assert (reply.status_code, reply.json().get("code"), failed, codec._decoder.batches) == expected


def test_front_ends_decode_what_the_inference_process_has_no_room_for(
    group, bundle, codec, monkeypatch, until
) -> None:
    monkeypatch.setattr("sopdeploy_service.images.nvimagecodec.LARGEST_DECODE_BATCH", 1)
    codec._decoder.open.clear()
    process = group(FakeRuntime(num_classes=7), bundle, ON_GPU)
    with front_end(process, bundle, ON_GPU) as client, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.post, "/v1/classify", content=READ[0])]
        until(lambda: len(codec._decoder.batches) == 1)  # it is decoded
        waiting.append(pool.submit(client.post, "/v1/classify", content=READ[0]))
        until(lambda: len(codec._waiting) == 1)
        assert client.post("/v1/classify", content=READ[0]).status_code == 200
        assert not any(reply.done() for reply in waiting)
        codec._decoder.open.set()
        assert [reply.result().status_code for reply in waiting] == [200, 200]


def test_an_inference_process_whose_gpu_decoder_hangs_ends(group, bundle, codec) -> None:
    codec._decoder.open.clear()
    settings = ON_GPU.model_copy(update={"decode_seconds": 0.2})
    process = group(FakeRuntime(num_classes=7), bundle, settings)
    with front_end(process, bundle, ON_GPU) as client:
        assert client.post("/v1/classify", content=READ[0]).status_code == 503
    process.thread.join(20)
    assert process.code == EXIT_RUNTIME_DEAD
    codec._decoder.open.set()


def test_with_keep_a_front_end_gets_the_pixels_that_the_gpu_has_decoded(
    group, bundle, codec, tmp_path
) -> None:
    runtime, seen = Recording(), []
    process = group(runtime, bundle, ON_GPU.model_copy(update={"keep": tmp_path}))
    with front_end(process, bundle, ON_GPU) as client:
        observers = client.app.state.service.observers
        observers.append(lambda request: seen.extend(pixels for _, pixels, _ in request.predicted()))
        for path in ("/v1/classify", "/v1/classify?explain=true"):
            assert client.post(path, content=READ[0]).status_code in {200, 400}
    np.testing.assert_array_equal(seen, runtime.images)


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
        assert runtime.entered.wait(20)
        shared.control.close()
        reply = held.result()
        runtime.gate.set()  # otherwise the thread of this test would stay
        assert (reply.status_code, reply.headers["retry-after"]) in {(503, "5"), (503, "1")}
        shared.thread.join(20)
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


def jpeg_of(width: int, height: int, size: int = 100) -> bytes:
    return message(MessageKind.JPEG, 1, image(size=0) + JPEG_HEAD.pack(width, height, 1) + bytes(size))


ATTACKS = {
    "no pixels": message(MessageKind.IMAGE, 1, image(size=0)),
    "too many pixels": message(MessageKind.IMAGE, 1, image(size=IMAGE_BYTES + 1)),
    "half a header": message(MessageKind.IMAGE, 1, b"x"),
    "an image that is sent twice": message(MessageKind.IMAGE, 1, image()) * 2,
    "too many images": b"".join(message(MessageKind.IMAGE, number, image()) for number in range(17)),
    "an unknown message": message(99, 0),
    "an image for an unknown model": message(MessageKind.IMAGE, 1, image(model=1)),
    "a body of 4 GB": HEADER.pack(MessageKind.IMAGE, 1, 0xFFFF_FFFF),
    "a JPEG for a model whose images the front ends decode": jpeg_of(40, 30),
    "half a header of a JPEG": message(MessageKind.JPEG, 1, image(size=0) + bytes(8)),
    "a JPEG without pixels": jpeg_of(0, 30),
    "a JPEG with too many pixels": jpeg_of(65_000, 65_000),
    "a strip": jpeg_of(20_000, 1),
    "a JPEG of too many bytes": jpeg_of(40, 30, ON_GPU.max_body_bytes + 1),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_front_end_that_breaks_the_protocol_is_replaced(
    group, bundle, make_picture, until, monkeypatch, attack
) -> None:
    takes_all = SimpleNamespace(put=lambda _: True, hangs=lambda _: False)
    monkeypatch.setattr(loaders, "gpu_loader", lambda: takes_all)
    runtime = Held()
    shared = group(runtime, settings=LIMITED if "front ends decode" in attack else ON_GPU)
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

        def run_outputs(self, images, names):
            self.gate.wait(20)
            self.batches.append(len(images))
            return super().run_outputs(images, names)

    maps = open_bundle(write_bundle_with_maps(bundle_path, tmp_path))
    runtime = Gated(maps, threads=1)
    paths = ["/v1/classify", "/v1/classify?explain=true", "/v1/embed", "/v1/classify?gates=true"]
    shared = group(runtime, maps)
    with front_end(shared, bundle) as client, ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(client.post, path, content=jpeg) for path in paths]
        until(lambda: shared.process._queued_images == len(paths))
        runtime.gate.set()
        together = [reply.result().json() for reply in replies]
        alone = [client.post(path, content=jpeg).json() for path in paths]
    assert max(runtime.batches) > 1
    assert [found.keys() for found in together] == [found.keys() for found in alone]
    assert together[2]["embedding"] == pytest.approx(alone[2]["embedding"])
