"""Front ends and an inference process in threads of this process, connected as real processes are."""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import httpx
import pytest

from sopdeploy.bundle.class_maps import read_class_maps
from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy_service.front_ends.channel import HEADER, IMAGE, RESULT, Kind, receive_blocking
from sopdeploy_service.front_ends.inference_process import CODES, InferenceProcess
from sopdeploy_service.front_ends.memory import PixelMemory, create_memory_file
from sopdeploy_service.front_ends.rate_limits import SharedSpending
from sopdeploy_service.front_ends.remote import RemoteRegistry
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.inference.results import RejectedError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.fake import FakeRuntime
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.service.bundle_with_maps import write_bundle_with_maps
from tests.service.conftest import Client, open_files, running
from tests.service.held import Held

IMAGE_BYTES = 32 * 32 * 3
MEMORY = 8 * IMAGE_BYTES


class Group:
    """An inference process and what connects front ends to it, as the supervisor does."""

    def __init__(
        self, models: dict[str, LoadedModel], settings: Settings, store: BundleStore | None = None
    ) -> None:
        self.settings = settings
        self.broker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        async def run() -> None:
            registry = ModelRegistry(models, settings, Metrics(), store)
            self.code = await InferenceProcess(registry, theirs, max_images=16).run()

        self.thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        self.thread.start()

    def connect(self, memory_bytes: int = MEMORY) -> tuple[socket.socket, PixelMemory]:
        """Return the channel and the memory of a new front end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        file = create_memory_file(memory_bytes)
        with ours:
            socket.send_fds(self.broker, [b"0"], [ours.fileno(), file])
        return theirs, PixelMemory(file)

    def stop(self) -> None:
        self.broker.close()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def group(bundle: Bundle) -> Iterator[Callable[..., Group]]:
    """`group(runtime, bundle)` starts an inference process."""
    with ExitStack() as stack:

        def start(runtime: Runtime, used: Bundle = bundle) -> Group:
            maps = read_class_maps(used.path, used.manifest)
            loaded = LoadedModel(bundle=used, runtime=runtime, replays={}, class_maps=maps)
            started = Group({"tiny": loaded}, Settings())
            stack.callback(started.stop)
            return started

        yield start


@contextmanager
def front_end(group: Group, bundle: Bundle, memory_bytes: int = MEMORY) -> Iterator[Client]:
    """A server without a runtime of its own; `memory` is what it shares with the inference process."""
    connection, memory = group.connect(memory_bytes)

    def create_registry(settings: Settings, metrics: Metrics) -> RemoteRegistry:
        return RemoteRegistry(connection, memory, settings, metrics)

    with running(
        FakeRuntime(classes=7), bundle, group.settings, names=(), create_registry=create_registry
    ) as client:
        client.memory = memory
        yield client


def is_free(memory: PixelMemory) -> bool:
    """Whether no image uses the memory."""
    offset = memory.take(MEMORY)
    if offset is not None:
        memory.give_back(offset)
    return offset is not None


def test_images_for_which_the_memory_is_too_small_are_sent_with_their_message(group, bundle, jpeg) -> None:
    with front_end(group(FakeRuntime(classes=7)), bundle, memory_bytes=IMAGE_BYTES) as client:
        alone = client.post("/v1/classify", content=jpeg).json()
        together = client.post("/v1/classify", files=[("image", jpeg)] * 5).json()["results"]
    assert together == [alone] * 5


def test_models_are_released_after_their_last_request(bundle, make_bundle, tmp_path, jpeg, until) -> None:
    settings = Settings(model_control=True, threads=1)
    paths = [make_bundle(tmp_path, seed=seed) for seed in range(3)]
    model = load_model(paths[0], settings)
    threads = set(threading.enumerate())
    shared = Group({"tiny": model}, settings, BundleStore([f"tiny={paths[0]}"]))

    def workers() -> int:
        return sum(thread.name == "model_worker" for thread in set(threading.enumerate()) - threads)

    with front_end(shared, bundle) as client, front_end(shared, bundle) as other:
        for path in paths[1:]:
            load = {"parameters": {"folder": path.name}}
            assert client.post("/v2/repository/models/tiny/load", json=load).status_code == 200
            assert other.post("/v1/classify", content=jpeg).headers["x-model-digest"] in path.name
        until(lambda: workers() == 2)  # the current and the previous version
        assert client.post("/v2/repository/models/tiny/unload").status_code == 200
        assert other.get("/readyz").json() == {"status": "no_model"}
        until(lambda: workers() == 0)
    shared.stop()
    assert shared.code == 0


def test_images_of_ended_requests_leave_the_queue_and_the_memory(group, bundle, jpeg, until) -> None:
    runtime = Held(largest_batch=1)
    with front_end(group(runtime), bundle) as client:
        late = {"x-request-timeout-ms": "150"}
        codes = [client.post("/v1/classify", content=jpeg, headers=late).status_code for _ in range(3)]
        assert codes[0] == 504
        assert set(codes) <= {503, 504}  # the estimate may already know
        with contextlib.suppress(httpx.ReadTimeout):
            client.post("/v1/classify", content=jpeg, timeout=0.2)
        runtime.gate.set()
        until(lambda: is_free(client.memory))
        assert len(runtime.batches) <= 2
        assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_when_the_inference_process_dies_its_requests_get_503_and_the_front_end_is_dead(
    group, bundle, jpeg
) -> None:
    runtime = Held()
    shared = group(runtime)
    with front_end(shared, bundle) as client, ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.post, "/v1/classify", content=jpeg)
        assert runtime.entered.wait(20)
        shared.broker.close()
        threading.Timer(0.5, runtime.gate.set).start()  # otherwise the thread of this test would stay
        reply = held.result()
        assert (reply.status_code, reply.headers["retry-after"]) in {(503, "5"), (503, "1")}
        shared.thread.join(20)
        assert client.post("/v1/classify", content=jpeg).json()["code"] == "engine_dead"
        assert client.get("/livez").json() == {"status": "engine_dead"}


def message(kind: int, number: int, body: bytes = b"") -> bytes:
    return HEADER.pack(kind, number, len(body)) + body


def image(model: int = 1, offset: int = 0) -> bytes:
    return IMAGE.pack(model, offset, 0, 0.0, float("inf"))


ATTACKS = {
    "memory that does not exist": message(Kind.IMAGE, 1, image(offset=MEMORY)),
    "a negative offset": message(Kind.IMAGE, 1, image(offset=-2)),
    "pixels that are missing": message(Kind.IMAGE, 1, image(offset=-1)),
    "an image that is sent twice": message(Kind.IMAGE, 1, image()) * 2,
    "too many images": b"".join(message(Kind.IMAGE, number, image()) for number in range(17)),
    "an unknown message": message(99, 0),
    "a command without JSON": message(Kind.COMMAND, 1, b"{"),
    "a body of 4 GB": HEADER.pack(Kind.IMAGE, 1, 0xFFFF_FFFF),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_front_end_that_breaks_the_protocol_is_disconnected(group, bundle, jpeg, attack) -> None:
    runtime = Held()
    shared = group(runtime)
    connection, _ = shared.connect()
    with connection:
        connection.sendall(ATTACKS[attack])
        with contextlib.suppress(ConnectionError):
            while True:
                receive_blocking(connection)
    runtime.gate.set()
    with front_end(shared, bundle) as client:
        assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_an_image_for_a_model_that_was_released_is_rejected(group) -> None:
    connection, _ = group(FakeRuntime(classes=7)).connect()
    with connection:
        connection.sendall(message(Kind.RELEASE, 1) + message(Kind.IMAGE, 5, image()))
        kind = 0
        while kind != Kind.RESULT:
            kind, number, body = receive_blocking(connection)
        assert (number, RESULT.unpack(body)[0]) == (5, CODES["draining"])


@pytest.mark.parametrize("seed", range(4))
def test_no_bytes_of_a_front_end_disturb_another_front_end(group, bundle, jpeg, until, seed) -> None:
    random = Random(seed)
    shared = group(FakeRuntime(classes=7))
    with front_end(shared, bundle) as client:
        assert client.post("/v1/classify", content=jpeg).status_code == 200  # opens a connection
        before = open_files()
        for _ in range(8):
            connection, memory = shared.connect()
            with connection, contextlib.suppress(OSError):
                for _ in range(random.choice([1, 20])):
                    body = random.choice([image(), random.randbytes(random.randrange(64))])
                    kind = random.choice([Kind.IMAGE, *Kind, 77])
                    connection.sendall(message(kind, random.randrange(4), body)[: random.randrange(1, 99)])
            del memory
        assert client.post("/v1/classify", content=jpeg).status_code == 200
        until(lambda: open_files() <= before)


def test_front_ends_share_the_rate_limit_of_a_key() -> None:
    file = SharedSpending.create(2)
    buckets = [SharedSpending(file, row, 2).create_bucket(1e-6, 10, 3) for row in range(2)]
    os.close(file)
    buckets[0].spend(6)
    buckets[1].spend(4)
    for bucket in buckets:
        with pytest.raises(RejectedError):
            bucket.spend(1)
        assert bucket.headers()["RateLimit-Remaining"] == "0"


def test_a_batch_may_have_images_with_and_without_features(
    group, bundle, bundle_path: Path, tmp_path: Path, make_picture, until
) -> None:
    class Gated(OnnxRuntime):
        gate, batches = threading.Event(), []

        def run_outputs(self, images, names):
            self.gate.wait(20)
            self.batches.append(len(images))
            return super().run_outputs(images, names)

    maps = open_bundle(write_bundle_with_maps(bundle_path, tmp_path))
    runtime = Gated(maps, threads=1)
    pictures = [make_picture((9, 200 - 20 * number, 60)) for number in range(5)]
    queries = ["", "?explain=true", "", "?explain_label=dog", "?gates=true"]

    def post(client: Client, number: int) -> object:
        return client.post(f"/v1/classify{queries[number]}", content=pictures[number]).json()

    with front_end(group(runtime, maps), bundle) as client, ThreadPoolExecutor(5) as pool:
        replies = []
        for number in range(5):
            replies.append(pool.submit(post, client, number))
            until(lambda count=number + 1: client.app.state.service.admitted == count)
        runtime.gate.set()
        together = [reply.result() for reply in replies]
        alone = [post(client, number) for number in range(5)]
    assert max(runtime.batches) > 1
    for found, expected in zip(together, alone, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert numbers_in(found[key]) == pytest.approx(numbers_in(value), rel=1e-5), key


def numbers_in(value: object) -> list[float]:
    """List the numbers in *value*, a part of a JSON document."""
    if isinstance(value, dict):
        return [number for _, part in sorted(value.items()) for number in numbers_in(part)]
    if isinstance(value, list | tuple):
        return [number for part in value for number in numbers_in(part)]
    return [float(value)] if isinstance(value, int | float) else []
