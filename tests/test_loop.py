"""The loop after the first deployment, by commands: from an empty folder to the second bundle live."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.pictures import encoded
from tests.service.api.pages.conftest import chromium, open_page  # noqa: F401  # fixtures
from tests.service.children import PYTHONPATH, announcing
from tests.service.conftest import wait_for

COLOURS = {
    "blue": (40, 60, 200),
    "green": (40, 180, 60),
    "red": (200, 50, 40),
    "жёлтый": (200, 190, 40),  # new after the first deployment
}
FIRST, TRAFFIC = range(20), range(100, 130)
SMALL = (
    *(
        "--weights",
        "none",
        "--set",
        "procedure.kind=few_shot",
        "--set",
        "model.name=resnet8",
        "--set",
        "threads=1",
    ),
    *("--set", "model.config={base_width=8}", "--set", "preprocess.resize=32", "--set", "preprocess.crop=32"),
)
SERVE = (
    *("serve", "bundles/live", "--port", "0"),
    *("--setting", "keep=kept", "--setting", "keep_sample=0.5", "--setting", "follow=true"),
)
pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(900)]


def draw(label: str, number: int) -> bytes:
    """A photograph of a class by its colour, with edges and a tint of its own."""
    random = np.random.default_rng([number, *map(ord, label)])
    cells = np.kron(random.random((6, 6)), np.ones((8, 8)))[..., None]
    tint = np.clip(np.array(COLOURS[label]) + random.normal(0, 15, 3), 0, 255)
    return encoded(Image.fromarray((tint * (0.35 + 0.65 * cells)).astype(np.uint8)))


def is_not_kept(body: bytes) -> bool:
    """Whether a photograph of a known class is outside of the uniform sample, half of all photographs."""
    return hashlib.sha256(body).digest()[0] >= 128


def decoded(body: bytes) -> bytes:
    return Image.open(io.BytesIO(body)).convert("RGB").tobytes()


CLASSES = {decoded(draw(label, number)): label for label in COLOURS for number in TRAFFIC}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with twenty photographs of three classes."""
    for label in list(COLOURS)[:3]:
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in FIRST:
            (tmp_path / "photos" / label / f"{number}.png").write_bytes(draw(label, number))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def sopdeploy(*arguments: str) -> str:
    """Run a command, which must succeed; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "sopdeploy", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def label_all(open_page, url: str) -> None:  # noqa: F811
    """Label every photograph by keyboard: the number of its class, or `n` and the name of a new one."""
    host, slash, key = url.partition("/?")
    page = open_page(host, slash + key)
    with httpx.Client(base_url=host, follow_redirects=True) as client:
        client.get(slash + key)
        while (state := client.get("/state").json())["photograph"] is not None:
            identity = state["photograph"]["id"]
            page.wait_for_function(f"state.photograph && state.photograph.id === '{identity}'")
            name = CLASSES.get(decoded(client.get(f"/images/{identity}").content), "")
            assert name, "a photograph that was not sent"
            names = [entry["name"] for entry in state["classes"]]
            if name in names:
                page.keyboard.press(str(names.index(name) + 1))
            else:
                page.keyboard.press("n")
                page.keyboard.type(name)
                page.keyboard.press("Enter")
            page.locator("#progress", has_text=f", {state['left'] - 1} left").wait_for()
            page.locator("#main[aria-busy=false]").wait_for()


def test_from_an_empty_folder_to_the_second_bundle_live_without_a_failed_request(home, open_page) -> None:  # noqa: F811
    sopdeploy("train", "--data", "photos", *SMALL)
    sopdeploy("export", "runs/latest/best.pt")
    first = Path("bundles/latest").readlink().name
    sopdeploy("promote", "bundles/latest", "--over", "bundles/live")
    replies: list[httpx.Response] = []
    stopped = threading.Event()
    terminal, stderr = os.openpty()
    with announcing(r"ready: (\S+)  ", *SERVE, stderr=stderr) as url:
        bodies = [draw(label, number) for number in TRAFFIC for label in COLOURS]
        replies += [httpx.post(f"{url}/v1/classify", content=body, timeout=60) for body in bodies]
        body = next(filter(is_not_kept, (draw("red", number) for number in TRAFFIC)))

        def send() -> None:
            while not stopped.wait(0.05):
                replies.append(httpx.post(f"{url}/v1/classify", content=body, timeout=60))

        sending = threading.Thread(target=send)
        sending.start()
        try:
            with announcing(r"page +(\S+)", "label", "kept", "--photos", "photos", "--port", "0") as page_url:
                label_all(open_page, page_url)
            os.close(stderr)
            os.close(terminal)  # of the server
            printed = sopdeploy("train", "--data", "photos", "--from", "bundles/live")
            assert re.search(r"before, runs/photos-1: .* since then \+\d+ photographs, new: жёлтый", printed)
            sopdeploy("export", "runs/latest/best.pt")
            evidence = ("--data", "photos-held-out", "--tolerance", "10")
            compared = json.loads(sopdeploy("compare", "bundles/live", "bundles/latest", *evidence, "--json"))
            sopdeploy("promote", "bundles/latest", "--over", "bundles/live", *evidence)
            second = Path("bundles/latest").resolve().name
            digest = second.rpartition("-")[2]
            wait_for(lambda: replies[-1].headers["x-model-digest"] == digest)
            sopdeploy("promote", "--back", "bundles/live")
            assert Path("bundles/live").resolve().name == first
            wait_for(lambda: replies[-1].headers["x-model-digest"] != digest)
        finally:
            stopped.set()
            sending.join()
    assert {reply.status_code for reply in replies} == {200}
    assert {reply.headers["x-model-digest"] for reply in replies} == {first.rpartition("-")[2], digest}
    assert compared["verdict"] in {"better", "not worse"}
    assert [entry["label"] for entry in compared["new"]] == ["жёлтый"]
    assert compared["num_images"] + compared["num_copies"] + sum(
        entry["num_images"] for entry in compared["new"]
    ) == sum(len(files) for _, _, files in os.walk("photos-held-out"))
    *_, move, _ = [json.loads(line) for line in Path("bundles/promotions.jsonl").read_text().splitlines()]
    assert (move["before"], move["after"], move["comparison"]["verdict"]) == (
        first,
        second,
        compared["verdict"],
    )
    shutil.rmtree(home / "kept")
