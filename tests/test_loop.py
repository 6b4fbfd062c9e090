"""The loop after the first deployment, by commands: from an empty folder to the second bundle live.

Classes, files and folders have names of all kinds, in three locales.
"""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from tests.service.api.pages.conftest import chromium, open_page  # noqa: F401  # fixtures
from tests.sopdeploy.training.runs import save_random
from tests.support.children import announcing
from tests.support.pictures import encoded
from tests.support.service import wait_for

COLOURS = {  # by the name of the class
    "Überwurf " + "ж" * 95: (40, 60, 200),  # 200 bytes
    '帽子 "ok"': (40, 180, 60),
    unicodedata.normalize("NFD", "Schuhé") + " 👟": (200, 50, 40),
    "-weiß.it's é": (200, 190, 40),  # new after the first deployment
}
*OLD, NEW = COLOURS
NAMES = {unicodedata.normalize("NFC", name) for name in COLOURS}  # of the classes
FILES = (
    "Foto März {}.png",
    "写真{}.png",
    "-lead {}.png",
    "q'{}\".png",
    "x" * 190 + "{}.png",
    "é{}.png",
)
PHOTOS, KEPT, PICTURE = "Fotos März", "gehalten é", "Foto März.png"
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0"},
    "C in UTF-8 mode": {"LC_ALL": "C", "PYTHONUTF8": "1"},
    "UTF-8": {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"},
}
FIRST, TRAFFIC = range(20), range(100, 130)
ASSIGNMENTS = (
    *("model.name=resnet8", "model.config={base_width=8}", "threads=1"),
    *("preprocess.resize=32", "preprocess.crop=32"),
)
SMALL = ("--weights", "weights.pt", *(f"--set={assignment}" for assignment in ASSIGNMENTS))
SETTINGS = (f"keep={KEPT}", "keep_sample=0.5", "follow=true")
SERVE = (
    "serve",
    "bundles/live",
    "--port",
    "0",
    *(f"--setting={setting}" for setting in SETTINGS),
)
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


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


