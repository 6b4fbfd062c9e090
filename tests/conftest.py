"""Test selection, hypothesis profiles, and the state between files."""

import asyncio
import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.rooms import PYTHONPATH

# The default run is reproducible: fixed examples, no example database, no limit of time. `make
# fuzz` draws new examples.
UNTIMED: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile("reproducible", derandomize=True, **UNTIMED)
settings.register_profile("fuzz", derandomize=False, print_blob=True, **UNTIMED)
settings.load_profile("reproducible")

# Tests run on the CPU, also on a machine with a GPU. Tests of `auto` ask for it.
os.environ.setdefault("SOPDEPLOY_RUNTIME", "onnxruntime-cpu")

# Child processes import the packages of this checkout, whichever one is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (PYTHONPATH, os.environ.get("PYTHONPATH")))
)

# The plug-ins of the machine must not change a test. Those of plug-ins switch them on.
os.environ["SOPDEPLOY_PLUGINS"] = "off"

# The features of photographs are not kept in the user's cache folder.
CACHE = tempfile.TemporaryDirectory(prefix="sopdeploy-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name
# Code that another run compiled, for another processor, computed wrong values and freed foreign memory.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{CACHE.name}/inductor"

# Garbage collection took half of the time of importing the test modules, and of the exit of the
# process.
gc.disable()
atexit.register(gc.freeze)


# What a machine may lack is a fixture, which skips without it. A test that uses the fixture gets the
# marker at collection, so nobody writes it by hand.
MARKERS = {"chromium": "browser", "cuda_device": "gpu", "tensorrt": "tensorrt"}

# Groups of tests that one of these options runs, and what else runs them.
GROUPS = {
    "slow": (("--slow", "--nightly"), "`make test-all` runs them"),
    "nightly": (("--nightly",), "`make test-nightly` runs them, in an hour and a half"),
}


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """`program(name)` returns the path of an installed program; without it, the test is skipped."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not installed")
        return path

    return find


def pytest_addoption(parser: pytest.Parser) -> None:
    for group in GROUPS:
        parser.addoption(
            f"--{group}", action="store_true", help=f"also run the tests marked {group}"
        )
    parser.addoption("--reverse", action="store_true", help="run the tests in reverse order")
    parser.addoption(
        "--no-skips", action="store_true", help="a test that cannot run here fails"
    )
    parser.addoption(
        "--rewrite-goldens", action="store_true", help="rewrite tests/goldens; review the diff"
    )


class RecordedPopen(subprocess.Popen):  # type: ignore[type-arg]
    """Records the process in `STARTED`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        STARTED.add(self)


STARTED: weakref.WeakSet[RecordedPopen] = weakref.WeakSet()
SHARED = "tests.cuda.open_graphs"  # of all files of a worker, ends with it
subprocess.Popen = RecordedPopen  # type: ignore[misc]


def process_state() -> dict[str, Any]:
    """End the children that decode; return what later files on the same worker depend on.

    What imports of libraries set is left out.
    """
    if decoding := sys.modules.get("sopdeploy_service.decoding.pool"):
        decoding.shared_template().close()
    state: dict[str, Any] = {"folder": Path.cwd(), "mask": os.umask(0), "event loop": None}
    os.umask(state["mask"])
    state["settings"] = {
        name: text for name, text in os.environ.items() if name.startswith("SOPDEPLOY_")
    }
    state["processes"] = [
        child.args for child in STARTED if SHARED not in child.args and child.poll() is None
    ]
    with suppress(RuntimeError):
        state["event loop"] = asyncio.get_running_loop()
    if torch := sys.modules.get("torch"):
        state["default type"] = torch.get_default_dtype()
    return state


@pytest.fixture
def allow_random_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the few-shot procedure read random features, which need no file; a user gets an error.

    They do not tell copies, so that only nearly equal images are copies; `few_shot/test_groups.py` tests the cosine.
    """
    monkeypatch.setattr(
        "sopdeploy.training.records.checkpoints.Setup.name_random_frozen_parts", lambda _: ""
    )
    monkeypatch.setattr("sopdeploy.data.photos.copies.COPY", 2.0)


@pytest.fixture(scope="module", autouse=True)
def _state_between_files() -> Iterator[None]:
    """Fail if a file leaves another state of its process; restore signals, of which a server ignores some."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM)
    }
    before = process_state()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert {
        name: value
        for name, value in process_state().items()
        if before.get(name, value) != value
    } == {}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.support.scheduling import GroupScheduling

    return GroupScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)  # before `-m` reads the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, marker in MARKERS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
        for group, (options, reason) in GROUPS.items():
            if item.get_closest_marker(group) and not any(map(config.getoption, options)):
                item.add_marker(pytest.mark.skip(reason=f"{group}: {reason}"))

    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        from tests.support.scheduling import start_position

        items.sort(key=lambda item: start_position(item.nodeid))
    if config.getoption("--reverse"):
        items.reverse()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome = "failed"
    return report


@pytest.hookimpl(trylast=True)  # below the slowest tests
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests were skipped for each reason, in at most ten lines."""
    skipped = terminalreporter.stats.get("skipped", [])
    counts = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if not counts:
        return

    terminalreporter.section("tests that did not run")
    for reason, count in counts.most_common(8):
        terminalreporter.write_line(f"{count:4} {reason}")
    if len(counts) > 8:
        others = sum(count for _, count in counts.most_common()[8:])
        terminalreporter.write_line(
            f"{others:4} for {len(counts) - 8} other reasons: pytest -rs"
        )


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but rarely, and without the imported objects.

    Capturing a graph allocates many small objects; without this, collections took a tenth of an
    export.
    """
    gc.freeze()
    gc.enable()
    gc.set_threshold(100_000, 20, 100)
