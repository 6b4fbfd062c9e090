"""More models than memory: loaded at first use, released by last use, never above the budget."""

import asyncio
import re
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from prometheus_client import generate_latest

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.errors import BundleError, ConfigError, SopdeployError
from sopdeploy_service.inference import memory_budget
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.memory_budget import BudgetedRegistry
from sopdeploy_service.inference.model_worker import LocalModel
from sopdeploy_service.inference.results import DRAINING, RejectedError
from sopdeploy_service.settings import Settings, load_settings
from tests.support.fake_runtime import FakeRuntime
from tests.support.service import running, wait_for

ALERTS = Path(__file__).parents[3] / "deploy" / "helm" / "sopdeploy" / "alerts.yaml"
MB = 1_000_000
SIZE = 65 * MB  # more than a model with a tiny file is assumed to need

open_once = cache(open_bundle)


class Device:
    """Counts the models that the registry has loaded and not released; they must fit into *budget*."""

    def __init__(self, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
        load = partial(asyncio.to_thread, self.load)
        monkeypatch.setattr(memory_budget, "load_in_background", load)
        self.budget, self.loaded, self.loads = budget, 0, 0
        self.errors = list[SopdeployError]()
        self.gate = threading.Event()
        self.gate.set()

    def load(self, bundle: Bundle, _settings: Settings) -> LoadedModel:
        assert self.gate.wait(60)
        if self.errors:
            raise self.errors[0]
        self.loads += 1
        self.loaded += 1
        assert self.loaded <= self.budget // (64 * MB)
        runtime = FakeRuntime(num_classes=7)
        runtime.close = self._release  # type: ignore[method-assign]
        return LoadedModel(bundle=bundle, runtime=runtime, replays={})

    def _release(self) -> None:
        self.loaded -= 1


def run_with_registry(
    bundles: Mapping[str, Path],
    device: Device,
    scenario: Callable[[BudgetedRegistry], Awaitable[None]],
) -> None:
    """Run *scenario* with a started registry of *bundles* on *device*."""

    async def run() -> None:
        given = Settings.model_validate({"memory_budget": device.budget})
        opened = {name: open_once(path) for name, path in bundles.items()}
        registry = BudgetedRegistry(opened, given)
        await registry.start()
        await scenario(registry)
        await registry.stop()

    asyncio.run(run())
    assert device.loaded == 0


async def request(registry: BudgetedRegistry, name: str) -> bool:
    """Use the model *name*; return whether it was loaded already."""
    model = registry.find(name)
    with registry.use(model):
        assert (
            await registry.wait_until_loaded(model) if not model.is_loaded else model
        ).is_loaded
        return model.is_loaded


def test_the_alert_on_missing_servers_knows_one_that_has_loaded_nothing(
    bundle_path, monkeypatch
) -> None:
    async def scenario(registry: BudgetedRegistry) -> None:
        page = generate_latest(registry.metrics.registry).decode()
        series = re.findall(r"sopdeploy_\w+", rule["expr"])
        assert [name for name in series if f"\n{name}{{" in page] != []

    alerts = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]
    (rule,) = [rule for rule in alerts if rule.get("record") == "sopdeploy:serving"]
    run_with_registry({"a": bundle_path}, Device(SIZE, monkeypatch), scenario)


def test_bundles_under_a_budget_are_not_reloaded(bundle_path, monkeypatch, caplog) -> None:
    async def scenario(registry: BudgetedRegistry) -> None:
        before = registry.models()
        await registry.reload([bundle_path])  # with one model, under another name
        assert registry.models() == before

    run_with_registry({"a": bundle_path, "b": bundle_path}, Device(SIZE, monkeypatch), scenario)
    assert "not reloaded: impossible with memory_budget" in caplog.text


@pytest.mark.slow
def test_a_hundred_models_share_the_memory_of_ten_like_an_ideal_cache(
    bundle_path, monkeypatch
) -> None:
    device = Device(10 * SIZE, monkeypatch)
    names = [f"model{number}" for number in range(100)]
    popularity = 1 / np.arange(1, 101)
    drawn = np.random.default_rng(0).choice(100, 500, p=popularity / popularity.sum())

    async def scenario(registry: BudgetedRegistry) -> None:
        ideal, ideal_hits, hits = OrderedDict[str, None](), 0, 0
        for name in (names[number] for number in drawn):
            hits += await request(registry, name)
            ideal_hits += name in ideal
            ideal[name] = None
            ideal.move_to_end(name)
            if len(ideal) > 10:
                ideal.popitem(last=False)
        assert hits >= 0.95 * ideal_hits > 0
        assert device.loads == len(drawn) - hits
        assert len(registry.models()) == 100

    run_with_registry(dict.fromkeys(names, bundle_path), device, scenario)


def test_models_in_use_stay_and_are_waited_for(bundle_path, monkeypatch) -> None:
    device = Device(2 * SIZE, monkeypatch)

    async def scenario(registry: BudgetedRegistry) -> None:
        used, model = registry.find("used"), registry.find("a")
        with registry.use(used), registry.use(model):
            await registry.wait_until_loaded(used)
            await registry.wait_until_loaded(model)
            with monkeypatch.context() as patch:
                patch.setattr(memory_budget, "ROOM_SECONDS", 0.0)
                with pytest.raises(RejectedError) as error:
                    await request(registry, "b")
            assert (error.value.reason.status, error.value.reason.code) == (503, "memory_full")
            assert error.value.reason.retry_after
            waiting = asyncio.create_task(request(registry, "b"))
            await asyncio.sleep(0)
        await waiting
        assert await request(registry, "a")
        assert not await request(registry, "used")  # it was used longest ago

    run_with_registry(dict.fromkeys(("used", "a", "b"), bundle_path), device, scenario)


