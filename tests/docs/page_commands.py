"""Extract the commands of a documentation page, and run them in a prepared folder."""

import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.support.children import free_port, line_of

DRAW = """
from pathlib import Path

import numpy as np
from PIL import Image

random = np.random.default_rng(0)
y, x = np.mgrid[0:96, 0:96]
PATTERNS = {
    "bars": lambda size: np.sin(x / size),
    "checks": lambda size: np.sin(x / size) * np.sin(y / size),
    "diagonals": lambda size: np.sin((x + y) / size),
    "rings": lambda size: np.sin(np.hypot(x - 48, y - 48) / size),
    "steps": lambda size: np.sin(y / size),
    "waves": lambda size: np.sin((x + 12 * np.sin(y / 8)) / size),
}
for name, pattern in PATTERNS.items():
    folder = Path("photos") / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(10):
        light = 0.5 + 0.5 * pattern(random.uniform(2.5, 4.5))
        dark, bright = random.uniform(0, 90, 3), random.uniform(140, 255, 3)
        image = dark + light[..., None] * (bright - dark)
        noisy = image + random.normal(0, 12, image.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg")
"""  # six classes of ten images each
CODE = re.compile(
    r"^( *)```(sh|bash|python)\n(.*?)^\1```|^ {4}(\S[^\n]*)$", re.MULTILINE | re.DOTALL
)
PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:curl|docker|git|helm|make|pip|python|uv|sopdeploy|torchrun)\s"
)
SERVE = re.compile(r"(?:[A-Z_]+=\S+ )*sopdeploy serve ")
TINY = "--set epochs=1 --set threads=1 --set preprocess.resize=18 --set preprocess.crop=16"
TINY_PYTHON = 'recipe="photos-dsop", epochs=1, threads=1, preprocess={"resize": 18, "crop": 16}'
QUICKER = {
    "train --data photos": f"train --data photos --pretrained none --set procedure.kind=loop {TINY}",
    "--recipe photos-dsop --data photos": f"--recipe photos-dsop --data photos {TINY}",
    'train(data="photos")': f'train(data="photos", {TINY_PYTHON})',
    "--seconds 20": "--seconds 2",
    "range(240)": "range(60)",
    "--set epochs=8": "--set epochs=2",
    "--set epochs=10": "--set epochs=2",
    "--epochs 10": "--epochs 2",
}
FIRST_BUNDLE, LAST_BUNDLE = "photos-3f6c01d2a4b7", "photos-77aa01d2e0c4"  # example names


def steps(page: Path) -> list[str]:
    """List the steps of *page* in order: shell lines, shell scripts and Python blocks."""
    text = re.sub(r" \\\n +", " ", page.read_text(encoding="utf-8"))
    found: list[str] = []
    for indent, language, block, line in CODE.findall(text):
        body = re.sub(rf"^{indent}", "", block, flags=re.MULTILINE)
        if language == "python" or body.startswith("#!"):
            found.append(body)
        elif language:
            found += [
                typed for typed in body.splitlines() if typed and not typed.startswith("#")
            ]
        elif PROGRAM.match(line):
            found.append(line)
    return found


def draw(folder: Path, photos: str = "photos", seed: int = 0) -> None:
    """Draw the photographs of a reader in *folder*."""
    script = DRAW.replace("default_rng(0)", f"default_rng({seed})").replace(
        '"photos"', f'"{photos}"'
    )
    (folder / "make_photos.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, "make_photos.py"], cwd=folder, check=True)


class Workspace:
    """A folder with images in which `sopdeploy` is this checkout and ports of the pages are free ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = folder / "programs" / "sopdeploy"
        program.parent.mkdir(parents=True)
        program.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -m sopdeploy "$@"\n', encoding="utf-8"
        )
        program.chmod(0o755)
        draw(folder)
        draw(folder, "test-photos", 1)
        with Image.open(folder / "photos" / "rings" / "0.jpg") as image:
            image.save(folder / "photo.jpg")
            image.save(folder / "other.png")
        with tarfile.open(folder / "photos.tar", "w") as archive:
            archive.add(folder / "photos", "photos")
        self.port = str(free_port())

    def environment(self) -> dict[str, str]:
        programs = (
            str(self.folder / "programs"),
            str(Path(sys.executable).parent),
            os.environ["PATH"],
        )
        return {
            **os.environ,
            "PATH": os.pathsep.join(programs),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": "127.0.0.1",
            "SOPDEPLOY_PORT": self.port,
        }

    def resolve(self, step: str) -> str:
        """Replace the port and bundle names of *step* by those of this workspace; HTTP errors fail."""
        step = re.sub(r"\b8000\b", self.port, step)
        made = sorted(
            (self.folder / "bundles").glob("*-*/"), key=lambda path: path.stat().st_mtime_ns
        )
        for shown, path in zip((FIRST_BUNDLE, LAST_BUNDLE), made[:1] + made[-1:], strict=False):
            step = step.replace(shown, path.name)
        for shown, quicker in QUICKER.items():
            step = step.replace(shown, quicker)
        return re.sub(r"^curl ", "curl -sS --fail ", step)

    def run(self, step: str) -> str:
        """Run a shell line or Python code, which must succeed, and return its output."""
        resolved = self.resolve(step)
        python = "\n" in resolved or resolved.startswith(("import ", "from "))
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", resolved]
            if python
            else ["/bin/sh", "-c", resolved],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, f"{resolved}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def serving(self, step: str) -> Iterator[None]:
        """Run the server of *step* until the block ends; it must then exit with 0."""
        server = subprocess.Popen(
            [
                "/bin/sh",
                "-c",
                re.sub(r"sopdeploy serve", "exec sopdeploy serve", self.resolve(step)),
            ],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        with server:
            try:
                assert line_of(server).startswith("ready: "), step
                yield
                server.send_signal(signal.SIGINT)
                assert server.wait(60) == 0
            finally:
                server.kill()