@pytest.fixture(params=LOCALES)
def home(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder, with twenty photographs of three classes; commands run in each locale."""
    for label in OLD:
        (tmp_path / PHOTOS / label).mkdir(parents=True)
        for number in FIRST:
            name = FILES[number % len(FILES)].format(number)
            (tmp_path / PHOTOS / label / name).write_bytes(draw(label, number))
    (tmp_path / PICTURE).write_bytes(draw(OLD[0], 99))
    monkeypatch.chdir(tmp_path)
    for name, value in LOCALES[request.param].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def sopdeploy(*arguments: str, status: int = 0) -> str:
    """Run a command that exits with *status*; return what it prints, of an error on stderr."""
    command = [sys.executable, "-m", "sopdeploy", *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def label_all(open_page, url: str) -> None:  # noqa: F811
    """Label every photograph by keyboard: the number of its class, or `n` and the name of a new one."""
    host, slash, key = url.partition("/?")
    page = open_page(host, slash + key)
    page.wait_for_selector("#grid[aria-busy=false]", state="attached")
    page.locator("#one-by-one").click()
    session = page.evaluate("SESSION")  # without it, the client gets other photos than the page
    with httpx.Client(base_url=host, headers=session, follow_redirects=True) as client:
        client.get(slash + key)
        while (state := client.get("/state").json())["photograph"] is not None:
            identity = state["photograph"]["id"]
            while page.evaluate("state.photograph?.id") != identity:
                page.wait_for_timeout(20)
            name = CLASSES.get(decoded(client.get(f"/images/{identity}").content), "")
            assert name, "a photograph that was not sent"
            names = [entry["name"] for entry in state["classes"]]
            if name in names:
                page.keyboard.press(str(names.index(name) + 1))
            else:
                page.keyboard.press("n")
                page.keyboard.type(name)
                page.keyboard.press("Enter")
            # Not how many are left: the server may keep others meanwhile, which the last answer
            # shows.
            page.locator("#progress", has_text=f"{state['done'] + 1} done ").wait_for()
            page.locator("#main[aria-busy=false]").wait_for()


def test_from_an_empty_folder_to_the_second_bundle_live_without_a_failed_request(
    home,
    open_page,  # noqa: F811
) -> None:
    save_random(Path("weights.pt"), base_width=8)
    sopdeploy("train", "--data", PHOTOS, *SMALL)
    sopdeploy("export", "runs/latest/best.pt")
    first = Path("bundles/latest").readlink().name
    sopdeploy("promote", "bundles/latest", "--over", "bundles/live")
    replies: list[httpx.Response] = []
    stopped = threading.Event()
    terminal, stderr = os.openpty()
    with announcing(r"ready: (\S+)  ", *SERVE, stderr=stderr) as url:
        bodies = [draw(label, number) for number in TRAFFIC for label in COLOURS]
        replies += [
            httpx.post(f"{url}/v1/classify", content=body, timeout=60) for body in bodies
        ]
        body = next(filter(is_not_kept, (draw(OLD[2], number) for number in TRAFFIC)))

        def send() -> None:
            while not stopped.wait(0.05):
                replies.append(httpx.post(f"{url}/v1/classify", content=body, timeout=60))

        sending = threading.Thread(target=send)
        sending.start()
        try:
            with announcing(
                r"page +(\S+)", "label", KEPT, "--photos", PHOTOS, "--port", "0"
            ) as page_url:
                label_all(open_page, page_url)
            os.close(stderr)
            os.close(terminal)  # of the server
            printed = sopdeploy("train", "--data", PHOTOS, "--from", "bundles/live")
            assert re.search(rf"before, \S+-1: .* since then \+\d+ photos, new: {NEW}", printed)
            sopdeploy("export", "runs/latest/best.pt")
            evidence = ("--data", f"{PHOTOS}-held-out", "--tolerance", "10")
            compared = json.loads(
                sopdeploy("compare", "bundles/live", "bundles/latest", *evidence, "--json")
            )
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
    assert {reply.headers["x-model-digest"] for reply in replies} == {
        first.rpartition("-")[2],
        digest,
    }
    assert compared["verdict"] in {"better", "not worse"}
    assert [entry["label"] for entry in compared["new"]] == [NEW]
    kept_out = sum(len(files) for _, _, files in os.walk(f"{PHOTOS}-held-out"))
    assert compared["num_images"] + compared["num_copies"] == kept_out
    *_, move, _ = [
        json.loads(line) for line in Path("bundles/promotions.jsonl").read_text().splitlines()
    ]
    assert (move["before"], move["after"], move["comparison"]["verdict"]) == (
        first,
        second,
        compared["verdict"],
    )
    other_commands(home)


def other_commands(home: Path) -> None:
    """Run the other commands that read photographs."""
    answer_and_check()
    train_with_a_table()
    name_without_utf8(home)


def answer_and_check() -> None:
    """Answer for one photograph, and for the folder, whose classes are all."""
    (answer,) = json.loads(sopdeploy("predict", "bundles/latest", PICTURE, "--json"))
    assert answer["classes"][0]["label"] in NAMES
    checked = json.loads(sopdeploy("data", "check", PHOTOS, "--json"))
    assert {*checked["parts"][0]["classes"]} == NAMES
    sopdeploy("classify", "bundles/latest", PHOTOS, "--out", "answers")
    rows = pyarrow.parquet.read_table("answers").to_pylist()
    assert len(rows) == sum(len(files) for _, _, files in os.walk(PHOTOS))
    assert {row["error"] for row in rows} == {None}


def train_with_a_table() -> None:
    """Train on the same files, whose classes are in `labels.csv`."""
    table = Path("Tabelle é")
    shutil.copytree(PHOTOS, table / "Bilder")
    with (table / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [
            (str(path.relative_to(table)), path.parent.name)
            for path in (table / "Bilder").glob("*/*")
        ]
        csv.writer(file).writerows([("file", "classes"), *rows])
    sopdeploy("train", "--data", table.name, *SMALL)
    checked = json.loads(sopdeploy("data", "check", table.name, "--json"))
    assert {*checked["parts"][0]["classes"]} == NAMES


def name_without_utf8(home: Path) -> None:
    """A name that is no UTF-8 gives one line."""
    shutil.copy(PICTURE, os.fsencode(home / PHOTOS / OLD[1]) + b"/b\xff.png")
    for command in (
        ("train", "--data", PHOTOS),
        ("data", "check", PHOTOS),
        ("classify", "bundles/live", PHOTOS, "--out", "more"),
    ):
        message = sopdeploy(*command, status=2)
        assert len(message.splitlines()) == 1, message
        assert "is not UTF-8; rename it" in message
