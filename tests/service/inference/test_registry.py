"""Several models in one server, and versions that replace each other under load."""

import asyncio
import base64
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import Request

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy_service.api.upload import TIMEOUT_HEADER, timeout_of
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.fault_injection import InjectedError, parse_faults
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

SETTINGS = Settings(threads=1, model_control=True)
IMAGE = np.zeros((1, 32, 32, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path, make_bundle: Callable[..., Path]) -> Path:
    """Two versions of the tiny network; they differ in their probes."""
    make_bundle(tmp_path, probes=3)
    make_bundle(tmp_path, probes=4)
    return tmp_path


@pytest.fixture
def versions(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def registry_of(first: Path) -> ModelRegistry:
    return ModelRegistry(
        {"tiny": load_model(first, SETTINGS)}, SETTINGS, Metrics(), BundleStore([f"tiny={first}"])
    )


def found(answer: Model | Rejection | None) -> Model:
    assert isinstance(answer, Model), answer
    return answer


def rejected(answer: object) -> str:
    assert isinstance(answer, Rejection), answer
    return answer.code


def test_a_new_version_is_served_and_the_previous_one_kept_for_rollback(versions) -> None:
    async def life() -> None:
        registry = registry_of(versions[0])
        registry.start()
        before = found(registry.find())
        after = found(await registry.load("tiny"))
        assert [model.bundle.path.name for model in (before, after)] == [path.name for path in versions]
        assert registry.find("tiny") is after
        assert registry.find("tiny", before.version) is before
        assert found(await registry.roll_back("tiny")) is before
        assert registry.find("tiny") is before
        assert found(await registry.load("tiny", versions[1].name)) is after
        assert found(await registry.load("tiny", versions[1].name)) is after
        await registry.stop()
        assert not [thread for thread in threading.enumerate() if thread.name == "model_worker"]

    asyncio.run(life())


def test_faults_apply_to_every_model_also_to_later_ones(versions) -> None:
    async def life() -> None:
        first, store = {"tiny": load_model(versions[0], SETTINGS)}, BundleStore([f"tiny={versions[0]}"])
        registry = ModelRegistry(first, SETTINGS, Metrics(), store, parse_faults("engine=raise@2"))
        registry.start()
        later = found(await registry.load("tiny"))
        assert registry.models()[0] is later
        for model in registry.models():
            model.loaded.runtime.run(IMAGE)
            with pytest.raises(InjectedError, match="engine=raise@2"):
                model.loaded.runtime.run(IMAGE)
        await registry.stop()

    asyncio.run(life())


def test_a_replaced_version_waits_for_its_last_request(versions, make_bundle, until) -> None:
    async def life() -> None:
        registry = registry_of(versions[0])
        registry.start()
        oldest = found(registry.find())
        make_bundle(versions[0].parent, probes=5)
        with oldest.in_use():
            for path in sorted(versions[0].parent.iterdir()):
                await registry.load("tiny", path.name)
            await asyncio.sleep(0.05)
            assert engines() == 3
        end = time.monotonic() + 20
        while engines() > 2:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        assert rejected(registry.find("tiny", oldest.version)) == "unknown_version"
        await registry.stop()

    asyncio.run(life())


def engines() -> int:
    return sum(thread.name == "model_worker" for thread in threading.enumerate())


def test_a_version_with_wrong_outputs_is_never_served(versions, make_bundle) -> None:
    wrong = make_bundle(versions[0].parent, wrong_by=0.01)

    async def life() -> None:
        registry = registry_of(versions[0])
        registry.start()
        before = found(registry.find())
        answer = await registry.load("tiny", wrong.name)
        assert isinstance(answer, Rejection)
        assert (answer.code, answer.status) == ("cannot_load", 400)
        assert "deviates" in answer.message
        assert registry.find() is before
        await registry.stop()

    asyncio.run(life())


@pytest.mark.parametrize("name", ["../tiny", "/etc", "", "nothing", "a\0b", "x" * 10_000])
def test_only_folders_beside_the_bundles_can_be_loaded(versions, name) -> None:
    async def life() -> None:
        registry = registry_of(versions[0])
        assert rejected(await registry.load("tiny", name)) == "cannot_load"
        await registry.stop()

    asyncio.run(life())


def test_an_unloaded_model_can_be_loaded_again(versions) -> None:
    async def life() -> None:
        registry = registry_of(versions[0])
        registry.start()
        assert await registry.unload("tiny") is None
        assert rejected(registry.find()) == "no_model"
        assert rejected(registry.find("tiny")) == "unknown_model"
        assert rejected(await registry.unload("tiny")) == "unknown_model"
        assert rejected(await registry.roll_back("tiny")) == "unknown_model"
        assert rejected(await registry.load("tiny")) == "cannot_load"  # two have the name: which?
        assert found(await registry.load("tiny", versions[1].name)).name == "tiny"
        assert rejected(await registry.roll_back("tiny")) == "no_previous_version"
        await registry.stop()

    asyncio.run(life())


def test_without_model_control_nothing_can_be_loaded(versions) -> None:
    async def life() -> None:
        registry = ModelRegistry({"tiny": load_model(versions[0], SETTINGS)}, SETTINGS, Metrics(), None)
        assert rejected(await registry.load("tiny")) == "model_control_off"
        assert rejected(await registry.unload("tiny")) == "model_control_off"
        await registry.stop()

    asyncio.run(life())


def test_swaps_under_load_fail_no_request_and_responses_name_their_version(
    versions, run_server, onnx_runtime, jpeg, until
) -> None:
    bundle = open_bundle(versions[0])
    with (
        run_server(onnx_runtime, bundle, SETTINGS, shelf=BundleStore([f"tiny={versions[0]}"])) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        ended = threading.Event()
        replies = [pool.submit(post_until, client, jpeg, ended) for _ in range(6)]
        service = client.app.state.service
        for path in [*reversed(versions), versions[1]]:
            swap = asyncio.run_coroutine_threadsafe(service.registry.load("tiny", path.name), client.loop)
            assert found(swap.result(20)).bundle.path == path
            threading.Event().wait(0.2)
        ended.set()
        answers = [answer for reply in replies for answer in reply.result()]
    ids = {open_bundle(path).manifest.id for path in versions}
    assert {status for status, _ in answers} == {200}
    assert {digest for _, digest in answers} == ids


@pytest.mark.parametrize("path", ["/v1/classify", "/v2/models/tiny/infer"])
def test_a_slow_request_is_served_by_the_version_that_admitted_it(
    versions, make_bundle, run_server, jpeg, path
) -> None:
    third = make_bundle(versions[0].parent, probes=5)
    first = load_model(versions[0], SETTINGS)
    store = BundleStore([f"tiny={versions[0]}"])
    with run_server(first.runtime, first.bundle, SETTINGS, shelf=store) as client:

        def slowly() -> Iterator[bytes]:
            body = jpeg if path.startswith("/v1") else json.dumps(image_tensor(jpeg)).encode()
            yield body[:10]
            for folder in (versions[1].name, third.name):
                load = {"parameters": {"folder": folder}}
                assert client.post("/v2/repository/models/tiny/load", json=load).status_code == 200
            time.sleep(0.3)
            yield body[10:]

        reply = client.post(path, content=slowly())
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-model-digest"] == first.bundle.manifest.id
        assert client.post("/v1/classify", content=jpeg).headers["x-model-digest"] != first.bundle.manifest.id


def image_tensor(body: bytes) -> dict[str, list[dict[str, object]]]:
    data = [base64.b64encode(body).decode()]
    return {"inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": [1], "data": data}]}


def post_until(client: httpx.Client, body: bytes, ended: threading.Event) -> list[tuple[int, str]]:
    answers = []
    while not ended.is_set():
        reply = client.post("/v1/classify", content=body)
        answers.append((reply.status_code, reply.headers["x-model-digest"]))
    return answers


@pytest.fixture
def two(versions, run_server, onnx_runtime) -> Iterator[httpx.Client]:
    with run_server(onnx_runtime, open_bundle(versions[0]), SETTINGS, names=("ants", "bees")) as client:
        yield client


def test_with_several_models_a_request_must_name_one(two, jpeg) -> None:
    unnamed = two.post("/v1/classify", content=jpeg)
    assert (unnamed.status_code, unnamed.json()["code"]) == (400, "model_needed")
    assert "ants, bees" in unnamed.json()["detail"]
    assert two.post("/v1/classify?model=bees", content=jpeg).status_code == 200
    missing = two.post("/v1/classify?model=cats", content=jpeg)
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_model")
    version = two.post("/v1/classify?model=bees&version=0", content=jpeg)
    assert (version.status_code, version.json()["code"]) == (404, "unknown_version")
    assert [model["name"] for model in two.get("/info").json()["models"]] == ["ants", "bees"]
    assert 'requests_total{code="200",model="bees"' in two.get("/metrics").text


@pytest.mark.parametrize("value", ["0", "000", "-1", "1.5", "nan", "1e3", "soon", "٣"])
def test_an_invalid_timeout_is_400(two, jpeg, value) -> None:
    headers = {"X-Request-Timeout-Ms": value.encode()}
    reply = two.post("/v1/classify?model=ants", content=jpeg, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (400, "invalid_timeout")


@pytest.mark.parametrize("value", ["30001", "9999999999", "9" * 30, "9" * 20_000, "0" * 20_000 + "9000"])
def test_a_long_timeout_is_limited_by_the_server(two, jpeg, value) -> None:
    reply = two.post("/v1/classify?model=ants", content=jpeg, headers={"X-Request-Timeout-Ms": value})
    assert reply.status_code == 200


def test_a_timeout_only_shortens_the_deadline(two) -> None:
    def allowed(value: bytes) -> float:
        scope = {"type": "http", "headers": [(TIMEOUT_HEADER.encode(), value)]}
        return timeout_of(Request(scope), longest=30.0)

    found = [allowed(value) for value in (b"1", b"0001500", b"29999", b"30001", b"9" * 10, b"9" * 20_000)]
    assert found == [0.001, 1.5, 29.999, 30.0, 30.0, 30.0]


def test_a_folder_of_bundles_is_served_by_name(tmp_path, make_bundle) -> None:
    first = make_bundle(tmp_path / "a")
    shutil.copytree(first, tmp_path / "models" / "flowers")
    shutil.copytree(first, tmp_path / "models" / first.name)
    (tmp_path / "models" / ".bundle-x.partial").mkdir()
    assert set(BundleStore([tmp_path / "models"]).bundles) == {"flowers", "tiny"}
    assert set(BundleStore([first, f"two={first}"]).bundles) == {"tiny", "two"}


def test_two_bundles_with_one_name_are_an_error(folder) -> None:
    with pytest.raises(ConfigError, match=r"the name tiny is already used by .*NAME="):
        BundleStore([folder])


@pytest.mark.parametrize("source", ["a b=/x", "=/x", "a/b=/x"])
def test_a_name_must_fit_into_a_url(source) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        BundleStore([source])


def test_a_folder_without_bundles_is_an_error(tmp_path) -> None:
    with pytest.raises(BundleError, match="no bundle here or in a folder directly below"):
        BundleStore([tmp_path])
