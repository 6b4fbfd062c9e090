"""The files whose functions a request, an export and a training folder execute.

ARCHITECTURE.md lists those of a request and of an export.
"""

import gc
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from types import FrameType

import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.data.datasets.folder import FolderConfig
from sopdeploy.data.sources import open_data
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export_checkpoint
from sopdeploy_service.decoding.child import ChildOptions, answer, read_rules
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests import quick_torch
from tests.export.conftest import SIDE, save, trained
from tests.export.once import proving_once
from tests.service.conftest import picture_bytes, running, write_bundle
from tests.sopdeploy.data.small_data import write_classes

ROOT = Path(__file__).parents[1]
PACKAGES = ("sopdeploy/", "export/sopdeploy_export/", "service/sopdeploy_service/")
PYTHON = re.compile(r"`([\w/]+\.py)`")
OF_THE_NETWORK = ("sopdeploy/models/", "sopdeploy/backbones/", "sopdeploy/layers/")


@contextmanager
def recorded() -> Iterator[tuple[Callable[[], set[str]], list[str]]]:
    """Record the files of functions that this thread, and threads started here, execute; and the returns.

    The callable gives the files so far and starts anew. Code of modules runs at import and does not count.
    Nor do finalizers of objects that earlier tests left behind: no garbage is collected meanwhile.

    A return is where a reader, who reads each function at its first call, comes back to a file: the first
    call of a function of a module, by another file, after one of its file was called so. Methods belong to
    the value that the reader has in hand.
    """
    files: set[str] = set()
    entered: set[str] = set()
    returns: dict[tuple[str, str], str] = {}  # by file and function; empty for those that are none

    def record(frame: FrameType, _: str, __: object) -> None:  # called for every call of a Python function
        key = frame.f_code.co_filename, frame.f_code.co_qualname
        if key[1] == "<module>" or key in returns:
            files.add(key[0])
            return
        files.add(key[0])
        returns[key] = ""
        file, caller = in_packages(key[0]), frame.f_back
        while caller is not None and not in_packages(caller.f_code.co_filename):
            caller = caller.f_back
        by = "" if caller is None else in_packages(caller.f_code.co_filename)
        if file and key[1].isidentifier() and by != file and not file.startswith(OF_THE_NETWORK):
            returns[key] = f"{by} calls {key[1]} of {file}" if file in entered else ""
            entered.add(file)

    def take() -> set[str]:
        taken = files.copy()
        files.clear()
        return {name for name in map(in_packages, taken) if name}

    found: list[str] = []
    before = sys.gettrace()
    gc.disable()
    threading.settrace(record)
    sys.settrace(record)
    try:
        yield take, found
    finally:
        threading.settrace(before)
        sys.settrace(before)
        gc.enable()
        found += filter(None, returns.values())


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
    with recorded() as (take, _), running(OnnxRuntime(bundle, threads=1), bundle, Settings()) as client:
        for number in range(5):
            if number == 1:
                take()
            assert client.post("/v1/classify", content=picture).status_code == 200
        read_rules.cache_clear()  # other tests have filled it
        rules = bundle.manifest.preprocess.model_dump_json().encode()
        options = ChildOptions(0, 0, False, 0, len(picture), 1 << 20, False, (), "off")
        answer(0, rules, EncodedImage(picture), options)
        return take()


@pytest.fixture(scope="module")
def export_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], list[str]]:
    """Export a small DSoP network, detached; return its files and the returns."""
    folder, preprocess = tmp_path_factory.mktemp("export"), Preprocess(resize=SIDE, crop=SIDE)
    checkpoint, options = folder / "ckpt.pt", ExportOptions(detach=True, max_batch=1)
    save(trained(), "dsop-resnet8", checkpoint, preprocess)
    with quick_torch.one_thread(), proving_once(), recorded() as (take, returns):
        export_checkpoint(checkpoint, folder / "out", options=options)
        files = {file for file in take() if not file.startswith(OF_THE_NETWORK)}
    return files, returns


def test_a_request_executes_the_files_that_the_architecture_page_lists(tmp_path: Path) -> None:
    found = request_files(tmp_path)
    number, files = listed("## A `/v1/classify` request", "service/sopdeploy_service")
    assert (files - found, found - files, number) == (set(), set(), len(found))


def test_an_export_executes_the_files_that_the_architecture_page_lists(
    export_run: tuple[set[str], list[str]],
) -> None:
    found, _ = export_run
    number, files = listed("## `ckpt.pt` to bundle", "export/sopdeploy_export")
    assert (files - found, found - files, number) == (set(), set(), len(found))


def test_an_export_returns_to_a_file_at_most_20_times(export_run: tuple[set[str], list[str]]) -> None:
    _, returns = export_run
    assert len(returns) <= 20, "\n".join(returns)


MAX_RETURNS = 8


@pytest.mark.parametrize("parts", [("",), ("train", "val")])
def test_opening_a_training_folder_rarely_returns_to_a_file(parts: tuple[str, ...], tmp_path: Path) -> None:
    for part in parts:
        write_classes(tmp_path / part, ("cat", "dog"), 4)
    (tmp_path / parts[0] / "cat" / "notes.txt").touch()
    functions: dict[tuple[str, str], None] = {}  # in the order of their first calls

    def record(frame: FrameType, _: str, __: object) -> None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT / "sopdeploy")) and "<" not in frame.f_code.co_name:
            functions[file, frame.f_code.co_qualname] = None

    sys.settrace(record)
    try:
        open_data(FolderConfig(kind="folder", path=tmp_path))
    finally:
        sys.settrace(None)
    visits = Counter(file for file, _ in groupby(file for file, _ in functions))
    assert visits.total() - len(visits) <= MAX_RETURNS, visits
