"""Decoder processes: images that misuse them fail alone, and the memory of all children is limited."""

import errno
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from sopdeploy.errors import ConfigError, ImageError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.decoding import child as decoder_child
from sopdeploy_service.decoding import pool
from sopdeploy_service.decoding.child import FAILED, ChildOptions, LargerImageError
from sopdeploy_service.inference import decoders
from sopdeploy_service.inference.decoders import (
    LARGE_MEMORY,
    LIGHT_MEMORY,
    LIGHT_PIXELS,
    OWN_MEMORY,
    plan_children,
)
from sopdeploy_service.runtime import device_memory
from tests import hostile_images as hostile
from tests.fake_runtime import FakeRuntime
from tests.service.conftest import picture_bytes
from tests.service.raw import count

MIB = 1 << 20
linux = pytest.mark.skipif(platform.system() != "Linux", reason="limits of memory exist on Linux only")
OPTIONS = ChildOptions(
    memory=LIGHT_MEMORY,
    niceness=0,
    is_light=True,
    cpu_seconds=0.0,
    max_bytes=20_000_000,
    max_pixels=LIGHT_PIXELS,
    formats=("jpeg", "png", "webp"),
    sandbox="auto",
)
LARGE = OPTIONS._replace(memory=LARGE_MEMORY, is_light=False, max_pixels=70_000_000)
RULES = Preprocess(resize=36, crop=32)


@pytest.mark.parametrize(
    ("budget", "wanted", "expected"),
    [
        (500 * MIB, 2, (2, 1, 316 * MIB)),
        (1600 * MIB, 2, (2, 2, 704 * MIB)),
        (10**11, 8, (8, 8, 1_400_000_000)),
        (100 * MIB, 2, (1, 1, LIGHT_MEMORY)),
    ],
    ids=["container of 1 GiB", "of 3 GiB", "GPU", "too little"],
)
def test_children_for_light_images_then_those_for_large_ones_share_the_budget(
    budget: int, wanted: int, expected: tuple[int, int, int], caplog
) -> None:
    light, large, memory = plan_children(budget, wanted, 70_000_000)
    assert (light, large, memory) == expected
    assert ("1 of 2 decoders" in caplog.text) == (budget < 200 * MIB)
    if budget >= 200 * MIB:
        assert light * (LIGHT_MEMORY + OWN_MEMORY) + large * (memory + OWN_MEMORY) <= budget


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_a_format_that_is_not_in_the_settings_is_415(serve_with, kind: str) -> None:
    body = picture_bytes(kind=kind)
    client = serve_with(FakeRuntime(num_classes=7), formats="jpeg,png")
    refused = client.post("/v1/classify", content=body)
    assert (refused.status_code, refused.json()["code"]) == (415, "unsupported_format")
    said = "use JPEG and PNG (the setting formats)"
    assert refused.json()["detail"] == f"{kind} files are not accepted; {said}"
    assert "JPEG and PNG. Sent to this server only." in client.get("/").text
    assert client.get("/errors").text.count(said) == 2
    assert serve_with(FakeRuntime(num_classes=7)).post("/v1/classify", content=body).status_code == 200


@pytest.fixture
def template(monkeypatch) -> Iterator[pool.Template]:
    """The template of servers of a test, whose children misbehave."""
    template = pool.Template("tests.service.decoding.misbehaving")
    monkeypatch.setattr(decoders, "shared_template", lambda: template)
    yield template
    template.close()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"die", (422, "damaged_image")),
        (b"hang", (422, "damaged_image")),
        (b"nonsense", (422, "damaged_image")),
        (b"too little", (422, "damaged_image")),
        (b"long message", (422, "damaged_image")),
        (b"bug", (500, "decoder_failed")),
    ],
)
def test_an_image_that_misuses_its_child_fails_alone(
    serve_with, jpeg, template, body: bytes, code: tuple[int, str]
) -> None:
    seconds = 2.0 if body in {b"hang", b"too little"} else 60.0
    client = serve_with(FakeRuntime(num_classes=7), decode_seconds=seconds, request_timeout=120)
    with ThreadPoolExecutor(8) as threads:
        bad = threads.submit(client.post, "/v1/classify", content=body)
        good = [threads.submit(client.post, "/v1/classify", content=jpeg) for _ in range(70)]
        refused = bad.result()
        assert (refused.status_code, refused.json()["code"]) == code
        assert [reply.result().status_code for reply in good] == [200] * 70
    assert client.post("/v1/classify", content=jpeg).status_code == 200


def test_children_that_are_killed_or_send_too_much_are_replaced(jpeg, template) -> None:
    child = pool.DecoderProcess(template, OPTIONS, 60)
    expected = child.decode(jpeg, RULES).pixels
    for _ in range(3):
        os.kill(child.process, signal.SIGKILL)
        while Path(f"/proc/{child.process}/stat").exists() and child._end.recv(1, 2):  # until it has ended
            pass
        assert (child.decode(jpeg, RULES).pixels == expected).all()
    too_many = child.decode(jpeg + b"too many", RULES)
    assert (too_many.pixels == expected).all()
    child._end.recv(1, 2)  # MSG_PEEK: the rest has arrived
    assert (child.decode(jpeg, RULES).pixels == expected).all()
    template.close()
    with suppress(OSError):  # the child ends a moment later
        child._end.recv(1, 2)
    assert (child.decode(jpeg, RULES).pixels == expected).all()
    child.close()


