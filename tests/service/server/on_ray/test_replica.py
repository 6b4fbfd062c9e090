"""The replica without Ray: bundle swaps, health checks and exit."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from sopdeploy.errors import ConfigError, ParityError, RuntimeUnavailableError, SopdeployError
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.server.on_ray.replica import Replica

MakeBundle = Callable[..., Path]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory, make_bundle: MakeBundle) -> list[Path]:
    folder = tmp_path_factory.mktemp("versions")
    return [make_bundle(folder / str(seed), seed=seed) for seed in range(3)]


@asynccontextmanager
async def started(**settings: Any) -> AsyncIterator[Replica]:
    replica = Replica({"threads": 1, **settings})
    try:
        async with replica.asgi.router.lifespan_context(replica.asgi):
            yield replica
    finally:
        replica.close()


def config_of(*bundles: Path) -> dict[str, Any]:
    return {"bundles": {f"model{number}": str(path) for number, path in enumerate(bundles)}}


def ids(replica: Replica) -> list[str]:
    return [
        model.bundle.path.name
        for model in replica.service.registry.models()
        if replica.service.registry.find(model.name) is model
    ]


def in_event_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run the coroutine of a test for at most a minute."""

    @wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **fixtures), 60))

    return run


def client_of(replica: Replica) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(replica.asgi), base_url="http://replica")


@in_event_loop
async def test_a_replica_is_healthy_with_a_bundle(versions: list[Path], jpeg: bytes) -> None:
    async with started() as replica, client_of(replica) as client:
        with pytest.raises(ConfigError, match="user_config"):
            await replica.check_health()
        await replica.reconfigure(config_of(versions[0]))
        await replica.check_health()
        answer = await client.post("/v1/classify", content=jpeg, headers={"content-type": "image/jpeg"})
        assert answer.status_code == 200
        assert answer.headers["x-model-digest"] in versions[0].name


@in_event_loop
async def test_reconfigure_serves_exactly_the_named_bundles(versions: list[Path]) -> None:
    first, second, third = versions
    async with started() as replica:
        for wanted in ([first], [second], [first, third], [third], [third]):
            await replica.reconfigure(config_of(*wanted))
            assert ids(replica) == [path.name for path in wanted]


@in_event_loop
async def test_switching_back_loads_nothing(versions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = versions
    async with started() as replica:
        await replica.reconfigure(config_of(first))
        await replica.reconfigure(config_of(second))
        opened = "sopdeploy_service.server.on_ray.replica.load_model"
        monkeypatch.setattr(opened, lambda *_, **__: pytest.fail("loaded again"))
        await replica.reconfigure(config_of(first))
        await replica.reconfigure(config_of(first))
        assert ids(replica) == [first.name]
        assert len(replica.service.registry.models()) == 2


@in_event_loop
async def test_no_request_is_lost_while_bundles_change(versions: list[Path], jpeg: bytes) -> None:
    async with started() as replica, client_of(replica) as client:
        await replica.reconfigure(config_of(versions[0]))
        asking, answers = True, []

        async def ask() -> None:
            while asking:
                answers.append(await client.post("/v1/classify", content=jpeg))

        clients = [asyncio.create_task(ask()) for _ in range(4)]
        for path in (*versions, *versions):
            await replica.reconfigure(config_of(path))
            await asyncio.sleep(0.05)
        asking = False
        await asyncio.gather(*clients)
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["x-model-digest"] for answer in answers} == {
            path.name.rpartition("-")[2] for path in versions
        }


@in_event_loop
async def test_an_invalid_or_missing_bundle_keeps_the_previous_ones(
    versions: list[Path], wrong_bundle_path: Path, tmp_path: Path
) -> None:
    async with started() as replica:
        await replica.reconfigure(config_of(versions[0]))
        with pytest.raises(ParityError):
            await replica.reconfigure(config_of(versions[1], wrong_bundle_path))
        with pytest.raises(SopdeployError, match="no-bundle"):
            await replica.reconfigure(config_of(tmp_path / "no-bundle"))
        await replica.check_health()
        assert ids(replica) == [versions[0].name]


@pytest.mark.parametrize("given", [None, {"bundles": {}}, {"bundles": {"a": "b"}, "c": 1}], ids=str)
@in_event_loop
async def test_an_invalid_user_config_is_rejected(given: Any) -> None:
    async with started() as replica:
        with pytest.raises(ConfigError, match="user_config"):
            await replica.reconfigure(given)


@in_event_loop
async def test_a_dead_runtime_exits_the_process_after_its_responses(
    versions: list[Path], jpeg: bytes, monkeypatch: pytest.MonkeyPatch, until: Callable[..., None]
) -> None:
    run = OnnxRuntime.run_outputs

    def hang(
        runtime: OnnxRuntime, images: NDArray[np.uint8], names: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        if threading.current_thread().name == "model_worker":  # not when the probes are replayed
            time.sleep(2.0)
        return run(runtime, images, names)

    monkeypatch.setattr(OnnxRuntime, "run_outputs", hang)
    others = set(threading.enumerate())
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with started(batch_timeout_seconds=0.2) as replica, client_of(replica) as client:
        replica.leave = ended.set_result
        replica.watch()
        await replica.reconfigure(config_of(versions[0]))
        answers = await asyncio.gather(*(client.post("/v1/classify", content=jpeg) for _ in range(3)))
        assert {answer.json()["code"] for answer in answers} == {"runtime_dead"}
        with pytest.raises(RuntimeUnavailableError, match="runtime_dead"):
            await replica.check_health()
        assert await ended == 70
    workers = [t for t in set(threading.enumerate()) - others if t.name == "model_worker"]
    until(lambda: not any(worker.is_alive() for worker in workers))
