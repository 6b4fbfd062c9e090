"""Lanes of the decoder threads: large images wait for each other, small ones pass."""

import threading
from pathlib import Path

import hostile_images as hostile
import pytest
from fake_runtime import FakeRuntime
from memory_group import can_limit_memory

from sopdeploy.images.cost import Cost
from sopdeploy_service.images import loaders
from sopdeploy_service.images.decode import Decoded, EncodedImage
from sopdeploy_service.inference import decoders
from sopdeploy_service.inference.decoders import LEAST_BYTES, LIGHT, PHOTO, plan_lanes
from sopdeploy_service.runtime import device_memory
from tests.service.raw import count

MIB = 1 << 20


@pytest.mark.parametrize(
    ("budget", "threads", "processes", "photos", "largest"),
    [
        (500 * MIB, 2, 1, 1, 340 * MIB),
        (350 * MIB, 2, 2, 0, 286 * MIB),
        (10_000 * MIB, 8, 1, 8, 8848 * MIB),
        (10 * MIB, 2, 1, 0, LEAST_BYTES),
    ],
    ids=["container of 1 GiB", "with two devices", "GPU", "too little"],
)
def test_light_images_then_photographs_then_one_large_image_share_the_budget(
    budget: int, threads: int, processes: int, photos: int, largest: int
) -> None:
    assert plan_lanes(budget, threads, processes) == (photos, largest)
    if largest > LEAST_BYTES:
        assert processes * (threads * LIGHT.memory + photos * PHOTO.memory) + largest == budget


def test_an_image_that_exceeds_the_memory_alone_is_413_and_names_the_setting(serve_with) -> None:
    client = serve_with(FakeRuntime(num_classes=7), max_decode_bytes=150 * MIB)
    assert count(client, "max_decode_bytes") == 118 * MIB
    refused = client.post("/v1/classify", content=hostile.webp_lossless(4000, 3000))
    assert (refused.status_code, refused.json()["code"]) == (413, "too_much_memory")
    assert "max_decode_bytes" in refused.json()["detail"]
    assert client.post("/v1/classify", content=hostile.webp_lossless(2000, 1500)).status_code == 200


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_a_format_that_is_not_in_the_settings_is_415(serve_with, make_picture, kind: str) -> None:
    body = make_picture(kind=kind)
    client = serve_with(FakeRuntime(num_classes=7), formats="jpeg,png")
    refused = client.post("/v1/classify", content=body)
    assert (refused.status_code, refused.json()["code"]) == (415, "unsupported_format")
    said = "use JPEG and PNG (the setting formats)"
    assert refused.json()["detail"] == f"{kind} files are not accepted; {said}"
    assert "JPEG and PNG. Sent to this server only." in client.get("/").text
    assert client.get("/errors").text.count(said) == 2
    assert serve_with(FakeRuntime(num_classes=7)).post("/v1/classify", content=body).status_code == 200


class GatedDecode:
    """Instead of decoding: the cost of an image is in its bytes, and large images wait for `gate`."""

    def __init__(self, pixels) -> None:
        self.pixels, self.gate, self.entered = pixels, threading.Event(), threading.Event()
        self.most = self._large = 0

    def __call__(self, encoded: EncodedImage, *_: object, admit=None, **__: object) -> Decoded:
        is_large = encoded.body == b"large"
        admit(Cost(60 * MIB, 5000) if is_large else Cost(1000, 1))
        if is_large:
            self._large += 1
            self.most = max(self.most, self._large)
            self.entered.set()
            self.gate.wait(60)
            self._large -= 1
        return Decoded(self.pixels, ())


