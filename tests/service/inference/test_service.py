"""Several models in one server, reloads that replace them, and which bundles are found."""

import asyncio
import gc
import os
import shutil
import threading
import time
import weakref
import zipfile
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import generate_latest

from sopdeploy.base.plugins import RUNTIMES
from sopdeploy.bundle.folder import Bundle, open_bundle, read_files
from sopdeploy.errors import BundleError, ConfigError, ParityError, RuntimeUnavailableError
from sopdeploy.paths import CHECKPOINT_FORMAT
from sopdeploy_service.inference import load_time, loader, model_registry
from sopdeploy_service.inference.bundle_store import find_bundles
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.inference.model_registry import ModelRegistry
from sopdeploy_service.inference.results import RejectedError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import DeviceLostError
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.server import process
from sopdeploy_service.settings import Settings
from tests.support.forged import flip
from tests.support.raw import connect, post_of, read
from tests.support.runtimes import Failing
from tests.support.service import running, wait_for, write_bundle

SETTINGS = Settings(threads=1)


@pytest.fixture
def versions(tmp_path: Path) -> list[Path]:
    """Two versions of the tiny network; they differ in their probes."""
    return sorted(write_bundle(tmp_path, probes=probes) for probes in (3, 4))


def found(sources: Iterable[str | Path]) -> dict[str, Path]:
    """Where the bundles of *sources* are, by name."""
    read = find_bundles(sources, lambda _, path, manifest: read_files(path, manifest))
    return {name: bundle.path for name, bundle in read.items()}


def run_with_registry(
    first: Path, scenario: Callable[[ModelRegistry], Awaitable[None]]
) -> None:
    """Run *scenario* with a started registry of the bundle *first*, named `tiny`."""

    async def run() -> None:
        registry = ModelRegistry({"tiny": load_model(first, SETTINGS)}, SETTINGS)
        await registry.start()
        await scenario(registry)
        await registry.stop()

    asyncio.run(run())


def test_exactly_the_bundles_of_the_last_reload_are_served(versions) -> None:
    async def scenario(registry: ModelRegistry) -> None:
        before = registry.find()
        await registry.replace(
            {"tiny": open_bundle(versions[1]), "second": open_bundle(versions[0])}
        )

        assert [(model.name, model.bundle.name) for model in registry.models()] == [
            ("second", versions[0].name),
            ("tiny", versions[1].name),
        ]

        after = registry.find("tiny")
        with pytest.raises(RejectedError, match=after.version):
            registry.find("tiny", before.version)
        await registry.replace({"tiny": open_bundle(versions[1])})

        assert registry.find("tiny", after.version) is after  # it was not loaded again
        with pytest.raises(RejectedError, match="second"):
            registry.find("second")

    run_with_registry(versions[0], scenario)
    wait_for(lambda: not any(thread.name == "model_worker" for thread in threading.enumerate()))


def test_a_replaced_model_still_runs_the_images_of_its_requests(versions) -> None:
    async def scenario(registry: ModelRegistry) -> None:
        before = registry.find()
        with registry.use(before):
            await registry.replace({"tiny": open_bundle(versions[1])})
            await asyncio.sleep(0)  # the task that stops it begins
            pixels = np.zeros((32, 32, 3), np.uint8)
            result = await before.run(pixels, time.monotonic() + 600)
        assert result.outputs["logits"].shape == (7,)

    run_with_registry(versions[0], scenario)


def test_if_one_bundle_fails_none_of_them_is_served(versions, monkeypatch) -> None:
    wrong = write_bundle(versions[0].parent, wrong_by=0.01)

    async def scenario(registry: ModelRegistry) -> None:
        before = registry.models()
        runtime = Failing(dict.fromkeys(range(99), DeviceLostError("CUDA 719")))
        with pytest.raises(ParityError, match="deviates"):
            await registry.replace(
                {"tiny": open_bundle(versions[1]), "wrong": open_bundle(wrong)}
            )
        monkeypatch.setattr(
            "sopdeploy_service.inference.loader.open_runtime", lambda *_: runtime
        )
        with pytest.raises(RuntimeUnavailableError):
            await registry.replace({"tiny": open_bundle(versions[1])})
        assert registry.models() == before

    run_with_registry(versions[0], scenario)


