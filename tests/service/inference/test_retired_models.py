"""A replaced model is released: its objects, its runtime and its metrics."""

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.service.raw import connect, post_of, read

SETTINGS = Settings(threads=1)
Running = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.fixture
def versions(tmp_path: Path, make_bundle: Callable[..., Path]) -> list[Path]:
    """Two versions of the tiny network."""
    return [make_bundle(tmp_path, probes=number) for number in (3, 4)]


def send_every_kind_of_request(client: httpx.Client, jpeg: bytes) -> None:
    """Send requests of every kind; disconnect once within a body and once during inference."""
    for body, status in ({"content": jpeg}, 200), ({"content": b"text"}, 415):
        assert client.post("/v1/classify", **body).status_code == status
    assert client.post("/v1/classify", files=[("image", jpeg), ("image", b"text")]).status_code == 200
    for path in ("/v2/models/tiny", "/selftest", "/metrics", "/info"):
        assert client.get(path).status_code == 200
    for sent in (len(jpeg) // 2, len(jpeg)):
        with connect(client) as wire:
            wire.sendall(post_of(jpeg)[: sent - len(jpeg) or None])
            time.sleep(0.02)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Disable the garbage collector: reference counting must release a model."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_replaced_model_is_released_though_idle_connections_stay(
    versions: list[Path], run_server: Running, jpeg: bytes, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OnnxRuntime.run

    def slow(runtime: OnnxRuntime, images: Any) -> Any:
        time.sleep(0.01)
        return run(runtime, images)

    monkeypatch.setattr(OnnxRuntime, "run", slow)
    first = load_model(versions[0], SETTINGS)
    with run_server(first.runtime, first.bundle, SETTINGS) as client:
        registry = client.app.state.service.registry
        models = [weakref.ref(registry.find())]
        idle = []
        for number in range(1, 7):
            idle.append(connect(client))
            idle[-1].sendall(post_of(jpeg))
            assert read(idle[-1], to_the_end=False).status == 200
            send_every_kind_of_request(client, jpeg)
            client.reload(versions[number % 2])
            models.append(weakref.ref(registry.find()))
        until(lambda: sum(model() is not None for model in models) == 1)
        until(lambda: client.get("/metrics").text.count("bundle_info{") == 1)
        for wire in idle:
            wire.close()
