"""Every page is typed as it stands, step by step, but for the steps that `NOT_TYPED` says why not."""

import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.docs.reading import PAGES, ROOT, name
from tests.docs.typed import FIRST_BUNDLE, SERVE, Home, steps
from tests.service.conftest import write_bundle

NOT_TYPED = {  # a step that begins or goes on like this: why nobody types it here
    r"pip install": "asks a package index; `make wheel-test` installs the wheel with these extras",
    r"(git|make) ": "works on a checkout and not in a user's folder; CI does",
    r"docker ": "needs Docker; `make container-test` builds and runs the image",
    r"helm ": "needs a cluster; `tests/deploy` renders the chart with such values",
    r".* s3://": "needs an object store; `tests/travel` has one in memory",
    r"sopdeploy ray .*--replicas": "starts a Ray cluster; `tests/service/server/on_ray` does",
    r".*(--profiles|--runtime tensorrt)": "needs TensorRT and a GPU; `tests/tensorrt` has stand-ins",
    r"sopdeploy (import|\w+ ckpt\.pt)": "needs a published file; `tests/sopdeploy/importers` has its like",
    r"torchrun .*mine\.toml": "needs eight GPUs; see `tests/sopdeploy/training/distributed`",
    r"#!/bin/bash\n#SBATCH": "needs SLURM",
    r"sopdeploy --(install|show)-completion": "asks what shell it is typed in, which here is none",
    r"python benchmarks/capacity": "`test_scaling` computes its tables",
    r"python benchmarks/serving": "needs other servers and their scripts",
    r"python benchmarks/second_order_gain": "takes hours; `tests/benchmarks` walks it with tiny networks",
}
ELSEWHERE = {  # pages that another test runs, or that show examples for themselves, not a way to go
    "docs/quickstart.md": "`test_quickstart` types it and looks at what it prints",
    "docs/notebooks/second_order_pooling.md": "`test_notebook` runs the notebook",
    "docs/cli.md": "examples of the help, each for itself; `test_commands` parses them, each verb has tests",
}
QUICK = ("docs/http.md", "docs/deploy.md")  # need no trained network: any bundle does
TYPED = {name(page): page for page in PAGES if name(page) not in ELSEWHERE}


def why_not(step: str) -> str | None:
    return next((reason for start, reason in NOT_TYPED.items() if re.match(start, step)), None)


def type_page(page: Path, home: Home) -> int:
    """Type the steps of *page* in *home*, those after a server while it runs; return how many were typed."""
    todo = [step for step in steps(page) if why_not(step) is None]
    with ExitStack() as server:
        for step in todo:
            if SERVE.match(step):
                server.close()
                server.enter_context(home.serving(step))
            else:
                home.typed(step)
    return len(todo)


CAN_BE_TYPED = [page for page, path in TYPED.items() if not all(why_not(step) for step in steps(path))]
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.mark.parametrize("page", QUICK)
def test_a_page_for_any_bundle_can_be_typed(page: str, tmp_path: Path) -> None:
    home = Home(tmp_path)
    write_bundle(tmp_path / "bundles")
    assert type_page(TYPED[page], home) > 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home after steps 2 and 3 of the quick start, for those in a hurry."""
    home = Home(tmp_path_factory.mktemp("home"))
    quickly = next(step for step in steps(ROOT / "docs" / "quickstart.md") if "--set epochs=12" in step)
    home.typed(quickly)  # what it sets comes last, and counts
    home.typed("sopdeploy export runs/photos-dsop/best.pt --detach")
    return home


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in CAN_BE_TYPED if page not in QUICK])
def test_a_page_can_be_typed(page: str, trained: Home, tmp_path: Path) -> None:
    home = Home(tmp_path)
    begins = any(step.startswith("sopdeploy train --data photos") for step in steps(TYPED[page]))
    if not begins:
        for folder in ("runs", "bundles"):
            shutil.copytree(trained.folder / folder, tmp_path / folder)
    assert type_page(TYPED[page], home) >= 1


def test_every_reason_is_that_of_a_step_and_every_page_exists() -> None:
    shown = [step for page in TYPED.values() for step in steps(page)]
    assert [start for start in NOT_TYPED if not any(re.match(start, step) for step in shown)] == []
    assert set(QUICK) <= set(CAN_BE_TYPED)
    assert set(ELSEWHERE) <= {name(page) for page in PAGES}


def test_a_page_that_shows_a_bundle_says_whose_digits_these_are() -> None:
    said = re.compile("your bundle|yours has|bundle of the", re.IGNORECASE)
    shows = [path for path in TYPED.values() if any(FIRST_BUNDLE in step for step in steps(path))]
    assert len(shows) > 6
    assert [name(path) for path in shows if not said.search(path.read_text(encoding="utf-8"))] == []


def test_steps_are_lines_scripts_and_python_in_their_order(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "    A=1 sopdeploy serve b\n\n"
        "1. Then\n\n    ```sh\n    # no\n    curl \\\n      x\n    make y\n    ```\n    told in a list\n\n"
        "```python\nimport a\n\na\n```\n```toml\nkey = 1\n```\n```bash\n#!/bin/sh\nls\n```\n"
    )
    assert steps(page) == ["A=1 sopdeploy serve b", "curl x", "make y", "import a\n\na\n", "#!/bin/sh\nls\n"]