# Query, timeout: code
MODELS = {
    ("", "1000"): "model_needed",
    ("?model=cats", "1000"): "unknown_model",
    ("?model=bees&version=0", "1000"): "unknown_version",
    **{("?model=ants", timeout): "invalid_timeout" for timeout in ("0", "1.5", "٣")},
    # At most the server's
    **{("?model=bees", timeout): None for timeout in ("0020000", "9" * 20_000)},
}


def test_with_several_models_a_request_names_one_and_may_name_a_timeout(
    bundle, onnx_runtime, jpeg
) -> None:
    with running(onnx_runtime, bundle, SETTINGS, names=("ants", "bees")) as two:
        for (query, timeout), code in MODELS.items():
            headers = {"X-Request-Timeout-Ms": timeout.encode()}
            reply = two.post(f"/v1/classify{query}", content=jpeg, headers=headers)
            assert reply.json().get("code") == code

        assert [model["name"] for model in two.get("/info").json()["models"]] == [
            "ants",
            "bees",
        ]
        assert 'requests_total{code="200",model="bees"' in two.get("/metrics").text


TIMES = [f"2026-11-2{day}T10:00:00.000000Z" for day in range(4)]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Take the lines logged so far."""
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_of_every_project_in_a_folder_the_bundle_exported_last_is_served(
    tmp_path, caplog
) -> None:
    folder = tmp_path / "models"
    made = {
        (project, day): write_bundle(
            folder, project=project, exported_at=TIMES[day], probes=probes
        )
        for project, day, probes in (
            ("hats", 2, 3),
            ("hats", 1, 4),
            ("shoes", 0, 3),
            ("shoes", 3, 4),
        )
    }
    last = {"hats": made["hats", 2], "shoes": made["shoes", 3]}
    caplog.set_level("INFO")

    assert found([folder]) == last
    assert {record.levelname for record in caplog.records} == {"INFO"}
    of_shoes, of_hats = lines(caplog)
    assert of_shoes.startswith(f"shoes: serves {last['shoes']} ")
    assert made["shoes", 0].name in of_shoes
    assert of_hats.startswith(f"hats: serves {last['hats']} ")
    assert made["hats", 1].name in of_hats

    (folder / "latest").unlink()
    os.utime(made["hats", 1] / "manifest.json")
    assert found([folder]) == last
    (folder / "latest").symlink_to(made["hats", 1].name)
    shutil.copytree(folder, tmp_path / "copied")  # like `cp -rL`: the link becomes a folder
    copied = found([tmp_path / "copied"])

    assert copied == {name: tmp_path / "copied" / path.name for name, path in last.items()}
    assert found([tmp_path / "copied" / "latest"]) == {"hats": tmp_path / "copied" / "latest"}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    "half a manifest": (lambda path: shorten(path / "manifest.json"), "manifest.json"),
    "a missing file": (lambda path: (path / "probes.npz").unlink(), "probes.npz: missing"),
    "half a file": (lambda path: shorten(path / "model.onnx"), "model.onnx: has"),
    "a flipped bit": (lambda path: flip(path / "model.onnx", 20), "model.onnx: its sha256"),
}


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_named_and_the_others_are_served(damage, tmp_path, caplog) -> None:
    folder = tmp_path / "models"
    (change, reason) = DAMAGE[damage]
    older = write_bundle(folder, exported_at=TIMES[0])
    newer = write_bundle(folder, exported_at=TIMES[1], probes=4)
    change(newer)

    assert found([folder]) == {"tiny": older}
    assert [record.levelname for record in caplog.records if reason in record.getMessage()] == [
        "WARNING"
    ]

    shutil.rmtree(older)
    with pytest.raises(BundleError) as error:
        found([folder])
    assert str(newer) in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bundle_that_is_given_twice_is_one_bundle(tmp_path, monkeypatch) -> None:
    bundle = write_bundle(tmp_path / "bundles")
    shutil.copytree(bundle, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    relative = bundle.relative_to(tmp_path)

    for sources in (
        sorted((tmp_path / "bundles").glob("*")),
        [bundle, relative],
        [bundle, tmp_path / "copy"],
    ):
        assert found(sources) == {"tiny": bundle}


def test_invalid_sources_are_errors(versions, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"tiny .*NAME="):
        found(versions)

    for source in ("a b=/x", "=/x", "a/b=/x"):
        with pytest.raises(ConfigError, match="letters, digits"):
            found([source])
    (tmp_path / "empty").mkdir()

    with pytest.raises(BundleError, match="`sopdeploy export`"):
        found([tmp_path / "empty"])


# What somebody serves, and the command to run before
NO_BUNDLES = {
    "runs/photos-1": "export .*photos-1/best.pt --detach",
    "runs": "export .*photos-1/best.pt --detach",
    "checkpoint.bin": "export .*checkpoint.bin --detach",
    "weights.pt": "export .*weights.pt --network",
    "weights.safetensors": "export .*weights.safetensors --network",
    "tiny/model.onnx": "file of a bundle.*tiny",
    "photos": "train --data .*photos",
}


@pytest.mark.parametrize("name", NO_BUNDLES)
def test_what_is_not_a_bundle_is_named_with_the_next_command(name, tmp_path) -> None:
    (tmp_path / "runs" / "photos-1").mkdir(parents=True)
    (tmp_path / "photos" / "hat").mkdir(parents=True)
    (tmp_path / "photos" / "hat" / "1.jpg").touch()
    (tmp_path / "tiny").mkdir()
    for file in ("model.onnx", "manifest.json"):
        (tmp_path / "tiny" / file).touch()
    (tmp_path / "weights.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    pickled = {"weights.pt": b"}", "checkpoint.bin": CHECKPOINT_FORMAT.encode()}
    for file in ("runs/photos-1/best.pt", *pickled):
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            archive.writestr("archive/data.pkl", pickled.get(file, b"}"))

    with pytest.raises(BundleError, match=NO_BUNDLES[name]):
        found([tmp_path / name])


def send_every_kind_of_request(client: httpx.Client, jpeg: bytes) -> None:
    """Send requests of every kind; disconnect once within a body and once during inference."""
    for body, status in ({"content": jpeg}, 200), ({"content": b"text"}, 415):
        assert client.post("/v1/classify", **body).status_code == status
    assert (
        client.post("/v1/classify", files=[("image", jpeg), ("image", b"text")]).status_code
        == 200
    )

    for path in ("/v2/models/tiny", "/metrics", "/info"):
        assert client.get(path).status_code == 200
    for sent in (len(jpeg) // 2, len(jpeg)):
        with connect(client) as wire:
            wire.sendall(post_of(jpeg)[: sent - len(jpeg) or None])
            time.sleep(0.02)


def metric(registry: ModelRegistry, **labels: str) -> float | None:
    return registry.metrics.registry.get_sample_value("sopdeploy_load_failures_total", labels)


def test_a_reload_reads_the_files_of_a_bundle(
    versions: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(registry: ModelRegistry) -> None:
        before = registry.models()
        copied = Path(shutil.copytree(versions[0], versions[0].parent / "copied"))
        flip(copied / "model.onnx", 20)
        assert not await registry.reload([f"tiny={copied}"])
        assert lines(caplog)[-1].startswith("not reloaded, ")
        assert metric(registry, code="unusable_bundle") == 1
        assert registry.metrics.registry.get_sample_value("sopdeploy_reload_failed") == 1

        flip(copied / "model.onnx", 20)  # as it was
        assert await registry.reload([f"tiny={copied}"])
        assert lines(caplog)[-1] == "reloaded"
        assert registry.metrics.registry.get_sample_value("sopdeploy_reload_failed") == 0
        assert registry.models() == before

    caplog.set_level("INFO")
    run_with_registry(versions[0], scenario)


def test_a_load_that_hangs_ends_at_its_deadline_and_later_reloads_succeed(
    versions: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    closed = threading.Event()
    open_runtime = loader.open_runtime

    def stuck(bundle: Bundle, settings: Settings) -> Any:
        gate.wait()
        runtime: Any = open_runtime(bundle, settings)
        runtime.close = closed.set
        return runtime

    # To read the bundles, to load one; then the same for `load_model`.
    seconds = iter([60, 0.01, 60, 0.01])

    async def scenario(registry: ModelRegistry) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(loader, "open_runtime", stuck)
            patch.setattr(load_time, "load_seconds", lambda _: next(seconds))
            await registry.reload([versions[1]])
            with pytest.raises(RuntimeUnavailableError, match=r"not loaded within 0\.01 s"):
                load_model(versions[1], SETTINGS)
        [line] = lines(caplog)
        assert line.startswith("not reloaded, ")
        assert f"{versions[1]}: " in line
        assert metric(registry, code="load_timeout") == 1
        await registry.reload([versions[1]])
        assert registry.find().bundle.path == versions[1]
        gate.set()  # the late model is released
        assert await asyncio.to_thread(closed.wait, 60)

    caplog.set_level("ERROR")
    run_with_registry(versions[0], scenario)


@pytest.mark.parametrize("function", ["find_bundles", "read_files"])
def test_a_disk_that_hangs_does_not_block_later_reloads(
    function: str,
    versions: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()

    async def scenario(registry: ModelRegistry) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(model_registry, function, lambda *_, **__: gate.wait())
            patch.setattr(load_time, "load_seconds", lambda _: 0.01)
            await registry.reload([versions[1]])

        assert metric(registry, code="load_timeout") == 1
        await registry.reload([versions[1]])
        assert registry.find().bundle.path == versions[1]

        gate.set()

    run_with_registry(versions[0], scenario)


# What a start reads from the disk before it loads a bundle
FIRST_READS = {
    "links": (
        process,
        "links_among",
        lambda path, settings: process.find_links([path], settings),
        {"follow": True},
    ),
    "bundles": (
        process,
        "find_bundles",
        lambda path, settings: process.load_registry([path], settings),
        {},
    ),
}


@pytest.mark.parametrize("case", FIRST_READS)
def test_a_disk_that_hangs_ends_a_start_at_its_deadline(
    case: str, versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function, start, values = FIRST_READS[case]
    gate = threading.Event()
    monkeypatch.setattr(module, function, lambda *_, **__: gate.wait())
    monkeypatch.setattr(load_time, "LOAD_SECONDS_ON_CPU", 0.01)

    with pytest.raises(RuntimeUnavailableError) as error:
        start(versions[0], Settings(threads=1, **values))
    assert error.value.code == "load_timeout"

    gate.set()


@pytest.mark.parametrize(
    ("values", "cuda", "seconds"),
    [({}, False, 120), ({}, True, 600), ({"runtime": "onnxruntime-cpu"}, True, 120)],
)
def test_a_load_has_more_time_on_a_gpu(
    values: dict[str, Any], cuda: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for runtime in RUNTIMES.own().values():
        if runtime.needs_gpu:
            monkeypatch.setattr(runtime, "is_set_up", lambda: cuda)
    assert load_time.load_seconds(Settings(**values)) == seconds


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Disable the garbage collector: reference counting must release a model."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_replaced_model_is_released_though_idle_connections_stay(
    versions: list[Path], jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OnnxRuntime.run

    def slow(runtime: OnnxRuntime, images: Any) -> Any:
        time.sleep(0.01)
        return run(runtime, images)

    monkeypatch.setattr(OnnxRuntime, "run", slow)
    first = load_model(versions[0], SETTINGS)
    with running(first.runtime, first.bundle, SETTINGS) as client:
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
        wait_for(lambda: sum(model() is not None for model in models) == 1)
        wait_for(lambda: client.get("/metrics").text.count("bundle_info{") == 1)
        for wire in idle:
            wire.close()


def test_a_bundle_that_is_loaded_again_is_shown_until_both_have_ended(bundle) -> None:
    metrics = Metrics()
    is_shown = []
    for change in (1, 1, -1, -1):
        metrics.count_bundle("tiny", bundle, "cpu", change)
        is_shown.append("sopdeploy_bundle_info{" in generate_latest(metrics.registry).decode())

    assert is_shown == [True, True, True, False]
