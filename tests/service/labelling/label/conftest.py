"""A folder of kept photographs, and a label server for it in a thread of this process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from sopdeploy_service.labelling.kept import LABELLED
from sopdeploy_service.labelling.label.app import COOKIE, create_label_app, label_config
from sopdeploy_service.labelling.label.folders import LabelFolders
from sopdeploy_service.settings import Settings
from tests.service.api.pages.conftest import chromium, open_page  # noqa: F401  # fixtures
from tests.service.labelling.test_kept import record_of
from tests.support.service import in_a_thread, picture_bytes

KEY = "c2VjcmV0LWtleQ"
LABELS = ("hat", "shoes", "t-shirt")


def identity(number: int, *, decides: bool = True) -> str:
    """An ID, whose digits 8 to 15 say whether a photograph of the sample decides or trains."""
    return f"{0:08x}{0 if decides else 1:08x}{number:016x}"


@pytest.fixture
def keep(tmp_path: Path) -> Callable[..., str]:
    """`keep(number, logits)` writes a photograph and its record to the folder `kept`; returns its ID."""
    folder = tmp_path / "kept"
    folder.mkdir()

    def write(
        number: int,
        logits: Sequence[float] = (0.0, 0.0, 0.0),
        *,
        decides: bool = True,
        **changes: object,
    ) -> str:
        name = identity(number, decides=decides)
        (folder / f"{name}.jpg").write_bytes(picture_bytes((number % 256, 100, 200)))
        given = {
            "time": datetime(2026, 11, 22, 10, 0, number % 60, tzinfo=UTC),
            "labels": LABELS,
            "near_hash": sha256(name.encode()).hexdigest()[:16],
        }
        record = record_of(name, **given | changes, logits=logits)
        (folder / f"{name}.json").write_text(record.model_dump_json())
        return name

    return write


@pytest.fixture
def open_folders(tmp_path: Path) -> Callable[[], LabelFolders]:
    return lambda: LabelFolders(tmp_path / "kept", tmp_path / "photos")


@contextmanager
def label_server(
    folders: LabelFolders, *, cookies: dict[str, str] | None = None, **values: object
) -> Iterator[httpx.Client]:
    """A client of a label server, with the cookie of the key unless other *cookies* are given."""
    settings = Settings(host="Desk", **values)
    app = create_label_app(folders, settings, KEY)
    cookies = {COOKIE.format(settings.port): KEY} if cookies is None else cookies
    with (
        in_a_thread(label_config(app, settings)) as (_, address),
        httpx.Client(base_url=address, timeout=60, cookies=cookies) as client,
    ):
        yield client


def files_below(folder: Path) -> set[str]:
    """Paths of all files below *folder*, relative to it, without records of photographs that have a label."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != LABELLED
    }