def test_requests_wait_for_one_load_and_see_its_time(bundle, jpeg, monkeypatch) -> None:
    device = Device(70 * MB, monkeypatch)
    bundles = {"a": bundle, "b": bundle}
    settings = Settings.model_validate({"memory_budget": device.budget})
    registry = BudgetedRegistry(bundles, settings)

    with (
        running(FakeRuntime(num_classes=7), bundle, settings, registry=registry) as client,
        ThreadPoolExecutor() as threads,
    ):
        assert (
            client.get("/readyz").status_code
            == client.get("/v2/models/a/ready").status_code
            == 200
        )
        assert client.get("/v2/models/a").json()["outputs"][0]["shape"] == [-1, 7]

        device.gate.clear()
        post = partial(client.post, "/v1/classify?model=a", content=jpeg)
        answers = [threads.submit(post) for _ in range(4)]
        wait_for(lambda: client.app.state.service.admitted == 4)
        device.gate.set()

        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert all(
            "load;dur=" in answer.result().headers["server-timing"] for answer in answers
        )
        assert device.loads == 1
        assert "load;dur=" not in post().headers["server-timing"]

        client.post("/v1/classify?model=b", content=jpeg).raise_for_status()
        models = client.get("/info").json()["models"]
        assert [model["loaded"] for model in models] == [False, True]
        metrics = client.get("/metrics").text

        for line in (
            'model_memory_bytes{model="a"} 0.0',
            'model_memory_bytes{model="b"} 6.4',
            'model_loads_total{model="a"} 1.0',
            'stage_duration_seconds_count{stage="load"} 5.0',
        ):
            assert f"sopdeploy_{line}" in metrics

    assert device.loaded == 0


def test_a_model_that_cannot_be_loaded_fails_alone_and_is_not_tried_again(
    bundle, jpeg, monkeypatch
) -> None:
    device = Device(150 * MB, monkeypatch)
    bundles = {"a": bundle, "b": bundle}
    settings = Settings.model_validate({"memory_budget": device.budget})
    registry = BudgetedRegistry(bundles, settings)

    with running(FakeRuntime(num_classes=7), bundle, settings, registry=registry) as client:
        device.errors.append(BundleError("damaged"))
        codes = [client.post("/v1/classify?model=a", content=jpeg).json()["code"]]
        device.errors.clear()
        codes += [client.post("/v1/classify?model=a", content=jpeg).json()["code"]]
        assert codes == ["load_failed", "load_failed"]
        assert client.post("/v1/classify?model=b", content=jpeg).status_code == 200
        assert client.get("/readyz").status_code == 200


def test_a_model_for_which_the_system_has_no_thread_is_not_served_and_loaded_again(
    bundle_path, monkeypatch
) -> None:
    device = Device(SIZE, monkeypatch)
    monkeypatch.setattr(memory_budget, "RETRY_SECONDS", 0.0)

    def refuse(_model: LocalModel) -> None:
        raise RuntimeError("can't start new thread")

    async def scenario(registry: BudgetedRegistry) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(LocalModel, "start", refuse)
            with pytest.raises(RejectedError, match="cannot be loaded"):
                await request(registry, "a")

        assert (registry.find("a").is_loaded, device.loaded) == (False, 0)
        assert "bundle_info{" not in generate_latest(registry.metrics.registry).decode()
        assert not await request(registry, "a")
        assert await request(registry, "a")

    run_with_registry({"a": bundle_path}, device, scenario)


@pytest.mark.parametrize("steps", [1, 5])  # of the loop: before the load has begun, and in it
def test_the_end_of_a_drain_rejects_requests_that_wait_for_a_load(
    bundle_path, monkeypatch, steps
) -> None:
    device = Device(70 * MB, monkeypatch)

    async def scenario(registry: BudgetedRegistry) -> None:
        device.gate.clear()
        waiting = asyncio.create_task(request(registry, "a"))
        for _ in range(steps):
            await asyncio.sleep(0)
        registry.close(DRAINING)
        with pytest.raises(RejectedError, match="shutting down"):
            await waiting
        device.errors.append(BundleError("ends the load"))
        device.gate.set()

    run_with_registry({"a": bundle_path}, device, scenario)


def test_budgets_that_cannot_work_are_refused_at_the_start(bundle_path) -> None:
    with pytest.raises(
        ConfigError, match=r"a needs 0\.06 GB, the budget is 0\.02 GB; raise it"
    ):
        BudgetedRegistry({"a": open_once(bundle_path)}, load_settings(memory_budget="20MB"))
    for budget in ("much", "0GB"):
        with pytest.raises(ConfigError, match="memory_budget: "):
            load_settings(memory_budget=budget)
    assert load_settings(memory_budget="20GB").memory_budget == 20_000_000_000
