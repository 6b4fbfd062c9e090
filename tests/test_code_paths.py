"""ARCHITECTURE.md lists the files whose functions a request and an export execute."""

import gc
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType

import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export_checkpoint
from sopdeploy_service.decoding.child import ChildOptions, answer, read_rules
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests import quick_torch
from tests.export.conftest import SIDE, save, trained
from tests.export.once import proving_once
from tests.service.conftest import picture_bytes, running, write_bundle

ROOT = Path(__file__).parents[1]
PACKAGES = ("sopdeploy/", "export/sopdeploy_export/", "service/sopdeploy_service/")
PYTHON = re.compile(r"`([\w/]+\.py)`")
OF_THE_NETWORK = ("sopdeploy/models/", "sopdeploy/backbones/", "sopdeploy/layers/")


@contextmanager
def recorded() -> Iterator[Callable[[], set[str]]]:
    """Record the files of functions that this thread, and threads started here, execute.

    The callable gives the files so far and starts anew. Code of modules runs at import and does not count.
    Nor do finalizers of objects that earlier tests left behind: no garbage is collected meanwhile.
    """
    files: set[str] = set()

    def record(frame: FrameType, _: str, __: object) -> None:  # called for every call of a Python function
        files.add(frame.f_code.co_filename)

    def take() -> set[str]:
        taken = files.copy()
        files.clear()
        return {name for name in map(in_packages, taken) if name}

    before = sys.gettrace()
    gc.disable()
    threading.settrace(record)
    sys.settrace(record)
    try:
        yield take
    finally:
        threading.settrace(before)
        sys.settrace(before)
        gc.enable()


@cache
def in_packages(file: str) -> str:
    """Return the path of *file* in this repository, empty for files outside of the packages."""
    path = Path(file)
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    return name if name.startswith(PACKAGES) and name.endswith(".py") else ""


def listed(heading: str, folder: str) -> tuple[int, set[str]]:
    """Read the number and the files below *heading*; files that begin with no package are in *folder*."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = page.partition(heading)[2].partition("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    files = {file if file.startswith(PACKAGES) else f"{folder}/{file}" for file in PYTHON.findall(table)}
    return int(re.findall(r"(\d+) files", section)[0]), files


def request_files(folder: Path) -> set[str]:
    """Classify a picture; the first request fills caches. Then do what a new child does.

    A response may arrive before the last function of its request has run, which then belongs to the next.
    """
    bundle, picture = open_bundle(write_bundle(folder)), picture_bytes()
    with recorded() as take, running(OnnxRuntime(bundle, threads=1), bundle, Settings()) as client:
        for number in range(5):
            if number == 1:
                take()
            assert client.post("/v1/classify", content=picture).status_code == 200
        read_rules.cache_clear()  # other tests have filled it
        rules = bundle.manifest.preprocess.model_dump_json().encode()
        options = ChildOptions(0, 0, False, 0, len(picture), 1 << 20, (), "off")
        answer(0, rules, picture, options)
        return take()


def export_files(folder: Path) -> set[str]:
    """Export a small DSoP network, detached; return the files but those of networks."""
    preprocess, checkpoint = Preprocess(resize=SIDE, crop=SIDE), folder / "ckpt.pt"
    save(trained(), "dsop-resnet8", checkpoint, preprocess)
    with quick_torch.one_thread(), proving_once(), recorded() as take:
        export_checkpoint(checkpoint, folder / "out", options=ExportOptions(detach=True, max_batch=1))
        return {file for file in take() if not file.startswith(OF_THE_NETWORK)}


PATHS = {  # heading, folder of files without one: their files
    ("## A `/v1/classify` request", "service/sopdeploy_service"): request_files,
    ("## `ckpt.pt` to bundle", "export/sopdeploy_export"): export_files,
}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[0])
def test_the_files_are_those_that_the_architecture_page_lists(path: tuple[str, str], tmp_path: Path) -> None:
    found = PATHS[path](tmp_path)
    number, files = listed(*path)
    assert (files - found, found - files, number) == (set(), set(), len(found))
