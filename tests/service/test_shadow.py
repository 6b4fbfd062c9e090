"""A shadow gets a share of the requests, changes no response, and becomes the live model in one call."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fake_runtime import FakeRuntime

from sopdeploy.decision import Decision
from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service import shadow as shadows
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings, load_settings
from tests.service.conftest import colours
from tests.service.held import Held

Serve = Callable[..., AbstractContextManager[httpx.Client]]


def settings_with(share: str) -> Settings:
    return Settings(threads=1, model_control=True, shadow=f"new={share}")


@pytest.fixture
def models(tmp_path: Path, make_bundle) -> dict[str, LoadedModel]:
    """The live bundle and one with other weights, which prefers other classes."""
    return {
        name: load_model(make_bundle(tmp_path / name, seed=seed), Settings(threads=1))
        for name, seed in (("live", 0), ("new", 1))
    }


@pytest.fixture
def serve(models, run_server) -> Serve:
    """`serve(share, new)` starts a server for the live model with the shadow *new*."""

    def start(share: str, new: LoadedModel = models["new"]) -> AbstractContextManager[httpx.Client]:
        live = models["live"]
        return run_server(
            live.runtime, live.bundle, settings_with(share), names=("live",), beside={"new": new}
        )

    return start


def counts(client: httpx.Client) -> dict[str, int]:
    return client.get("/info").json()["shadow"]["images"]


def settled(client: httpx.Client, until, images: int) -> dict[str, int]:
    """Wait until the shadow has an outcome for *images*; return its counts."""
    until(lambda: sum(counts(client).values()) == images)
    return counts(client)


@pytest.mark.parametrize("same_pixels", [True, False])
def test_a_shadow_is_compared_image_by_image_and_changes_no_response(
    serve, models, until, same_pixels
) -> None:
    new = models["new"]
    if not same_pixels:
        manifest = new.bundle.manifest.model_copy(update={"preprocess": Preprocess(resize=32, crop=32)})
        new = replace(new, bundle=replace(new.bundle, manifest=manifest))
    with serve("1", new) as client:
        live, expected = [], {"agree": 0, "differ": 0, "failed": 0, "dropped": 0}
        for number, body in enumerate(colours(), 1):
            reply = client.post("/v1/classify", content=body)
            assert reply.headers["x-model-digest"] == models["live"].bundle.manifest.id
            live.append(reply.json()["classes"][0]["label"])
            settled(client, until, number)
        assert client.post("/v1/classify?model=new", content=body).json()["code"] == "unknown_model"
        found, metrics = counts(client), client.get("/metrics").text
        assert client.post("/v1/models/new/promote").status_code == 200
        for body, label in zip(colours(), live, strict=True):
            shown = client.post("/v1/classify", content=body).json()["classes"][0]["label"]
            expected["agree" if shown == label else "differ"] += 1
        assert found == expected
        assert 0 < expected["agree"] < 8
        for result in ("agree", "differ"):
            line = f'sopdeploy_shadow_images_total{{model="new",result="{result}"}} {expected[result]}.0'
            assert line in metrics
        for side in ("live", "shadow"):
            assert f'sopdeploy_shadow_duration_seconds_count{{model="new",side="{side}"}} 8.0' in metrics
        assert 'sopdeploy_stage_duration_seconds_count{stage="infer"} 8.0' in metrics


def test_the_request_id_decides_which_requests_are_compared(serve, jpeg, until) -> None:
    ids = [f"request-{number}" for number in range(200)]
    with serve("0.05") as client:
        shadow = client.app.state.shadow
        chosen = [name for name in ids if shadow.samples(name)]
        assert 3 <= len(chosen) <= 20
        for name in ids[: ids.index(chosen[1]) + 1]:
            client.post("/v1/classify", content=jpeg, headers={"X-Request-Id": name})
        assert sum(settled(client, until, 2).values()) == 2


def test_a_blocked_shadow_delays_nobody_and_drops_what_does_not_fit(
    serve, models, jpeg, until, monkeypatch
) -> None:
    monkeypatch.setattr(shadows, "MAX_WAITING_IMAGES", 4)
    held = Held()
    with serve("1", replace(models["new"], runtime=held)) as client:
        codes = [client.post("/v1/classify", content=jpeg).status_code for _ in range(10)]
        assert codes == [200] * 10
        until(held.entered.is_set)
        assert counts(client)["dropped"] == 10 - 1 - 4
        held.gate.set()
        settled(client, until, 10)
        monkeypatch.setattr(shadows, "MAX_WAITING_BYTES", 0)
        client.post("/v1/classify", content=jpeg)
        assert counts(client)["dropped"] == 6


def test_the_shadow_waits_while_the_live_model_works(models, run_server, jpeg, until) -> None:
    live, new = Held(largest_batch=1), Held()
    new.gate.set()
    beside = {"new": replace(models["new"], runtime=new)}
    with (
        run_server(live, models["live"].bundle, settings_with("1"), names=("live",), beside=beside) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        registry = client.app.state.service.registry
        waiting = pool.submit(client.post, "/v1/classify", content=jpeg)
        until(live.entered.is_set)
        assert not registry.is_idle
        assert not new.entered.is_set()
        live.gate.set()
        assert waiting.result(20).status_code == 200
        until(new.entered.is_set)


MULTI_LABEL = Decision(activation="sigmoid", thresholds=(0.5,) * 7)


def with_decision(model: LoadedModel, decision: Decision) -> LoadedModel:
    manifest = model.bundle.manifest.model_copy(update={"decision": decision})
    return replace(model, bundle=replace(model.bundle, manifest=manifest))


def test_several_classes_per_image_agree_if_all_of_them_are_equal(models, run_server, jpeg, until) -> None:
    class Absent(FakeRuntime):
        def run(self, images):
            return {name: -values - 1 for name, values in super().run(images).items()}

    live, new = (with_decision(models[name], MULTI_LABEL) for name in ("live", "new"))
    for runtime, result in ((FakeRuntime(num_classes=7), "agree"), (Absent(num_classes=7), "differ")):
        beside = {"new": replace(new, runtime=runtime)}
        with run_server(
            FakeRuntime(num_classes=7), live.bundle, settings_with("1"), names=("live",), beside=beside
        ) as client:
            client.post("/v1/classify", content=jpeg)
            assert settled(client, until, 1)[result] == 1


def test_a_failing_shadow_is_counted_and_cannot_be_promoted_once_it_is_dead(
    serve, models, jpeg, until
) -> None:
    class Broken(Held):
        def run(self, images):
            raise RuntimeError("broken")

    with serve("1", replace(models["new"], runtime=Broken())) as client:
        for _ in range(6):
            assert client.post("/v1/classify", content=jpeg).status_code == 200
        shadow = client.app.state.shadow
        until(lambda: shadow.model.dead)
        client.post("/v1/classify", content=jpeg)
        assert counts(client)["failed"] >= 5
        assert client.get("/readyz").status_code == 200
        assert client.post("/v1/models/new/promote").json()["code"] == "shadow_failed"
        assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_one_call_promotes_the_shadow_and_one_returns_under_load(serve, models, jpeg, until) -> None:
    digests = {name: model.bundle.manifest.id for name, model in models.items()}
    ended, responses = threading.Event(), []

    def post_until_ended(client: httpx.Client) -> None:
        while not ended.is_set():
            reply = client.post("/v1/classify?model=live", content=jpeg)
            responses.append((reply.status_code, reply.headers["x-model-digest"]))

    with serve("0.5") as client, ThreadPoolExecutor(4) as pool:
        posting = [pool.submit(post_until_ended, client) for _ in range(4)]
        try:
            until(lambda: sum(counts(client).values()) > 4)
            for path, name in (("new/promote", "new"), ("live/rollback", "live"), ("live/rollback", "new")):
                reply = client.post(f"/v1/models/{path}")
                assert (reply.status_code, reply.json()["id"]) == (200, digests[name])
                seen = len(responses) + len(posting)  # the requests under way may use the old version
                until(lambda: (200, digests[name]) in responses[seen:])  # noqa: B023
                assert "shadow" not in client.get("/info").json()
        finally:
            ended.set()
        for future in posting:
            future.result(60)
        assert client.post("/v1/models/new/promote").json()["code"] == "no_shadow"
    assert set(responses) == {(200, digest) for digest in digests.values()}


def test_loading_under_the_name_of_the_shadow_is_rejected(serve, models, run_server) -> None:
    live = models["live"]
    beside, shelf = {"new": models["new"]}, BundleStore([f"live={live.bundle.path}"])
    with run_server(
        live.runtime, live.bundle, settings_with("1"), names=("live",), beside=beside, shelf=shelf
    ) as client:
        reply = client.post("/v2/repository/models/new/load")
        assert (reply.status_code, reply.headers["x-error-code"]) == (400, "cannot_load")
        assert "is the shadow" in reply.json()["error"]


def test_a_shadow_needs_two_bundles_with_the_same_classes(models) -> None:
    other_labels = replace(models["new"], bundle=replace(models["new"].bundle, labels=("a", "b")))
    for served, message in (
        ({"new": models["new"]}, "one other bundle; the bundles here are new"),
        ({"live": models["live"]}, "needs the bundle new=PATH"),
        ({"live": models["live"], "new": other_labels}, "its classes differ from those of live"),
        ({**models, "new": with_decision(models["new"], MULTI_LABEL)}, "several classes per image"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_app(served, settings_with("0.5"))
    create_app({**models, "new": with_decision(models["new"], Decision())}, settings_with("0.5"))
    for text in ("new", "new=0", "new=1.5", "=0.1"):
        with pytest.raises(ConfigError, match=r"shadow: .*write NAME=SHARE"):
            load_settings(shadow=text)
