"""Classes and files with names of all kinds through the whole loop, in three locales."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from PIL import Image

from tests.real.conftest import LITE0
from tests.service.children import announcing
from tests.service.conftest import wait_for

CLASSES = {  # folders of the photographs: names of the classes
    "dress": "Überwurf " + "ж" * 95,  # 200 bytes
    "hat": '帽子 "ok"',
    "shoes": unicodedata.normalize("NFD", "Schuhé") + " 👟",
    "pants": "-weiß.it's é",  # new after the first deployment
}
NEW = CLASSES["pants"]
FILES = ("Foto März {}.jpg", "写真{}.jpg", "-lead {}.jpg", "q'{}\".jpg", "x" * 190 + "{}.jpg", "é{}.jpg")
PHOTOS, KEPT, PICTURE = "Fotos März", "gehalten é", "Foto März.jpg"
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0"},
    "C in UTF-8 mode": {"LC_ALL": "C", "PYTHONUTF8": "1"},
    "UTF-8": {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"},
}
COMMAND = Path(sys.executable).with_name("sopdeploy")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def decoded(path: Path) -> str:
    """The hash of the pixels, which stay when metadata are removed."""
    return hashlib.sha256(Image.open(path).convert("RGB").tobytes()).hexdigest()


class Program(NamedTuple):
    """The program in *folder*, with the locale of *env*."""

    folder: Path
    env: dict[str, str]

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run a command that exits with *status*; return what it prints, of an error on stderr."""
        done = subprocess.run(
            [COMMAND, *arguments], cwd=self.folder, env=self.env, capture_output=True, check=False
        )
        assert done.returncode == status, done.stderr.decode()
        return (done.stderr if status else done.stdout).decode()

    def train_and_export(self, *options: str) -> None:
        """Train on the photographs and export the network."""
        self.run("train", "--data", PHOTOS, *options)
        self.run("export", "runs/latest/best.pt", "--detach")

    def running(self, pattern: str, *arguments: str) -> AbstractContextManager[str]:
        """Run a command that serves until the block ends; yield the URL that *pattern* finds."""
        return announcing(pattern, *arguments, cwd=self.folder, env=self.env)


@pytest.mark.parametrize("locale", LOCALES)
def test_names_of_all_kinds_pass_through_every_command(
    locale: str, photos: Path, lite0_file: Path, tmp_path: Path
) -> None:
    program = Program(tmp_path, {**os.environ, "PYTHONUNBUFFERED": "1", **LOCALES[locale]})
    traffic: dict[Path, str] = {}
    for source, name in CLASSES.items():
        for number, photo in enumerate(sorted((photos / source).glob("*.jpg"))):
            if name == NEW or number >= len(FILES):
                traffic[photo] = name
                continue
            (tmp_path / PHOTOS / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, tmp_path / PHOTOS / name / FILES[number].format(number))
    shutil.copy(sorted((photos / "hat").glob("*.jpg"))[-1], tmp_path / PICTURE)
    start = ("--weights", str(lite0_file), "--set", f"model.name={LITE0}")
    program.train_and_export(*start)
    predict_check_and_classify(program)
    second_week(program, traffic)
    train_with_a_table(program, start)
    name_without_utf8(program)


def predict_check_and_classify(program: Program) -> None:
    """Answer with the first bundle, whose classes are all but the new one."""
    import pyarrow.parquet

    (answer,) = json.loads(program.run("predict", "bundles/latest", PICTURE, "--json"))
    assert answer["classes"][0]["label"] in CLASSES.values()
    checked = json.loads(program.run("data", "check", PHOTOS, "--json"))
    assert {*checked["parts"][0]["classes"], NEW} == {*CLASSES.values()}
    program.run("classify", "bundles/latest", PHOTOS, "--out", "answers")
    rows = [
        row
        for file in (program.folder / "answers" / "rows").glob("*.parquet")
        for row in pyarrow.parquet.read_table(file).to_pylist()
    ]
    assert len(rows) == len(FILES) * (len(CLASSES) - 1)
    assert {row["error"] for row in rows} == {None}


