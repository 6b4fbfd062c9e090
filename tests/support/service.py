"""A tiny bundle, pictures in every format, and real servers in threads of this process."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image

from sopdeploy.base.project import utc_now
from sopdeploy.bundle.decision import Decision
from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.bundle.manifest import FileRecord, to_json
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model_registry import ModelRegistry
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.server.draining_server import http_config
from sopdeploy_service.server.sockets import bind, url
from sopdeploy_service.settings import Settings
from tests.support.fake_runtime import FakeRuntime
from tests.support.forged import graph, write_computed
from tests.support.pictures import encoded

LABELS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
RULES = Preprocess(resize=36, crop=32)


TINY = """
tiny (uint8[n, 32, 32, 3] images) => (float[n, 7] logits)
<float[3, 7] weights, int64[2] axes = {1, 2}>
{
    wide = Cast <to = 1> (images)
    colour = ReduceMean <keepdims = 0> (wide, axes)
    logits = MatMul (colour, weights)
}
"""


def tiny_graph(seed: int = 0) -> onnx.ModelProto:
    """uint8 images (n, 32, 32, 3) to logits (n, 7): a linear layer over the mean colour, by *seed*."""
    weights = np.random.default_rng(seed).normal(size=(3, len(LABELS))).astype(np.float32) / 40
    return graph(TINY, weights=weights)


def write_bundle(
    folder: Path,
    *,
    wrong_by: float = 0.0,
    probes: int = 3,
    output: str = "logits",
    seed: int = 0,
    decision: Decision | None = None,
    preprocess: Preprocess = RULES,
    project: str = "tiny",
    exported_at: str | None = None,
    labels: Sequence[str] = LABELS,
) -> Path:
    """Write the tiny bundle into *folder*, with so many probes of *output*, *wrong_by* so much.

    It is exported now or at *exported_at*.
    """
    images = np.random.default_rng(1).integers(0, 256, (probes, 32, 32, 3), dtype=np.uint8)
    fields = {"project": project, "exported_at": exported_at or utc_now(), "decision": decision}
    return write_computed(
        folder, tiny_graph(seed), images, 1e-4, preprocess=preprocess, labels=labels, wrong_by=wrong_by,
        renamed={"logits": output}, config={}, detached=(), **fields,
    )  # fmt: skip


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    return open_bundle(bundle_path)


def deciding(bundle: Bundle, decision: Decision | None) -> Bundle:
    """Return *bundle* with another *decision*."""
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"decision": decision}))


CARD = """# tiny

A **linear** layer over the mean colour. <img src=x onerror=alert(1)>

- one entry
  that goes on
- `two`

    sopdeploy verify .
"""


@pytest.fixture(scope="session")
def carded_bundle(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with a model card and a certificate."""
    from sopdeploy_export.prove.certificate import Certificate, Roots  # imports torch
    from sopdeploy_export.prove.removed import TensorEntry

    folder = tmp_path_factory.mktemp("carded")
    entry = TensorEntry(name="x", shape=(2,), dtype="float32", bytes=8, sha256="3" * 64)
    roots = Roots(any_batch="4" * 64, num_operations=3, onnx="6" * 64, shipped="6" * 64)
    certificate = Certificate(
        model="tiny", detached=("gate.noise",), removed=(entry,), kept=(entry, entry), roots=roots,
        statements={"Removed": "proved"}, batches=(1,), num_images=12, mixes_images=(), precision="fp32",
    )  # fmt: skip
    (folder / "certificate.json").write_bytes(to_json(certificate.model_dump(mode="json")))
    (folder / "README.md").write_text(CARD)
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    files = {
        name: FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }
    manifest = bundle.manifest.model_copy(update={"files": {**bundle.manifest.files, **files}})
    return replace(bundle, path=folder, manifest=manifest, contents=contents)


@pytest.fixture
def carded_client(carded_bundle: Bundle) -> "Iterator[Client]":
    with running(FakeRuntime(num_classes=7), carded_bundle, Settings()) as client:
        yield client


class SharedRuntime(OnnxRuntime):
    """A runtime that serves one server after the other."""

    def close(self) -> None:
        """Stay open for the next test."""


@pytest.fixture(scope="session")
def onnx_runtime(bundle: Bundle) -> OnnxRuntime:
    return SharedRuntime(bundle, Settings(threads=1))


def picture_bytes(
    colour: tuple[int, int, int] = (200, 30, 60),
    size: tuple[int, int] = (50, 40),
    kind: str = "JPEG",
) -> bytes:
    """A picture with a gradient, so that geometry and colour both show in the answer."""
    grid = np.linspace(0.5, 1.0, size[0] * size[1]).reshape(size[1], size[0], 1)
    return encoded(Image.fromarray((grid * np.array(colour)).astype(np.uint8)), kind)


@pytest.fixture(scope="session")
def jpeg() -> bytes:
    return picture_bytes()


class Client(httpx.Client):
    """A client that also knows the app it talks to, and its loop, in another thread of this process."""

    app: FastAPI
    loop: asyncio.AbstractEventLoop

    def reload(self, *sources: str | Path) -> None:
        """Let the server serve the bundles of *sources*."""
        work = self.app.state.service.registry.reload(sources)
        asyncio.run_coroutine_threadsafe(work, self.loop).result(60)


@contextmanager
def in_a_thread(config: uvicorn.Config) -> Iterator[tuple[uvicorn.Server, str]]:
    """Run a server on a free loopback port in a thread of this process; yield it and its URL."""
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, daemon=True
        )
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield server, url(listener)
        finally:
            server.should_exit = True
            thread.join(60)
        assert not thread.is_alive()


@contextmanager
def running(
    runtime: Runtime,
    bundle: Bundle,
    settings: Settings,
    *,
    names: Iterable[str] = ("tiny",),
    registry: ModelRegistry | None = None,
    **options: Any,
) -> Iterator[Client]:
    """A real server for *runtime*, under each of *names*, on a free loopback port; gives a client for it.

    With *registry*, it serves the models of this one instead. *options* go to `create_app`.
    """
    inference = LoadedModel(bundle=bundle, runtime=runtime, replays={})
    app = create_app(registry or dict.fromkeys(names, inference), settings, **options)
    limits = httpx.Limits(max_connections=200)
    with (
        in_a_thread(http_config(app, settings)) as (server, address),
        Client(base_url=address, timeout=60, limits=limits) as client,
    ):
        client.app = app
        client.loop = server.servers[0].get_loop()
        yield client


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until *condition* holds; fail after *seconds*."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(24) as pool:
        yield pool


@pytest.fixture
def serve_with(bundle: Bundle) -> Iterator[Callable[..., httpx.Client]]:
    """`serve_with(runtime, **settings)` starts a server and returns a client for it."""
    with ExitStack() as stack:
        yield lambda runtime, **settings: stack.enter_context(
            running(runtime, bundle, Settings(**settings))
        )


@pytest.fixture(scope="module")
def client(bundle: Bundle, onnx_runtime: OnnxRuntime) -> Iterator[httpx.Client]:
    """A client of one server with the real runtime and low limits, shared by a test module."""
    settings = Settings(max_body_bytes=1_000_000, max_images=8, request_timeout=10)
    with running(onnx_runtime, bundle, settings) as client:
        yield client
