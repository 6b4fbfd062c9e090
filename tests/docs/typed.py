"""What a page lets people type, and a home to type it in: pictures, the program, the page's server."""

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

from tests.docs.reading import ROOT, blocks
from tests.service.children import free_port, line_of

DRAW = blocks(ROOT / "docs" / "quickstart.md", "python")[0]
CODE = re.compile(r"^( *)```(sh|bash|python)\n(.*?)^\1```|^ {4}(\S[^\n]*)$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )*(?:curl|docker|git|helm|make|pip|python|sopdeploy|torchrun)\b")
SERVE = re.compile(r"(?:[A-Z_]+=\S+ )*sopdeploy serve ")
TINY = "--set epochs=1 --set threads=1 --set preprocess.resize=18 --set preprocess.crop=16"
QUICKER = {"train --data photos": f"train --data photos {TINY}", "--seconds 20": "--seconds 2"}
FIRST_BUNDLE, LAST_BUNDLE = "dsop-resnet20-3f6c01d2a4b7", "dsop-resnet20-77aa01d2e0c4"  # stand for one's own


def steps(page: Path) -> list[str]:
    """Return what *page* lets people type, in order: lines of a shell, scripts, and blocks of Python."""
    text = re.sub(r" \\\n +", " ", page.read_text(encoding="utf-8"))
    found: list[str] = []
    for indent, language, block, line in CODE.findall(text):
        body = re.sub(rf"^{indent}", "", block, flags=re.MULTILINE)
        if language == "python" or body.startswith("#!"):
            found.append(body)
        elif language:
            found += [typed for typed in body.splitlines() if typed and not typed.startswith("#")]
        elif PROGRAM.match(line):
            found.append(line)
    return found


def draw(folder: Path, photos: str = "photos", seed: int = 0) -> None:
    """Let the script of the quick start draw its pictures into *folder*."""
    script = DRAW.replace("default_rng(0)", f"default_rng({seed})").replace('"photos"', f'"{photos}"')
    (folder / "make_photos.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, "make_photos.py"], cwd=folder, check=True)


class Home:
    """A folder with pictures, in which `sopdeploy` is this one and the ports of the pages are free ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = folder / "programs" / "sopdeploy"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sopdeploy "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        draw(folder)
        draw(folder, "test-photos", 1)
        with Image.open(folder / "photos" / "rings" / "0.jpg") as picture:
            picture.save(folder / "photo.jpg")
            picture.save(folder / "other.png")
        with tarfile.open(folder / "photos.tar.xz", "w:xz") as archive:
            archive.add(folder / "photos", "photos")
        self.ports = {shown: str(free_port()) for shown in ("8000", "9000")}

    def environment(self) -> dict[str, str]:
        programs = (str(self.folder / "programs"), str(Path(sys.executable).parent), os.environ["PATH"])
        packages = os.pathsep.join(str(ROOT / folder) for folder in (".", "export", "service"))
        return {
            **os.environ,
            "PATH": os.pathsep.join(programs),
            "PYTHONPATH": packages,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": "127.0.0.1",
            "SOPDEPLOY_PORT": self.ports["8000"],
        }

    def meant(self, step: str) -> str:
        """Return *step* with the ports and the bundles of this home; what fails over HTTP is an error."""
        for shown, port in self.ports.items():
            step = re.sub(rf"\b{shown}\b", port, step)
        made = sorted((self.folder / "bundles").glob("*-*/"), key=lambda path: path.stat().st_mtime_ns)
        for shown, path in zip((FIRST_BUNDLE, LAST_BUNDLE), made[:1] + made[-1:], strict=False):
            step = step.replace(shown, path.name)
        for shown, quicker in QUICKER.items():
            step = step.replace(shown, quicker)
        return re.sub(r"^curl ", "curl -sS --fail ", step)

    def typed(self, step: str) -> str:
        """Return what *step* prints, a line for the shell or some Python; it must end well."""
        meant = self.meant(step)
        python = "\n" in meant or meant.startswith(("import ", "from "))
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", meant] if python else ["/bin/sh", "-c", meant],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, f"{meant}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def serving(self, step: str) -> Iterator[None]:
        """Run the server of *step* until it was interrupted, and must end with 0."""
        server = subprocess.Popen(
            ["/bin/sh", "-c", re.sub(r"sopdeploy serve", "exec sopdeploy serve", self.meant(step))],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        with server:
            try:
                printed = line_of(server)
                if printed.startswith("health: "):
                    printed = line_of(server)
                assert printed.startswith("ready: "), step
                yield
                server.send_signal(signal.SIGINT)
                assert server.wait(30) == 0
            finally:
                server.kill()
