"""Run the commands of every documentation page in order, except those listed in `NOT_RUN`."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.docs.page_commands import SERVE, Workspace, steps
from tests.docs.reading import PAGES, name
from tests.support.service import write_bundle

# Patterns of steps: they need a network, a cluster, a data set, a GPU, or hours
NOT_RUN = (
    r"pip (install|wheel)|python3 -m venv |\. \.venv/bin/activate",
    r"sopdeploy demo",  # `tests/test_walk.py` runs it
    r"(git|make|docker|helm) ",
    r".* s3://",
    r"sopdeploy classify .*--ray ",  # `tests/commands/classify/test_on_ray.py` runs it
    r".*(--profiles|--runtime tensorrt)",
    r"sopdeploy (import|\w+ (ckpt|fitted)\.pt)",
    r"sopdeploy promote ",  # needs two networks; `tests/commands/promotion`
    r"sopdeploy reproduce .*--data",
    r".* (--pretrained|--models) |.* --set mirror=true",  # the second follows the first
    r"sopdeploy label |.* --unknown ",  # `tests/commands/test_label.py`
    r".* (fgvc|--data cifar10)",
    r"torchrun ",
    r"datum ",
    r"python benchmarks/",
    r"tensorboard |import sopdeploy\nimport wandb",  # trackers of others
    r"import (datasets|tarfile|pickle)\n|from typing import Literal\n",  # `test_data_examples.py`
    r"python -m sopdeploy.timm ",  # a script of timm
    r"sopdeploy export output/train",
)

NOT_RUN_PAGES = (
    "docs/cli.md",
    "docs/keep.md",  # needs a person who looks at kept photos
)
# Trains a network
BEGINS = re.compile(
    r"sopdeploy train (--recipe photos-dsop )?--data photos|data scenes|sopdeploy\.train\(data="
)
# So no network is trained
QUICK = (
    "docs/http.md",
    "docs/batch.md",
    "docs/deploy.md",
    "docs/monitoring.md",
    "docs/operations.md",
)
# A page of each reader
TWICE = ("README.md", "docs/index.md", "docs/python.md")
RUNNABLE = {name(page): page for page in PAGES if name(page) not in NOT_RUN_PAGES}


def is_run(step: str) -> bool:
    return not any(re.match(pattern, step) for pattern in NOT_RUN)


def run_page(page: Path, workspace: Workspace) -> int:
    """Run the steps of *page*, those after a `serve` while the server runs; return their number."""
    todo = [step for step in steps(page) if is_run(step)]
    with ExitStack() as server:
        for step in todo:
            if SERVE.match(step):
                server.close()
                server.enter_context(workspace.serving(step))
            else:
                workspace.run(step)
    return len(todo)


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("pgrep") is None,
    reason="needs pgrep, and Linux, which names the process of a script after its file",
)
def test_the_command_of_a_reload_finds_a_script_as_pip_writes_it(tmp_path: Path) -> None:
    (command,) = re.findall(
        r"^.*kill .*$", RUNNABLE["docs/operations.md"].read_text(), re.MULTILINE
    )
    script = tmp_path / f"sop-{os.getpid()}"  # a name that no other process has
    # A `wait` can miss a signal that arrives just before it, and a child has the name of the
    # script at first.
    loop = "while :; do sleep 0.1; done"
    lines = ("#!/bin/sh", "trap 'echo reloaded; exit' HUP", "sleep 0.1", "echo ready", loop)
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    # A shell cannot trap what it was told to ignore
    heed = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    with subprocess.Popen(
        [script], stdout=subprocess.PIPE, text=True, preexec_fn=heed
    ) as server:
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        subprocess.run(
            ["/bin/sh", "-c", command.replace("sopdeploy", script.name)], check=False
        )
        try:
            assert server.communicate(timeout=20)[0] == "reloaded\n"
        finally:
            server.kill()


WITH_STEPS = [page for page, path in RUNNABLE.items() if any(map(is_run, steps(path)))]
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.mark.parametrize(
    "page", [QUICK[0], *(pytest.param(page, marks=pytest.mark.nightly) for page in QUICK[1:])]
)
def test_the_commands_of_pages_for_any_bundle_work(page: str, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_bundle(tmp_path / "bundles")

    assert run_page(RUNNABLE[page], workspace) >= 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with the run and the bundle of a network with branches, quickly trained."""
    workspace = Workspace(tmp_path_factory.mktemp("home"))
    small = "--set epochs=12 --set preprocess.resize=36 --set preprocess.crop=32"
    # The last setting wins
    workspace.run(f"sopdeploy train --recipe photos-dsop --data photos {small}")
    workspace.run("sopdeploy export runs/latest/best.pt --detach")
    return workspace


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in WITH_STEPS if page not in QUICK])
def test_the_commands_of_a_page_work(
    page: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    if not any(BEGINS.search(step) for step in steps(RUNNABLE[page])):
        trained: Workspace = request.getfixturevalue("trained")
        for folder in ("runs", "bundles"):
            shutil.copytree(trained.folder / folder, tmp_path / folder)

    for _ in range(2 if page in TWICE else 1):
        assert run_page(RUNNABLE[page], workspace) >= 1
