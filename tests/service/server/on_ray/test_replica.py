"""A replica as Ray calls it, without Ray: bundles come and go, its health is the service's."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from sopdeploy.errors import ConfigError, ParityError, RuntimeUnavailableError, SopdeployError
from sopdeploy_service.server.on_ray.replica import Replica
from sopdeploy_service.settings import FAULTS_VARIABLE

BuildResult = Callable[..., Path]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory, make_bundle: BuildResult) -> list[Path]:
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


def told(*bundles: Path) -> dict[str, Any]:
    return {"bundles": {f"model{number}": str(path) for number, path in enumerate(bundles)}}


def ids(replica: Replica) -> list[str]:
    return [
        model.bundle.path.name
        for model in replica.service.registry.models()
        if replica.service.registry.find(model.name) is model
    ]


def live(life: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(life(), 60))  # type: ignore[arg-type]


def client_of(replica: Replica) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(replica.asgi), base_url="http://replica")


def test_it_is_healthy_as_soon_as_it_has_a_bundle(versions: list[Path], jpeg: bytes) -> None:
    async def life() -> None:
        async with started() as replica, client_of(replica) as client:
            with pytest.raises(ConfigError, match="user_config"):
                await replica.check_health()
            await replica.reconfigure(told(versions[0]))
            await replica.check_health()
            answer = await client.post("/v1/classify", content=jpeg, headers={"content-type": "image/jpeg"})
            assert answer.status_code == 200
            assert answer.headers["x-model-digest"] in versions[0].name

    live(life)


def test_it_follows_the_bundles_that_it_is_told(versions: list[Path]) -> None:
    first, second, third = versions

    async def life() -> None:
        async with started() as replica:
            for wanted in ([first], [second], [first, third], [third], [third]):
                await replica.reconfigure(told(*wanted))
                assert ids(replica) == [path.name for path in wanted]

    live(life)


def test_going_back_opens_nothing(versions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = versions

    async def life() -> None:
        async with started() as replica:
            await replica.reconfigure(told(first))
            await replica.reconfigure(told(second))
            opened = "sopdeploy_service.server.on_ray.replica.load_model"
            monkeypatch.setattr(opened, lambda *_, **__: pytest.fail("opened anew"))
            await replica.reconfigure(told(first))
            await replica.reconfigure(told(first))
            assert ids(replica) == [first.name]
            assert len(replica.service.registry.models()) == 2

    live(life)


def test_no_request_is_lost_while_bundles_change(versions: list[Path], jpeg: bytes) -> None:
    async def life() -> None:
        async with started() as replica, client_of(replica) as client:
            await replica.reconfigure(told(versions[0]))
            asking, answers = True, []

            async def ask() -> None:
                while asking:
                    answers.append(await client.post("/v1/classify", content=jpeg))

            clients = [asyncio.create_task(ask()) for _ in range(4)]
            for path in (*versions, *versions):
                await replica.reconfigure(told(path))
                await asyncio.sleep(0.05)
            asking = False
            await asyncio.gather(*clients)
            assert {answer.status_code for answer in answers} == {200}
            assert {answer.headers["x-model-digest"] for answer in answers} == {
                path.name.rpartition("-")[2] for path in versions
            }

    live(life)


def test_of_several_bundles_one_that_is_wrong_changes_nothing(
    versions: list[Path], wrong_bundle_path: Path
) -> None:
    async def life() -> None:
        async with started() as replica:
            await replica.reconfigure(told(versions[0]))
            with pytest.raises(ParityError):
                await replica.reconfigure(told(versions[1], wrong_bundle_path))
            await replica.check_health()
            assert ids(replica) == [versions[0].name]

    live(life)


@pytest.mark.parametrize(
    "given", [None, {}, [], {"bundles": {}}, {"bundles": {"a": 1}}, {"bundles": {"a": "b"}, "c": 1}], ids=str
)
def test_a_user_config_of_another_form_is_refused(given: Any) -> None:
    async def life() -> None:
        async with started() as replica:
            with pytest.raises(ConfigError, match="user_config"):
                await replica.reconfigure(given)

    live(life)


def test_a_path_without_a_bundle_is_refused(tmp_path: Path) -> None:
    async def life() -> None:
        async with started() as replica:
            with pytest.raises(SopdeployError, match="no-bundle"):
                await replica.reconfigure(told(tmp_path / "no-bundle"))

    live(life)


def test_settings_for_one_process_are_refused() -> None:
    with pytest.raises(ConfigError, match="health_port"):
        Replica({"health_port": 9000})


def test_a_dead_engine_answers_what_waits_and_then_ends_the_process(
    versions: list[Path], jpeg: bytes, monkeypatch: pytest.MonkeyPatch, until: Callable[..., None]
) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "engine=hang@1")
    monkeypatch.setattr("sopdeploy_service.inference.fault_injection.HANG_SECONDS", 2.0)

    async def life() -> None:
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        async with started(engine_timeout_seconds=0.2) as replica, client_of(replica) as client:
            replica.leave = ended.set_result
            replica.watch()
            await replica.reconfigure(told(versions[0]))
            answers = await asyncio.gather(*(client.post("/v1/classify", content=jpeg) for _ in range(3)))
            assert {answer.json()["code"] for answer in answers} == {"engine_dead"}
            with pytest.raises(RuntimeUnavailableError, match="engine_dead"):
                await replica.check_health()
            assert await ended == 70

    live(life)
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "model_worker"])