@linux
def test_a_child_reaches_nothing_and_has_no_environment(template) -> None:
    child = pool.DecoderProcess(template, OPTIONS, 60)
    assert "seccomp" in child.restrictions
    with pytest.raises(ImageError) as caught:
        child.decode(b"forbidden", RULES)
    assert json.loads(str(caught.value)) == [[errno.EPERM], {}]
    environment = Path(f"/proc/{child.process}/environ").read_bytes()
    assert environment == b"OPENBLAS_NUM_THREADS=1\0"
    assert len(list(Path(f"/proc/{child.process}/fd").iterdir())) == 4  # standard streams and its socket
    child.close()


COSTLY = {  # options, file, error
    "one prefix code per block": (OPTIONS, lambda: hostile.webp_codes(868, 868), "damaged_image"),
    "the same for a large child": (LARGE, lambda: hostile.webp_codes(2000, 1500), "damaged_image"),
    "too large for a light child": (OPTIONS, lambda: hostile.jpeg(4000, 3000), LargerImageError),
    "a WebP that is too large": (
        OPTIONS,
        lambda: hostile.webp_lossless(6000, 4000),
        LargerImageError,
    ),
    "more than the memory": (LARGE, lambda: hostile.webp_lossless(8000, 6000), "too_much_memory"),
}


@linux
@pytest.mark.parametrize("name", COSTLY)
def test_a_file_that_needs_more_memory_than_a_child_has_fails_and_the_next_is_decoded(jpeg, name) -> None:
    options, make, expected = COSTLY[name]
    child = pool.DecoderProcess(pool.shared_template(), options, 60)
    process = child.process
    if isinstance(expected, str):
        with pytest.raises(ImageError) as caught:
            child.decode(make(), RULES)
        assert caught.value.code == expected
    else:
        with pytest.raises(expected):
            child.decode(make(), RULES)
    assert child.decode(jpeg, RULES).pixels.shape == (32, 32, 3)
    assert child.process == process
    child.close()


def test_a_failed_decoder_leaves_nothing_for_the_garbage_collector(monkeypatch) -> None:
    left: weakref.WeakSet[object] = weakref.WeakSet()

    def fail(*_: object, **__: object) -> None:
        pixels = type("Pixels", (), {})()
        left.add(pixels)
        raise ImageError("damaged", code="damaged_image", status=422)

    monkeypatch.setattr(decoder_child, "decode", fail)
    gc.disable()
    try:
        decoder_child.answer(1, RULES.model_dump_json().encode(), b"x", OPTIONS)
        assert not left
    finally:
        gc.enable()


@linux
def test_a_light_child_ends_at_its_cpu_time(jpeg) -> None:
    body = hostile.jpeg(1700, 1700, sampling=0x22, scans=98)
    child = pool.DecoderProcess(pool.shared_template(), OPTIONS._replace(cpu_seconds=0.01), 60)
    with pytest.raises(pool.DecoderEndedError):
        child.decode(body, RULES)
    child.close()


def test_a_large_image_waits_for_few_others_and_passes_none(serve_with, jpeg, template, monkeypatch) -> None:
    monkeypatch.setattr(decoders, "MAX_WAITING_LARGE", 0)
    client = serve_with(FakeRuntime(num_classes=7))
    refused = client.post("/v1/classify", content=hostile.jpeg(4000, 3000))
    assert (refused.status_code, refused.json()["code"]) == (503, "decoders_busy")
    assert int(refused.headers["retry-after"]) >= 1
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    assert count(client, "decoders") == 2


def test_a_required_sandbox_is_an_error_where_auto_warns(monkeypatch) -> None:
    message = "Darwin on x86_64 is not supported by the seccomp filter"
    monkeypatch.setattr(pool, "receive", fake_replies(message))
    with pytest.raises(ConfigError, match=message):
        pool.DecoderProcess(pool.shared_template(), OPTIONS._replace(sandbox="required"), 60)
    child = pool.DecoderProcess(pool.shared_template(), OPTIONS, 60)
    assert child.restrictions == f"no sandbox ({message})"
    child.close()


def fake_replies(message: str):
    """Replace the first message of a child by that of one without a sandbox."""
    header = pool.REPLY.pack(0, FAILED, 0, len(message))
    return lambda _end, count, _deadline: header if count == len(header) else message.encode()


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
def test_hostile_images_stay_below_the_memory(bundle_path: Path) -> None:
    command = [sys.executable, "benchmarks/hostile_load.py", str(bundle_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs root and control groups that limit memory: {done.stderr}")
    for result in json.loads(done.stdout)["results"]:
        assert result["ours"] < 850, result
        assert "0 killed" in result["case"]
        assert not any(f"'{code}" in result["case"] for code in (500, 502, 504, "503 without")), result
