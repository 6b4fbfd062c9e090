"""Write the files of a version by its own commands, into `VERSION.tar.xz` beside this module.

    python tests/formats/write.py VENV/bin/sopdeploy

The archive of a released version never changes. `tests/sopdeploy/test_formats.py` reads each. The
values of its chart are beside it, for `tests/deploy/test_deploy.py`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

OVERRIDES = ("model.config.base_width=2", "preprocess.resize=8", "preprocess.crop=8")
TRAIN = ("train", "--recipe", "digits-dsop", *(f"--set={text}" for text in OVERRIDES))
NOT_KEPT = (
    "*/.lock", "*/report.html", "bundles/latest", "bundles/*.html", "trained/last.pt", "stopped/best.pt",
)  # fmt: skip


def write(program: Path, archive: Path) -> None:
    """Let *program* train, stop another training, export, classify and keep; write *archive*."""
    with TemporaryDirectory(prefix="formats-") as folder:
        files = Path(folder)

        def run(*arguments: str | Path) -> None:
            subprocess.run([program, *arguments], cwd=files, check=True)

        run(*TRAIN, "--set=epochs=1", "--out=trained")
        stopped = subprocess.Popen(
            [program, *TRAIN, "--set=epochs=3", "--out=stopped"], cwd=files, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert stopped.stdout is not None
        # The first of three epochs has ended
        next((line for line in stopped.stdout if "1/3" in line), "")
        stopped.terminate()
        assert stopped.wait() == 128 + signal.SIGTERM, "the training ended before the signal"
        run("export", "trained/best.pt", "--detach", "--max-batch=1", "--out=bundles")
        (bundle,) = files.glob("bundles/*-*/")
        (files / "photos").mkdir()
        shutil.copy(bundle / "golden-0.jpg", files / "photos" / "zero.jpg")
        run(
            "classify",
            bundle.relative_to(files),
            "photos",
            "--set",
            "logits=true",
            "--out=classified",
        )
        keep(program, files, bundle)
        for pattern in NOT_KEPT:
            for path in files.glob(pattern):
                path.unlink()
        with tarfile.open(archive, "w:xz") as packed:
            packed.add(
                files,
                ".",
                filter=lambda entry: entry.replace(
                    uid=0, gid=0, uname="", gname="", deep=False
                ),
            )


def keep(program: Path, files: Path, bundle: Path) -> None:
    """Let a server of *bundle* keep the photograph in *files*."""
    (files / "kept").mkdir(mode=0o700)
    settings = ("--set=keep=kept", "--set=keep_sample=1", "--port=0")
    command = [program, "serve", bundle, *settings]
    with subprocess.Popen(
        command, cwd=files, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:
        assert server.stdout is not None
        try:
            addresses = (re.findall(r"http://127[.\d:]+", line) for line in server.stdout)
            (url,) = next(filter(None, addresses))
            photo = (files / "photos" / "zero.jpg").read_bytes()
            urllib.request.urlopen(
                f"{url}/v1/classify?reported=0", data=photo, timeout=60
            ).close()
            deadline = time.monotonic() + 60
            while not list(files.glob("kept/**/*.jpg")):
                assert time.monotonic() < deadline, "the server kept no photograph"
                time.sleep(0.1)
        finally:
            server.terminate()


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    program = Path(sys.argv[1]).absolute()
    _, version = subprocess.check_output([program, "--version"], text=True).split()
    write(program, Path(__file__).with_name(f"{version}.tar.xz"))
    values = Path(__file__).parents[2] / "deploy" / "helm" / "sopdeploy" / "values.yaml"
    shutil.copy(values, Path(__file__).with_name(f"{version}.values.yaml"))
