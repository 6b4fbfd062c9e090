"""What needs something that is not here is skipped, and the summary says what was not run and why."""

import gc
import importlib.util
import shutil
from collections import Counter
from typing import Any

import pytest


def no_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def no_tensorrt() -> str | None:
    return None if importlib.util.find_spec("tensorrt") else "TensorRT is not installed"


def no_container() -> str | None:
    return None if shutil.which("buildah") or shutil.which("podman") else "no container builder"


def no_browser() -> str | None:
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return None if shutil.which("chromium") else "no chromium"


def no_ray() -> str | None:
    return None if importlib.util.find_spec("ray") else "Ray is not installed"


MISSING = {
    "gpu": no_cuda,
    "tensorrt": no_tensorrt,
    "container": no_container,
    "browser": no_browser,
    "ray": no_ray,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption(
        "--rewrite-goldens", action="store_true", help="write tests/goldens again; look at the diff"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.work import ByWhatIsShared

    return ByWhatIsShared(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        name: check() for name, check in MISSING.items() if any(i.get_closest_marker(name) for i in items)
    }
    reasons["slow"] = None if config.getoption("--slow") else "slow; run with --slow or `make test-models`"
    for item in items:
        for name, reason in reasons.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        from tests.work import when

        items.sort(key=lambda item: when(item.nodeid))


def pytest_collection_finish() -> None:
    """Leave what was imported out of every collection to come, and collect where there is something to find.

    Capturing a graph makes so many small objects that a tenth of an export went into looking at torch's own.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    terminalreporter.section("not run here")
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{count} tests: {reason}")
    if not reasons:
        terminalreporter.line("nothing: everything was run")
