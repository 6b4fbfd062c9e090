"""Classes and files with names of all kinds, from training to classification, in three locales."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from tests.real.conftest import LITE0

CLASSES = {  # folders of the photographs: names of the classes
    "dress": "Überwurf lang",
    "hat": '帽子 "ok"',
    "shoes": unicodedata.normalize("NFD", "Schuhé") + " 👟",
    "pants": "-weiß.it's",
}
FILES = ("Foto März {}.jpg", "写真{}.jpg", "-lead {}.jpg", "q'{}\".jpg", "x" * 190 + "{}.jpg")
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0"},
    "C in UTF-8 mode": {"LC_ALL": "C", "PYTHONUTF8": "1"},
    "UTF-8": {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"},
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("locale", LOCALES)
def test_names_of_all_kinds_pass_through_every_command(
    locale: str, photos: Path, lite0_file: Path, tmp_path: Path
) -> None:
    for source, name in CLASSES.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, photo in enumerate(sorted((photos / source).glob("*.jpg"))[:6]):
            shutil.copy(photo, tmp_path / "photos" / name / FILES[number % len(FILES)].format(number))
    shutil.copy(sorted((photos / "hat").glob("*.jpg"))[-1], tmp_path / "Foto März.jpg")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [Path(sys.executable).with_name("sopdeploy"), *arguments],
            cwd=tmp_path, env={**os.environ, **LOCALES[locale]}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    run("train", "--data", "photos", "--weights", str(lite0_file), "--set", f"model.name={LITE0}")
    run("export", "runs/latest/best.pt", "--detach")
    (answer,) = json.loads(run("predict", "bundles/latest", "Foto März.jpg", "--json"))
    assert answer["classes"][0]["label"] == CLASSES["hat"]
    checked = json.loads(run("data", "check", "photos", "--json"))
    assert {*checked["parts"][0]["classes"]} == {*CLASSES.values()}
    run("classify", "bundles/latest", "photos", "--out", "answers")
    import pyarrow.parquet

    rows = [
        row
        for file in (tmp_path / "answers" / "rows").glob("*.parquet")
        for row in pyarrow.parquet.read_table(file).to_pylist()
    ]
    assert len(rows) == 6 * len(CLASSES)
    assert {row["error"] for row in rows} == {None}