def test_small_images_pass_large_ones_which_wait_for_each_other(
    serve_with, until, bundle, monkeypatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    gated = GatedDecode(np.zeros((32, 32, 3), np.uint8))
    monkeypatch.setattr(loaders, "decode", gated)
    monkeypatch.setattr(decoders, "MAX_WAITING_LARGE", 2)
    client = serve_with(FakeRuntime(num_classes=7), max_decode_bytes=200 * MIB)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.post, "/v1/classify", content=b"large")
        assert gated.entered.wait(60)
        waiting = [pool.submit(client.post, "/v1/classify", content=b"large") for _ in range(2)]
        until(lambda: count(client, "queue_depth") == 3)
        lane = client.app.state.service.decoders._lanes[decoders.LARGE_LANE]
        until(lambda: lane.qsize() == 2)
        assert client.post("/v1/classify", content=b"small").status_code == 200
        refused = client.post("/v1/classify", content=b"large")
        assert (refused.status_code, refused.json()["code"]) == (503, "decoders_busy")
        assert int(refused.headers["retry-after"]) >= 1
        gated.gate.set()
        assert [reply.result().status_code for reply in (first, *waiting)] == [200] * 3
    assert gated.most == 1


def test_a_large_image_that_misses_its_deadline_is_503(serve_with, bundle, monkeypatch) -> None:
    import numpy as np

    gated = GatedDecode(np.zeros((32, 32, 3), np.uint8))
    monkeypatch.setattr(loaders, "decode", gated)
    client = serve_with(FakeRuntime(num_classes=7), request_timeout=0.2, max_decode_bytes=200 * MIB)
    reply = client.post("/v1/classify", content=b"large")
    assert (reply.status_code, reply.json()["code"]) == (503, "decoders_busy")
    gated.gate.set()


def test_a_decoder_that_takes_too_long_is_found(serve_with, until, monkeypatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    gated = GatedDecode(np.zeros((32, 32, 3), np.uint8))
    monkeypatch.setattr(loaders, "decode", gated)
    client = serve_with(FakeRuntime(num_classes=7), max_decode_bytes=200 * MIB)
    found = client.app.state.service.decoders
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.post, "/v1/classify", content=b"large")
        assert gated.entered.wait(60)
        assert not found.reject_overdue(60)
        client.loop.call_soon_threadsafe(found.reject_overdue, 0)
        assert (reply.result().status_code, reply.result().json()["code"]) == (503, "decode_timeout")
    gated.gate.set()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (
            "4:memory:/a/b\n0::/\n",
            {"memory/a/memory.limit_in_bytes": 700, "memory/a/b/memory.limit_in_bytes": 900},
            700,
        ),
        ("4:memory:/host/path\n", {"memory/memory.limit_in_bytes": 800}, 800),
        ("0::/a/b\n", {"a/memory.max": 600, "a/b/memory.max": "max"}, 600),
        ("0::/\n", {"memory.max": 500}, 500),
        ("0::/\n", {}, 1000 * 1024),
    ],
    ids=["version 1", "version 1 in a container", "version 2", "version 2 in a container", "no limit"],
)
def test_the_memory_limit_is_that_of_the_container(
    tmp_path: Path, monkeypatch, groups: str, files: dict[str, int | str], expected: int
) -> None:
    for name, value in files.items():
        write(tmp_path / "fs" / name, str(value))
    write(tmp_path / "cgroup", groups)
    write(tmp_path / "meminfo", "MemTotal:     1000 kB\nMemAvailable:  900 kB\n")
    monkeypatch.setattr(device_memory, "CGROUP", tmp_path / "fs")
    monkeypatch.setattr(device_memory, "PROCESS_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(device_memory, "MEMINFO", tmp_path / "meminfo")
    assert device_memory.memory_limit() == expected


@pytest.mark.slow
@pytest.mark.skipif(not can_limit_memory(), reason="needs root and control groups that limit memory")
def test_hostile_images_stay_below_three_quarters_of_the_memory(bundle_path: Path) -> None:
    import sys

    from hostile_load import Server, send_all
    from serving_peers import OURS

    command = (
        sys.executable,
        "-m",
        "sopdeploy",
        "serve",
        str(bundle_path),
        "--port",
        "{port}",
        "--threads",
        "1",
    )
    server = Server("sopdeploy", OURS, command, Path.cwd(), {})
    for result in send_all(server, 1 << 30, list(hostile.hostile_images())):
        assert result.ours * 1e6 < decoders.USED_SHARE * (1 << 30), result
        assert "0 killed" in result.case
        assert not any(f"'{code}" in result.case for code in (500, 502, 504, "503 without")), result