def second_week(program: Program, traffic: dict[Path, str]) -> None:
    """Keep and label *traffic*, by requests and by moving files; train again, compare, promote, return."""
    live, kept = program.folder / "bundles" / "live", program.folder / KEPT
    program.run("promote", "bundles/latest", "--over", "bundles/live")
    settings = [f"--setting={text}" for text in ("follow=true", f"keep={KEPT}", "keep_sample=1")]
    with program.running(r"ready: (\S+)  ", "serve", "bundles/live", "--port", "0", *settings) as url:

        def send(photo: Path) -> httpx.Response:
            return httpx.post(f"{url}/v1/classify", content=photo.read_bytes(), timeout=60)

        for photo in traffic:
            assert send(photo).json()["classes"][0]["label"] in CLASSES.values()
        wait_for(lambda: len([*kept.glob("*.json")]) == len(traffic))
        label(program, {decoded(photo): name for photo, name in traffic.items()})
        program.train_and_export("--from", "bundles/live")
        evidence = ("--data", f"{PHOTOS}-held-out")
        compared = json.loads(program.run("compare", "bundles/live", "bundles/latest", *evidence, "--json"))
        assert [entry["label"] for entry in compared["new"]] == [NEW]
        program.run("promote", "bundles/latest", "--over", "bundles/live", *evidence, "--force", "größer: é")
        bundles = [live.resolve().name]
        wait_for(lambda: send(next(iter(traffic))).headers["x-model-digest"] == bundles[0][-12:])
        program.run("promote", "--back", "bundles/live")
        assert live.resolve().name not in bundles
        wait_for(lambda: send(next(iter(traffic))).headers["x-model-digest"] == live.resolve().name[-12:])


def label(program: Program, shown: dict[str, str]) -> None:
    """Move six photographs of the new class with their files, and label the others over HTTP."""
    names = {path: shown[decoded(path)] for path in (program.folder / KEPT).glob("*.jpg")}
    moved = [path for path, name in names.items() if name == NEW][:6]
    (program.folder / PHOTOS / NEW).mkdir()
    for path in moved:
        path.rename(program.folder / PHOTOS / NEW / path.name)
    arguments = ("label", KEPT, "--photos", PHOTOS, "--port", "0")
    with program.running(r"page +(\S+)", *arguments) as page, httpx.Client(follow_redirects=True) as client:
        client.get(page)
        for path in names.keys() - moved:
            given = {"id": path.stem, "kind": "class", "name": names[path]}
            reply = client.post(httpx.URL(page).join("/label"), json=given)
            assert reply.status_code == 200, reply.text


def train_with_a_table(program: Program, start: Sequence[str]) -> None:
    """Train on the same files, whose classes are in `labels.csv`."""
    table = program.folder / "Tabelle é"
    shutil.copytree(program.folder / PHOTOS, table / "Bilder")
    with (table / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "classes"))
        for path in sorted(table.rglob("*.jpg")):
            writer.writerow((path.relative_to(table).as_posix(), path.parent.name))
    program.run("train", "--data", table.name, *start)
    checked = json.loads(program.run("data", "check", table.name, "--json"))
    assert {*checked["parts"][0]["classes"]} == {*CLASSES.values()}


def name_without_utf8(program: Program) -> None:
    """A name that is no UTF-8 gives one line."""
    folder = os.fsencode(program.folder / PHOTOS / CLASSES["hat"])
    shutil.copy(program.folder / PICTURE, folder + b"/b\xff.jpg")
    for command in (
        ("train", "--data", PHOTOS),
        ("data", "check", PHOTOS),
        ("classify", "bundles/latest", PHOTOS, "--out", "more"),
    ):
        message = program.run(*command, status=2)
        assert len(message.splitlines()) == 1, message
        assert "is not UTF-8; rename it" in message
