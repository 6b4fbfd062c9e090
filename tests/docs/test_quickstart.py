"""`docs/quickstart.md` is typed as it stands, by a shell; only training is made tiny."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.reading import ROOT, blocks
from tests.ports import held_port

PAGE = ROOT / "docs" / "quickstart.md"
TINY = "--set epochs=1 --set threads=1 --set preprocess.resize=18 --set preprocess.crop=16"
CLASSES = {"bars", "checks", "diagonals", "rings", "steps", "waves"}
DRAW, ASK = blocks(PAGE, "python")
LINES = [line for block in blocks(PAGE, "sh") for line in block.splitlines()]


def draw(folder: Path) -> None:
    (folder / "make_photos.py").write_text(DRAW, encoding="utf-8")
    subprocess.run([sys.executable, "make_photos.py"], cwd=folder, check=True)


def test_the_script_draws_ten_pictures_of_each_of_six_classes(tmp_path: Path) -> None:
    draw(tmp_path)
    photos = sorted((tmp_path / "photos").glob("*/*.jpg"))
    assert len(photos) == 60
    assert {photo.parent.name for photo in photos} == CLASSES
    assert len({photo.read_bytes() for photo in photos}) == 60
    for photo in photos:
        with Image.open(photo) as picture:
            assert (picture.size, picture.mode) == ((96, 96), "RGB")


def test_the_page_goes_the_whole_way_in_order() -> None:
    verbs = [line.split()[1] for line in LINES if line.startswith("sopdeploy ")]
    assert verbs == ["train", "export", "verify", "predict", "serve", "doctor"]
    assert {line.split()[0] for line in LINES} == {"pip", "python", "sopdeploy", "curl"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with the pictures, and a `sopdeploy` that is this one."""
    program = tmp_path / "programs" / "sopdeploy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sopdeploy "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    draw(tmp_path)
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    packages = os.pathsep.join(str(ROOT / folder) for folder in (".", "export", "service"))
    return {
        **os.environ,
        "PATH": f"{home / 'programs'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": packages,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": "127.0.0.1",
    }


def typed(line: str, home: Path) -> str:
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=home,
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def port() -> Iterator[str]:
    with held_port() as held:
        yield str(held)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_command_works_as_printed(home: Path, port: str) -> None:
    lines = {line.split()[1]: line.replace("8000", port) for line in LINES if line.startswith("sopdeploy ")}
    typed(f"{lines['train']} {TINY}", home)
    assert "bitwise equal" in typed(lines["export"], home)
    assert typed(lines["verify"], home)
    assert re.search("|".join(CLASSES), typed(lines["predict"], home))
    server = subprocess.Popen(
        ["/bin/sh", "-c", f"exec {lines['serve']}"],
        cwd=home,
        env=environment(home),
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("ready: ")
            curl = next(line for line in LINES if line.startswith("curl ")).replace("8000", port)
            assert '"probability"' in typed(f"{curl} -sS --fail", home)
            (home / "ask.py").write_text(ASK.replace("8000", port), encoding="utf-8")
            assert re.match("|".join(CLASSES), typed(f'"{sys.executable}" ask.py', home))
            assert "request" in typed(lines["doctor"], home)
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0
        finally:
            server.kill()
