"""Run the commands of every documentation page in order, except those listed in `NOT_RUN`."""

import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.docs.page_commands import FIRST_BUNDLE, SERVE, Workspace, steps
from tests.docs.reading import PAGES, ROOT, name
from tests.service.conftest import write_bundle

NOT_RUN = {  # pattern of a step: the reason why it is not run
    r"pip (install|wheel)": "needs a package index; `make wheel-test` installs the wheel",
    r"(git|make) ": "needs a checkout; CI runs it",
    r"docker ": "needs Docker; `make container-test` builds and runs the image",
    r"helm ": "needs a cluster; `tests/deploy` renders the chart with such values",
    r"sopdeploy classify .*--ray": "needs a Ray cluster; see `tests/service/commands/batch`",
    r".* s3://": "needs an object store; `tests/sopdeploy/bundle` uses one in memory",
    r"sopdeploy ray .*--replicas": "needs a Ray cluster; see `tests/service/server/on_ray`",
    r".*(--profiles|--runtime tensorrt)": "needs TensorRT and a GPU; `tests/tensorrt` uses fakes",
    r"sopdeploy (import|\w+ ckpt\.pt)": "needs a published file; `tests/sopdeploy/importers` creates some",
    r"sopdeploy reproduce .*--data": "needs ImageNet or CIFAR-10; `tests/sopdeploy/reproduction` runs tables",
    r".* --weights ": "needs a weight file; `test_start_weights` creates some",
    r".* fgvc": "needs the data set; `test_data_sets` creates its layout",
    r"torchrun .*mine\.toml": "needs eight GPUs; see `tests/sopdeploy/training/distributed`",
    r"#!/bin/bash\n#SBATCH": "needs SLURM",
    r"sopdeploy --(install|show)-completion": "needs an interactive shell",
    r"python benchmarks/": "takes minutes to hours; `tests/benchmarks` runs small versions",
}
TESTED_ELSEWHERE = {  # pages with their own tests, or with independent examples
    "docs/quickstart.md": "`test_quickstart` runs it and checks the output",
    "docs/notebooks/second_order_pooling.md": "`test_notebook` runs the notebook",
    "docs/cli.md": "independent examples; `test_commands` parses them",
}
BEGINS = re.compile(r"sopdeploy train --data photos|data scenes|sopdeploy\.train\(data=")  # trains a network
QUICK = ("docs/http.md", "docs/deploy.md", "docs/batch.md")  # work with any bundle, so no network is trained
RUNNABLE = {name(page): page for page in PAGES if name(page) not in TESTED_ELSEWHERE}


def reason_not_run(step: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if re.match(start, step)), None)


def run_page(page: Path, workspace: Workspace) -> int:
    """Run the steps of *page*, those after a `serve` while the server runs; return their number."""
    todo = [step for step in steps(page) if reason_not_run(step) is None]
    with ExitStack() as server:
        for step in todo:
            if SERVE.match(step):
                server.close()
                server.enter_context(workspace.serving(step))
            else:
                workspace.run(step)
    return len(todo)


WITH_STEPS = [
    page for page, path in RUNNABLE.items() if not all(reason_not_run(step) for step in steps(path))
]
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.mark.parametrize(
    "page", [QUICK[0], *(pytest.param(page, marks=pytest.mark.slow) for page in QUICK[1:])]
)
def test_the_commands_of_pages_for_any_bundle_work(page: str, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_bundle(tmp_path / "bundles")
    assert run_page(RUNNABLE[page], workspace) > 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace after steps 2 and 3 of the quick start, with the fast training."""
    workspace = Workspace(tmp_path_factory.mktemp("home"))
    quickly = next(step for step in steps(ROOT / "docs" / "quickstart.md") if "--set epochs=12" in step)
    workspace.run(quickly)  # its settings take precedence over those of the workspace
    workspace.run("sopdeploy export runs/latest/best.pt --detach")
    return workspace


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in WITH_STEPS if page not in QUICK])
def test_the_commands_of_a_page_work(page: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    if not any(BEGINS.search(step) for step in steps(RUNNABLE[page])):
        trained: Workspace = request.getfixturevalue("trained")
        for folder in ("runs", "bundles"):
            shutil.copytree(trained.folder / folder, tmp_path / folder)
    assert run_page(RUNNABLE[page], workspace) >= 1


def test_every_exception_matches_a_step_and_every_listed_page_exists() -> None:
    shown = [step for page in RUNNABLE.values() for step in steps(page)]
    assert [start for start in NOT_RUN if not any(re.match(start, step) for step in shown)] == []
    assert set(QUICK) <= set(WITH_STEPS)
    assert set(TESTED_ELSEWHERE) <= {name(page) for page in PAGES}


def test_pages_with_example_bundle_names_say_so() -> None:
    said = re.compile("your bundles?|bundle of the", re.IGNORECASE)
    shows = [path for path in RUNNABLE.values() if any(FIRST_BUNDLE in step for step in steps(path))]
    assert len(shows) > 6
    assert [name(path) for path in shows if not said.search(path.read_text(encoding="utf-8"))] == []


def test_steps_are_shell_lines_scripts_and_python_blocks_in_order(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "    A=1 sopdeploy serve b\n\n"
        "1. Then\n\n    ```sh\n    # no\n    curl \\\n      x\n    make y\n    ```\n    told in a list\n\n"
        "```python\nimport a\n\na\n```\n```toml\nkey = 1\n```\n```bash\n#!/bin/sh\nls\n```\n"
    )
    assert steps(page) == ["A=1 sopdeploy serve b", "curl x", "make y", "import a\n\na\n", "#!/bin/sh\nls\n"]
